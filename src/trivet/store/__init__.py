"""A run directory: what is written while a run goes on, checkpoints included, and how it is read again."""
