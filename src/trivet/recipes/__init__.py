"""The methods: each file composes a reward signal, generation and optimization, and reading it is reading the method."""

RECIPES = ("sft", "reward-model", "dpo", "ppo", "grpo", "pairwise-grpo")
