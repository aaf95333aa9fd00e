"""Our recipes against TRL 1.16 on the same batch and weights: loss and gradient of one step, as a table.

    python tests/parity.py

Ours is the recipe's own loop, stopped at its first optimizer step; theirs the trainer's own loss, built from its own config.
Rollouts, rewards, reference and old policy are given to both. Weights are float32; the reference and the policy that sampled
differ from the policy, so that no ratio is 1. PPO has left TRL and is compared with 1.12.0 by parity_ppo.py.
"""

import copy
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Qwen3Config

from conftest import SMALL, ragged, tiny
from steps import Gradient, examples, gradient, lists, recipe_step, rollouts_of
from trivet.model.forward import token_logprobs
from trivet.optimization.policy import clipped_surrogate_loss
from trivet.optimization.reduce import sequence_sum
from trivet.recipes import dpo, grpo, reward_model, sft
from trivet.recipes.offline import zero_ref_logprob

TOLERANCE = 1e-5
PAD = 60
OUT = tempfile.gettempdir() + "/trivet-parity"
PPO_PEER = Path(sys.prefix) / "trl-1.12.0"  # beside the environment, not in it
Side = tuple[float, Gradient]  # loss and gradient


# Models and data, the same for both sides ---------------------------------------------------------------------------


def moved(model: Any, seed: int, scale: float = 0.02) -> Any:
    """A copy with other weights."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return other


def scorer() -> Any:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        Qwen3Config(**SMALL, num_labels=1, pad_token_id=PAD)
    ).eval()
    return moved(model, 1, 0.1)


POLICY = tiny()
REFERENCE, OLD = moved(POLICY, 1), moved(POLICY, 2, 0.05)
PAIRS, SINGLES, GROUPS = ragged(5, 2), ragged(6, 1, seed=1), ragged(4, 4, seed=2)
PAIRS.completions[PAIRS.completions == PAD] = (
    3  # transformers finds the end of a sequence by looking for padding
)
LABELS = [True, False, False, True, True, False]
REWARDS = [
    float(x) for x in torch.randn(16, generator=torch.Generator().manual_seed(3)).round(decimals=2)
]
TEMPERATURE = 0.8


def theirs(model: Any, loss: Callable[[Any], Tensor]) -> Side:
    value = loss(model)
    model.zero_grad()
    value.backward()
    return float(value.detach()), gradient(model)


# The methods --------------------------------------------------------------------------------------------------------


def common(**options: Any) -> dict[str, Any]:
    defaults = {
        "output_dir": OUT,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return {**defaults, "gradient_checkpointing": False, "max_length": None, **options}


def rows_of(kind: str) -> Any:
    """A data set that their constructors can digest; the batch they are compared on is given later."""
    from datasets import Dataset

    row: dict[str, Any] = {
        "prompt": "One day",
        "completion": " a",
        "chosen": " a",
        "rejected": " b",
        "label": True,
    }
    columns = {
        "sft": ("prompt", "completion"),
        "pairs": ("prompt", "chosen", "rejected"),
        "prompts": ("prompt",),
    }
    return Dataset.from_list(
        [{c: row[c] for c in columns.get(kind, ("prompt", "completion", "label"))}] * 4
    )


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from trivet.toy import STORIES

    return AutoTokenizer.from_pretrained(STORIES["model"])


def sft_rows() -> list[Any]:
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = copy.deepcopy(POLICY)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**common()),
        train_dataset=rows_of("sft"),
        processing_class=tokenizer(),
    )
    prompts, completions = lists(SINGLES)
    whole = [
        {"input_ids": p + c, "labels": [-100] * len(p) + c}
        for p, c in zip(prompts, completions, strict=True)
    ]
    batch = DataCollatorForLanguageModeling(pad_token_id=PAD)(whole)
    return [
        (
            "sft",
            "nll",
            recipe_step(sft, POLICY, examples(SINGLES))[0],
            theirs(model, lambda m: trainer.compute_loss(m, batch)),
        )
    ]


def reward_rows() -> list[Any]:
    from trl import RewardConfig, RewardTrainer

    result = []
    given = torch.linspace(0.0, 1.5, len(PAIRS.prompts)).tolist()
    for name, ours_options, theirs_options, rows in (
        ("plain", {}, {}, None),
        ("margin", {}, {}, [{"margin": margin} for margin in given]),
        ("centering", {"center": 0.01}, {"center_rewards_coefficient": 0.01}, None),
    ):
        model = scorer()
        args = RewardConfig(**common(**theirs_options))
        trainer = RewardTrainer(
            model=model, args=args, train_dataset=rows_of("pairs"), processing_class=tokenizer()
        )
        prompts, completions = lists(PAIRS)
        batch = [
            {"chosen_ids": p + completions[2 * i], "rejected_ids": p + completions[2 * i + 1]}
            | ({"margin": given[i]} if rows else {})
            for i, p in enumerate(prompts)
        ]
        inputs = type(trainer.data_collator)(pad_token_id=PAD)(batch)
        model.config.pad_token_id = PAD  # they had put the tokenizer's in its place
        side = theirs(model, lambda m, t=trainer, i=inputs: t.compute_loss(m, dict(i)))
        result.append(
            (
                "reward-model",
                name,
                recipe_step(reward_model, scorer(), examples(PAIRS, rows), **ours_options)[0],
                side,
            )
        )
    return result


def dpo_rows() -> list[Any]:
    from trl import DPOConfig, DPOTrainer

    variants: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("sigmoid", {}, {"loss_type": ["sigmoid"]}),
        ("hinge", {"loss": "hinge"}, {"loss_type": ["hinge"]}),
        ("ipo, per token", {"loss": "ipo", "length_normalize": True}, {"loss_type": ["ipo"]}),
        (
            "robust",
            {"loss": "robust", "label_smoothing": 0.1},
            {"loss_type": ["robust"], "label_smoothing": 0.1},
        ),
        ("length-normalized", {"length_normalize": True}, {"loss_type": ["sigmoid_norm"]}),
        (
            "sigmoid + 0.5 sft",
            {"sft_weight": 0.5},
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        ),
    ]
    result = []
    for name, ours_options, theirs_options in variants:
        model = copy.deepcopy(POLICY)
        args = DPOConfig(**common(beta=0.3, **theirs_options))
        trainer = DPOTrainer(
            model=model, ref_model=copy.deepcopy(REFERENCE), args=args, train_dataset=rows_of("pairs"),
            processing_class=tokenizer(),
        )  # fmt: skip
        prompts, completions = lists(PAIRS)
        batch = [
            {
                "prompt_ids": p,
                "chosen_ids": completions[2 * i],
                "rejected_ids": completions[2 * i + 1],
            }
            for i, p in enumerate(prompts)
        ]
        inputs = type(trainer.data_collator)(pad_token_id=PAD)(batch)
        side = recipe_step(
            dpo, POLICY, examples(PAIRS), reference=REFERENCE, beta=0.3, **ours_options
        )[0]
        result.append(
            (
                "dpo",
                name,
                side,
                theirs(model, lambda m, t=trainer, i=inputs: t._compute_loss(m, i, False)),
            )
        )
    return result + kto_rows() + without_reference_rows()


def kto_rows() -> list[Any]:
    from trl import KTOConfig, KTOTrainer

    result = []
    for name, weights in (
        ("kto", {}),
        ("kto, weighted", {"desirable_weight": 1.3, "undesirable_weight": 0.7}),
    ):
        model = copy.deepcopy(POLICY)
        args = KTOConfig(**common(beta=0.3, per_device_train_batch_size=6, **weights))
        trainer = KTOTrainer(
            model=model, ref_model=copy.deepcopy(REFERENCE), args=args, train_dataset=rows_of("labels"),
            processing_class=tokenizer(),
        )  # fmt: skip
        prompts, completions = lists(SINGLES)
        batch = [
            {
                "prompt_ids": p,
                "completion_ids": c,
                "KL_completion_ids": completions[i - 1],
                "label": LABELS[i],
            }
            for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]
        inputs = type(trainer.data_collator)(pad_token_id=PAD)(batch)
        rows = examples(SINGLES, [{"label": label} for label in LABELS])
        side = recipe_step(dpo, POLICY, rows, reference=REFERENCE, loss="kto", beta=0.3, **weights)[
            0
        ]
        result.append(
            (
                "dpo",
                name,
                side,
                theirs(model, lambda m, t=trainer, i=inputs: t._compute_loss(m, i, False)),
            )
        )
    return result


def without_reference_rows() -> list[Any]:
    """SimPO, and the comparison of ORPO: theirs adds a supervised loss that counts the prompt's tokens too."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    prompts, completions = lists(PAIRS)

    def side_of(which: int) -> dict[str, Tensor]:
        rows = [p + completions[2 * i + which] for i, p in enumerate(prompts)]
        width = max(map(len, rows))
        name = ("chosen", "rejected")[which]
        return {
            f"{name}_input_ids": torch.tensor([row + [PAD] * (width - len(row)) for row in rows]),
            f"{name}_attention_mask": torch.tensor(
                [[1] * len(row) + [0] * (width - len(row)) for row in rows]
            ),
            f"{name}_labels": torch.tensor(
                [
                    [-100] * len(p) + row[len(p) :] + [-100] * (width - len(row))
                    for p, row in zip(prompts, rows, strict=True)
                ]
            ),
        }

    batch = side_of(0) | side_of(1)

    def orpo(model: Any) -> Tensor:
        chosen, rejected = trainer.concatenated_forward(model, batch)[:2]
        return -trainer.odds_ratio_loss(chosen, rejected)[0].mean()

    model = copy.deepcopy(POLICY)
    args = CPOConfig(**common(beta=2.0, loss_type="simpo", simpo_gamma=0.7, cpo_alpha=0.0))
    trainer: Any = CPOTrainer(
        model=model, args=args, train_dataset=rows_of("pairs"), processing_class=tokenizer()
    )
    simpo = theirs(model, lambda m: trainer.get_batch_loss_metrics(m, batch)[0])
    model = copy.deepcopy(POLICY)
    args = ORPOConfig(**common(beta=0.4))
    trainer = ORPOTrainer(
        model=model, args=args, train_dataset=rows_of("pairs"), processing_class=tokenizer()
    )
    odds = theirs(model, orpo)
    model = copy.deepcopy(POLICY)
    args = CPOConfig(**common(beta=0.3, loss_type="sigmoid", label_smoothing=0.1, cpo_alpha=0.0))
    trainer = CPOTrainer(
        model=model, args=args, train_dataset=rows_of("pairs"), processing_class=tokenizer()
    )
    smoothed = theirs(model, lambda m: trainer.get_batch_loss_metrics(m, batch)[0])
    with patch.object(
        dpo, "reference_of", lambda config, run: partial(zero_ref_logprob, run)
    ):  # theirs has none
        options = {"loss": "conservative", "label_smoothing": 0.1, "beta": 0.3}
        conservative = recipe_step(dpo, POLICY, examples(PAIRS), **options)[0]
    tiny_weight = 1e-30  # orpo asks for a supervised loss; this one is nothing in float32
    return [
        ("dpo", "conservative", conservative, smoothed),
        (
            "dpo",
            "simpo",
            recipe_step(dpo, POLICY, examples(PAIRS), loss="simpo", beta=2.0, gamma=0.7)[0],
            simpo,
        ),
        (
            "dpo",
            "orpo, the odds ratio",
            recipe_step(
                dpo, POLICY, examples(PAIRS), loss="orpo", beta=0.4, sft_weight=tiny_weight
            )[0],
            odds,
        ),
    ]


def grpo_trainer(
    kind: str, rewards: list[float | None], **options: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Their trainer, its model, and what its own code makes of the given completions and rewards."""
    import trl

    model, size = copy.deepcopy(POLICY), GROUPS.group_size
    config, trainer_type = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    beta = options.pop("beta", 0.0)
    defaults = {
        "per_device_train_batch_size": len(rewards),
        "num_generations": size,
        "temperature": TEMPERATURE,
    }
    args = config(
        **{k: v for k, v in common(**defaults, **options).items() if k != "max_length"}, beta=0.0
    )
    longest = GROUPS.completions.shape[1]
    trainer = trainer_type(
        model=model, reward_funcs=lambda **given: list(rewards), args=args, train_dataset=rows_of("prompts"),
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.beta, trainer.max_completion_length, trainer.current_gradient_accumulation_steps = (
        beta,
        longest,
        1,
    )
    trainer.ref_model = copy.deepcopy(REFERENCE)  # in place of one from the hub
    trl.trainer.utils.add_fused_lm_head(trainer.ref_model, temperature=TEMPERATURE)
    prompts, completions = lists(GROUPS)
    repeated = [prompt for prompt in prompts for _ in range(size)]
    generated = {
        "GRPO": (repeated, completions, None, ["x"] * len(rewards), None, {}, None, None),
        "RLOO": (repeated, completions, ["x"] * len(rewards)),
    }[kind]
    model.train()
    with patch.object(trainer, "_generate", lambda prompts: generated):
        inputs = trainer._generate_and_score_completions([{"prompt": "x"} for _ in rewards])
    return trainer, model, inputs


def sampled(policy: Any) -> Tensor:
    return token_logprobs(policy, GROUPS, temperature=TEMPERATURE).detach()


def our_grpo(rewards: list[float | None], before: Any, **options: Any) -> Side:
    longest, size = GROUPS.completions.shape[1], GROUPS.group_size
    return recipe_step(
        grpo, POLICY, examples(GROUPS), before=before, reference=REFERENCE, rollouts=rollouts_of(GROUPS, sampled(before or POLICY)),
        rewards=torch.tensor([float("nan") if r is None else r for r in rewards]), temperature=TEMPERATURE,
        group_size=size, max_completion_tokens=longest, **options,
    )[0]  # fmt: skip


def grpo_rows() -> list[Any]:
    sequence, k3 = {"loss_mean": "sequence"}, {"kl_estimator": "k3", "beta": 0.04}
    wide = {"epsilon": 0.2, "epsilon_high": 0.28}
    variants: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("scale group, loss grpo", {"scale_rewards": "group", **sequence}, {"loss_type": "grpo", "scale_rewards": "group"}),
        ("scale none, loss grpo", sequence, {"loss_type": "grpo", "scale_rewards": "none"}),
        ("scale batch, loss grpo", {"scale_rewards": "batch", **sequence}, {"loss_type": "grpo", "scale_rewards": "batch"}),
        ("loss bnpo", {}, {"loss_type": "bnpo"}),
        ("loss dapo", {}, {"loss_type": "dapo"}),
        ("loss dr_grpo", {"loss_mean": "constant"}, {"loss_type": "dr_grpo"}),
        ("loss cispo", {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.1}, {"loss_type": "cispo", "epsilon_high": 1.1}),
        ("clip 0.2, 0.28", {"clip_high": 0.28}, {"loss_type": "dapo", **wide}),
        ("clip tight", {"clip_low": 0.05, "clip_high": 0.1}, {"loss_type": "dapo", "epsilon": 0.05, "epsilon_high": 0.1}),
        ("dual clip", {"clip_dual": 1.25}, {"loss_type": "dapo", "delta": 1.25}),
        ("gspo", {"loss": "gspo", **sequence}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
        ("gspo, tight", {"loss": "gspo", **sequence, "clip_low": 0.02, "clip_high": 0.03},
         {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03}),
        ("k3 in the loss", k3, {"loss_type": "dapo", "beta": 0.04, "use_bias_correction_kl": False}),
        ("k3 times the ratio", {**k3, "kl_estimator": "weighted-k3"},
         {"loss_type": "dapo", "beta": 0.04, "use_bias_correction_kl": True}),
        ("deepseekmath", {**sequence, **k3, "scale_rewards": "group"}, {"loss_type": "grpo", "scale_rewards": "group", "beta": 0.04, "use_bias_correction_kl": False}),
        ("two without a reward", {"scale_rewards": "group"}, {"loss_type": "dapo", "scale_rewards": "group"}),
    ]  # fmt: skip
    result = []
    for name, ours_options, theirs_options in variants:
        rewards: list[float | None] = [
            None if "without" in name and b in (1, 6) else r for b, r in enumerate(REWARDS)
        ]
        options = {"scale_rewards": "none", **theirs_options}
        trainer, model, inputs = grpo_trainer("GRPO", rewards, **options)
        inputs["old_per_token_logps"] = sampled(OLD)
        side = theirs(model, lambda m, t=trainer, i=inputs: t._compute_loss(m, i))
        mine = our_grpo(rewards, OLD, epochs_per_batch=2, **{"beta": 0.0, **ours_options})
        result.append(("grpo", name, mine, side))
    return result + rloo_rows()


def rloo_rows() -> list[Any]:
    """Their clipped loss is of whole completions, with k1 charged in the reward; ours trains one on-policy step, where the
    gradient is the same up to the constant length, and has their loss as a function."""
    rewards: list[float | None] = [None if b == 6 else r for b, r in enumerate(REWARDS)]
    trainer, model, inputs = grpo_trainer("RLOO", rewards, beta=0.1)
    inputs["old_logps"] = sequence_sum(sampled(OLD), GROUPS.mask)
    off_policy = theirs(model, lambda m: trainer._compute_loss(m, inputs))

    def surrogate(policy: Any) -> Tensor:
        logprob = sequence_sum(
            token_logprobs(policy, GROUPS, temperature=TEMPERATURE), GROUPS.mask
        )  # (B,)
        clip = {"clip_low": 0.2, "clip_high": 0.2}
        return clipped_surrogate_loss(
            logprob, inputs["old_logps"], inputs["advantages"], **clip
        ).mean()

    function = theirs(copy.deepcopy(POLICY), surrogate)
    trainer, model, inputs = grpo_trainer("RLOO", rewards, beta=0.1)
    _, on_policy = theirs(model, lambda m: trainer._compute_loss(m, inputs))
    longest = GROUPS.completions.shape[1]
    _, mine = our_grpo(rewards, None, **grpo.PRESETS["rloo"] | {"beta": 0.1})
    mine = {name: g * longest for name, g in mine.items()}
    return [
        ("grpo", "rloo, clipped (function)", function, off_policy),
        ("grpo", "rloo, on-policy", (0.0, mine), (0.0, on_policy)),
    ]


# The table ----------------------------------------------------------------------------------------------------------


def difference(mine: Side, their: Side) -> tuple[float, float]:
    """Relative difference of loss and of gradient (norm of the difference over their norm)."""
    assert {name for name, g in mine[1].items() if g.any()} == {
        name for name, g in their[1].items() if g.any()
    }
    gap = (
        sum(
            float((mine[1][name] - g).square().sum())
            for name, g in their[1].items()
            if name in mine[1]
        )
        ** 0.5
    )
    norm = sum(float(g.square().sum()) for g in their[1].values()) ** 0.5
    return abs(mine[0] - their[0]) / max(abs(their[0]), 1e-12), gap / norm


def table() -> list[tuple[str, str, float, float, float, float]]:
    """(method, variant, our loss, theirs, relative difference of loss, of gradient) of every variant."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    with (
        warnings.catch_warnings(),
        redirect_stderr(io.StringIO()),
    ):  # theirs; many, and none of them ours
        warnings.simplefilter("ignore")
        made = [row for make in (sft_rows, reward_rows, dpo_rows, grpo_rows) for row in make()]
    return [(method, name, a[0], b[0], *difference(a, b)) for method, name, a, b in made]


def show(rows: list[tuple[str, str, float, float, float, float]], peer: str) -> int:
    """Print the table; returns how many rows are beyond the tolerance."""
    print(
        f"{'method':14}{'variant':28}{'Trivet':>14}{peer:>14}{'loss':>10}{'gradient':>10}   (relative difference)"
    )
    for method, name, mine, their, loss, slope in rows:
        late = "" if max(loss, slope) <= TOLERANCE else "   BEYOND 1e-5"
        print(f"{method:14}{name:28}{mine:14.7f}{their:14.7f}{loss:10.1e}{slope:10.1e}{late}")
    beyond = sum(max(row[4:]) > TOLERANCE for row in rows)
    print(f"{len(rows) - beyond} of {len(rows)} within {TOLERANCE:g}")
    return beyond


def ppo_table() -> list[Any]:
    """The same for PPO, in a process of its own that finds the release of TRL that still had it."""
    here = Path(__file__).parent
    paths = {
        "PYTHONPATH": os.pathsep.join(
            [str(PPO_PEER), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", str(here / "parity_ppo.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | paths, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


if __name__ == "__main__":
    import trl

    beyond = show(table(), f"TRL {trl.__version__}")
    if PPO_PEER.exists():
        print()
        beyond += show(ppo_table(), "TRL 1.12.0")
    else:
        print(f"PPO left out: pip install --no-deps --target {PPO_PEER} trl==1.12.0")
    sys.exit(beyond > 0)
