"""From a Config to a run and through it: loading, the steps, what goes wrong, and going on."""
