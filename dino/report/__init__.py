"""Pages that open offline: one kit for the reports of a run, of a curation and of evaluations."""
