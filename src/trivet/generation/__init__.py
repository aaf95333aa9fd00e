"""Leg 2 · what does the policy say? Prompts to groups of completions."""
