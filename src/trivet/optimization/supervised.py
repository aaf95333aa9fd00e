"""The loss for learning from correct answers."""

from torch import Tensor


def nll_loss(logprobs: Tensor) -> Tensor:
    """Negative log-likelihood of the tokens: -log pi(y_t | x, y_<t). (B, T) -> (B, T).

    For a uniform policy it is log V. Its mean over completion tokens is the loss of supervised
    fine-tuning.
    """
    return -logprobs
