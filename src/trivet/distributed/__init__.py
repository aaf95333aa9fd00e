"""Training with many processes: sharded models, shared passes, and their checkpoints."""
