"""trivet plan: predict what a step of each method will hold, compute and move before it runs."""
