"""trivet plan: what a step of each method will hold, compute and move, before anything runs."""
