"""Is a run healthy? Indicators, each with its healthy range, and one plain verdict."""
