"""What a recipe uses: its options, the run, the optimizer, the trace of a step, its metrics."""

Metrics = dict[str, float]  # the numbers that a step reports, by name
