"""The run directory: writing it during a run, including checkpoints, and reading it."""
