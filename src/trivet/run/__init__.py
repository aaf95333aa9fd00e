"""What surrounds a loop: options, data, run directory, metrics, samples, summary."""

Metrics = dict[str, float]  # what a step says of itself, by name
