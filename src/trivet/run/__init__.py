"""What surrounds a loop: options, data, run directory, metrics, samples, summary."""
