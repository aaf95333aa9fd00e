"""Hugging Face models as trunk and head: loading, the shared-prefix forward, log-probabilities that never build logits."""
