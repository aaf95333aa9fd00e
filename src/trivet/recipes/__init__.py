"""The methods: each file composes a reward signal, generation and optimization, and to read the
file is to read the method.
"""

METHODS = {  # method: the module of its recipe
    "sft": "trivet.recipes.sft",
    "reward-model": "trivet.recipes.reward_model",
    "dpo": "trivet.recipes.dpo",
    "ppo": "trivet.recipes.ppo",
    "grpo": "trivet.recipes.grpo",
    "pairwise-grpo": "trivet.recipes.pairwise_grpo",
}
