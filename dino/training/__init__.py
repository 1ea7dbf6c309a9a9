"""How any method is trained: settings, steps, checkpoints, resuming, metrics. No word of a method is known here."""
