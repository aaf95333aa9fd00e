"""Many processes that take each step together: models in shards, shared passes, their checkpoints."""
