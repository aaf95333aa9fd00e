"""Trivet post-trains language models on preferences and rewards.

Three legs that never import each other: trivet.rewards (what is good?), trivet.generation (what does the policy say?),
trivet.optimization (how does it change?); trivet.recipes is where they meet, one short file for each method.

    from trivet.recipes import grpo
    from trivet.run.launch import launch

    launch(grpo.Config(model="Qwen/Qwen3-0.6B", data="questions.jsonl", reward=("last_number",)))
"""
