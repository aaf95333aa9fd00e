"""Trivet post-trains language models on preferences and rewards.

Three legs that never import each other: trivet.rewards (what is good?), trivet.generation (what does the policy say?),
trivet.optimization (how does it change?); trivet.recipes is where they meet, one short file for each method.

    from trivet.recipes import grpo
    from trivet.run.launch import launch

    launch(grpo.Config(model="Qwen/Qwen3-0.6B", data="questions.jsonl", reward=("last_number",)))
"""

import os

# torch's threads spin for long, and are slow where another process wants a core
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported, so after this
