"""A trained reward model as a reward."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from trivet.batch import Rollouts, collate
from trivet.errors import InputError
from trivet.model.adapters import scorer_on_policy, trainable_copy
from trivet.model.forward import in_microbatches
from trivet.model.load import is_scorer, load_scorer
from trivet.model.scalar import scores
from trivet.model.text import encode_completion, encode_prompt, load_tokenizer, stop_ids
from trivet.model.weights import load_beside
from trivet.places import model_folder


@dataclass
class LearnedReward:
    """Scores of a reward model: on the sampled token ids if it shares the policy's tokenizer, else
    on their text.
    """

    model: Any
    tokenizer: Any
    stops: list[int]
    same_tokens: bool
    policy: Any  # a critic gets an adapter if this has one
    budget: int = 8192  # trunk tokens at a time

    def critic(self) -> Any:
        """Return a trainable copy: of an adapter and the head if the policy trains an adapter, else
        of all weights.
        """
        return trainable_copy(self.model, self.policy)

    def __call__(self, rollouts: Rollouts) -> Tensor:
        groups = rollouts.groups
        if not self.same_tokens:
            size = groups.group_size
            encode = partial(encode_prompt, self.tokenizer, has_answer=True)
            prompts = [encode(row["prompt"]) for row in rollouts.rows]
            completions = []
            for b, text in enumerate(rollouts.texts):
                prompt = rollouts.rows[b // size]["prompt"]
                answer = (
                    [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
                )
                completions.append(
                    encode_completion(
                        self.tokenizer, prompt, prompts[b // size], answer, self.stops
                    )[0]
                )
            groups = collate(prompts, completions).to(groups.prompts.device)
        return in_microbatches(scores, self.model, groups, self.budget)


def load_learned_reward(name: str, tokenizer: Any, *, like: Any) -> LearnedReward:
    """Load the reward model in a run directory, folder or hub name. tokenizer: the policy's, to see
    whether ids can be shared. like: the policy, whose device and precision it takes.
    """
    folder = model_folder(name)
    if not is_scorer(folder):
        raise InputError(
            f"reward {name} is not a reward model (it has no sequence-classification head); train "
            "one with `trivet reward-model`"
        )
    reward_tokenizer = load_tokenizer(folder)
    if reward_tokenizer.chat_template is None:
        reward_tokenizer.chat_template = tokenizer.chat_template
    options = {"device": str(like.device), "merge": not hasattr(like, "peft_config")}
    model = scorer_on_policy(like, folder) or load_beside(like, load_scorer, folder, **options)
    model.requires_grad_(False).compute_dtype = like.compute_dtype
    return LearnedReward(
        model,
        reward_tokenizer,
        stop_ids(folder, reward_tokenizer),
        reward_tokenizer.get_vocab() == tokenizer.get_vocab(),
        like,
    )
