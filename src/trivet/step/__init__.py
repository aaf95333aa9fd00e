"""What a recipe sees: its options, the run, the optimizer, the trace of a step, its metrics."""

Metrics = dict[str, float]  # what a step reports, by name
