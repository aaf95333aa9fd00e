"""Running a recipe from a Config: loading, the steps, recovery from failures, and resuming."""
