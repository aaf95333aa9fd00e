"""From a Config to a run in memory: all loading and checking before a recipe's loop begins."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from trivet.arguments import parse_values
from trivet.batch import Example
from trivet.data.examples import LazyExamples, load_examples, split_by_prompt
from trivet.errors import InputError
from trivet.model.blocks import checkpoint_blocks
from trivet.model.load import load_policy, load_scorer, model_facts, require_causal, usable_device
from trivet.model.text import decode_completion, load_tokenizer, stop_ids
from trivet.places import model_folder, require_places
from trivet.rewards.functions import load_rewards
from trivet.runner.adapter_options import check_adapter, with_adapter
from trivet.runner.checks import check
from trivet.runner.methods import method_name, recipe_of, source_of
from trivet.runner.servers import check_servers
from trivet.step.devices import Devices, OneProcess
from trivet.step.options import Options
from trivet.step.run import Run
from trivet.store.record import NoRecord, Record


class Launch:
    """A run and its context: recipe, tokenizer, data report and directory. Nothing is written
    before the first step.
    """

    def __init__(self, config: Options, devices: Devices | None = None, again: bool = False):
        devices = devices or OneProcess()
        given = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(config).items()
        }
        config = replace(config, **parse_values(type(config), given, ""))
        self.config, self.devices, self.recipe = config, devices, recipe_of(config)
        self.method = method_name(self.recipe)
        check(config, self.method, again=again)
        require_places(config)
        self.start_from = model_folder(config.model)
        check_adapter(config, self.start_from)
        self.out = Path(
            devices.first(
                lambda: config.out or f"runs/{self.method}-{time.strftime('%Y%m%d-%H%M%S')}"
            )
        )
        device = usable_device(config.device)
        budget = config.microbatch_tokens or microbatch_that_fits(device)
        self.config = config = replace(config, microbatch_tokens=budget)
        if self.recipe.TRAINS == "policy":  # a reward model may start from a reward model
            require_causal(self.start_from, self.method)
        _, self.context, self.vocabulary = model_facts(self.start_from)
        self.tokenizer = load_tokenizer(self.start_from, config.chat_template)
        self.stops = stop_ids(self.start_from, self.tokenizer)
        self.counts: Counter[str] = Counter()
        train, heldout = self._examples()
        torch.manual_seed(config.seed)
        load = load_scorer if self.recipe.TRAINS == "scorer" else load_policy
        how: dict[str, Any] = {"precision": config.precision, "quantize": config.quantize}
        how |= {"device": device, "from_scratch": config.from_scratch}
        model = devices.load(
            lambda name, **how: with_adapter(load(name, **how), config, name),
            self.start_from,
            **how,
        )
        if config.gradient_checkpointing and devices.size == 1:  # else fsdp.py does it
            checkpoint_blocks(model)
        if self.recipe.TRAINS == "scorer":
            self._give_pad_token(model)
        else:
            # the saved model stops where it was trained to stop
            model.generation_config.eos_token_id = self.stops
        self.run = Run(
            config=config,
            model=model,
            tokenizer=self.tokenizer,
            decode=partial(decode_completion, self.tokenizer),
            stops=self.stops,
            train=train,
            heldout=heldout,
            reward=self._reward(model),
            steps=config.steps
            or max(1, round(config.epochs * len(train) / config.prompts_per_step)),
            device=device,
            generator=torch.Generator(device).manual_seed(config.seed),
            devices=devices,
        )
        check_servers(self.run)
        facts = self.method, source_of(self.recipe), self.run.steps
        record = Record(self.out, config, *facts, self.tokenizer, self.run.decode, self.run.reward)
        self.record = record if devices.rank == 0 else NoRecord()

    def example(self, most: int = 120) -> dict[str, Any]:
        """Decode the first training example: the end of its prompt, and its completions as spans,
        each learned or not.
        """
        example = self.run.train[0]
        cut, completions = "…" if len(example.prompt) > most else "", list[list[tuple[str, bool]]]()
        for ids, learned in zip(example.completions, example.learned, strict=True):
            flagged = list(zip(ids, learned, strict=True))[:most]
            spans = [
                (flag, [token for token, _ in span])
                for flag, span in groupby(flagged, itemgetter(1))
            ]
            completions.append([(self.tokenizer.decode(span), flag) for flag, span in spans])
            if len(ids) > most:
                completions[-1].append(("…", False))
        return {
            "prompt": cut + self.tokenizer.decode(example.prompt[-most:]),
            "completions": completions,
        }

    def _reward(self, model: Any) -> Any:
        config = vars(self.config)
        if "reward" not in config:
            return None
        note = lambda text: self.run.note(text)  # noqa: E731  self.run is set later
        reward = load_rewards(
            config["reward"], config["reward_weights"], self.tokenizer, like=model, note=note
        )
        reward.rewards = {name: self.devices.reward(part) for name, part in reward.rewards.items()}
        return reward

    def _examples(self) -> tuple[Sequence[Example], list[Example]]:
        config, room = self.config, self.context - self.config.max_completion_tokens
        if room < 1:
            raise InputError(
                f"--max-completion-tokens {config.max_completion_tokens} leaves no room for a "
                f"prompt in the context of {config.model} ({self.context} tokens); lower it"
            )

        def load(path: str, counts: Counter[str]) -> Sequence[Example]:
            limits: dict[str, Any] = {
                "max_prompt": min(config.max_prompt_tokens, room),
                "max_completion": config.max_completion_tokens,
                "truncate_prompts": config.truncate_prompts,
                "vocabulary": self.vocabulary,
                "lazily": True,
            }
            return load_examples(
                path, self.tokenizer, self.stops, self.recipe.ROWS, counts=counts, **limits
            )

        train = load(config.data, self.counts)
        if config.eval_data:
            counts = Counter[str]()
            heldout = load(config.eval_data, counts)
            self.counts |= {
                f"held-out data, {key}": n
                for key, n in counts.items()
                if key.startswith(("left", "cut"))
            }
        else:
            train, heldout = split_by_prompt(
                train, config.eval_fraction, config.seed, config.eval_limit
            )
        if not train:
            raise InputError(
                f"{config.data}: all rows are in the held-out share; lower --eval-fraction"
            )
        self.counts["for training"], self.counts["held out"] = len(train), len(heldout)
        if not heldout:
            self.counts["evaluations (nothing is held out: --eval-fraction, --eval-data)"] = 0
        looked_at = train[:1000] if isinstance(train, LazyExamples) else train
        plain = sum(isinstance(example.row.get("prompt"), str) for example in looked_at)
        if self.tokenizer.chat_template and plain:
            self.counts["prompts taken as plain text, though the model has a chat template"] = plain
        return train, list(heldout[: config.eval_limit])

    def _give_pad_token(self, model: Any) -> None:
        """Set a padding id that is not a stop token, so that transformers too reads the score at
        the last real token.
        """
        pad = self.tokenizer.pad_token_id
        if pad is None or pad in self.stops:
            unused = [i for i in self.tokenizer.all_special_ids if i not in self.stops]
            pad = unused[-1] if unused else len(self.tokenizer) - 1
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(pad)
        model.config.pad_token_id = pad


def microbatch_that_fits(device: str) -> int:
    """Return the tokens of a microbatch if --microbatch-tokens is not set."""
    return 2048 if device == "cpu" else 16384
