"""Hugging Face models as trunk and head: loading, the shared-prefix forward, log-probabilities that never build logits."""

from trivet.dependencies import require_tried_versions

require_tried_versions()  # before transformers and peft are imported: what they lack would be a traceback

from trivet.model.copies import frozen_copy
from trivet.model.forward import token_logprobs
from trivet.model.load import load_policy, load_scorer
from trivet.model.scalar import scores, values

__all__ = ["frozen_copy", "load_policy", "load_scorer", "scores", "token_logprobs", "values"]
