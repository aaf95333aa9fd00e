"""Hugging Face models as trunk and head: loading, the shared-prefix forward, log-probabilities that
never build all logits.
"""

from trivet.dependencies import require_tested_versions

# before importing transformers and peft, where a wrong version would be a traceback
require_tested_versions()

from trivet.model.copies import frozen_copy
from trivet.model.forward import token_logprobs
from trivet.model.load import load_policy, load_scorer
from trivet.model.scalar import scores, values

__all__ = ["frozen_copy", "load_policy", "load_scorer", "scores", "token_logprobs", "values"]
