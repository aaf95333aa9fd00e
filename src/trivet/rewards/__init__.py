"""Leg 1 · what is good? Turns groups of completions into one number each."""
