"""Leg 3 · how does the policy change? Pure functions on tensors: imports torch and nothing of ours."""
