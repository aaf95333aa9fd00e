"""Leg 1 · what is good? Groups of completions to one number each."""
