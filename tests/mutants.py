"""Planted defects, modelled on real ones of the field, that the tests must catch.

    python tests/mutants.py              # all of them, two at a time
    python tests/mutants.py gae clip     # those whose name has one of these words

Each is planted in a copy of the package, on which the tests named beside it must fail. A defect whose old text does not stand
exactly once in its file is stale. What does not come out right is tried once more, alone, and named even if it does then: such a
test depends on the moment. Exit code 1 if a defect survives twice, is stale or can't be tried.
"""

import compileall
import contextlib
import faulthandler
import gc
import importlib
import io
import os
import resource
import shlex
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import pytest  # this and what follows once, before forking: only trivet and the tests are imported for each defect
import torch
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.mistral.modeling_mistral
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from hypothesis import Phase, settings
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "src" / "trivet"
TOY_DATA = ("stories", "arithmetic")  # folders of toy/ that are linked, not copied
AT_ONCE, LIMIT, WAITS = 2, 120, 900  # processes; seconds that each may compute, and may take
PLAIN = [word for plugin in ("cacheprovider", "xdist", "anyio") for word in ("-p", f"no:{plugin}")]
PLAIN += [
    "--assert=plain"
]  # else pytest looks for the differences of long lists, for minutes where CI is set
REFUSED = 70  # exit code of a child in which pytest's own says nothing


class Mutant(NamedTuple):
    """A defect: in `file` of the package, `old` becomes `new`; `tests` are arguments of pytest, which must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def planted(file: str, tests: str, *defects: tuple[str, str, str]) -> Iterator[Mutant]:
    """Defects (name, old, new) of one file that the same tests must catch."""
    return (Mutant(name, file, old, new, tests) for name, old, new in defects)


PARITY = "test_parity.py::test_loss_and_gradient_are_those_of_trl"
PARITY_PPO = "test_parity.py::test_ppo_is_that_of_the_last_release_that_had_it"
SPLIT = "test_invariance.py::test_split_into_microbatches_down_to_one_prompt_at_a_time"
PADDING = "test_invariance.py::test_padding_amount_side_and_id"

# fmt: off
MUTANTS: list[Mutant] = [
    # Objectives: KL --------------------------------------------------------------------------------------------------
    *planted("optimization/kl.py", "test_optimization.py -k 'kl or k1 or k2 or k3'",
        ("k1 with the sign reversed", "return logprobs - ref_logprobs", "return ref_logprobs - logprobs"),
        ("k1 in place of k2", "return (logprobs - ref_logprobs).square() / 2", "return k1(logprobs, ref_logprobs)"),
        ("k2 without its half", "(logprobs - ref_logprobs).square() / 2", "(logprobs - ref_logprobs).square()"),
        ("k3 reversed: exp(d) - 1 - d", "torch.expm1(log_ratio) - log_ratio", "torch.expm1(-log_ratio) + log_ratio"),
        ("k3 without its linear term", "torch.expm1(log_ratio) - log_ratio", "torch.expm1(log_ratio)"),
        ("k3 that cancels near the reference", "torch.expm1(log_ratio) - log_ratio", "log_ratio.exp() - 1 - log_ratio"),
    ),
    *planted("optimization/control.py", "test_optimization.py -k 'adapt'",
        ("adaptive beta of the wrong sign", "(1 + rate * ((kl", "(1 - rate * ((kl"),
        ("adaptive beta without its limit", ".clamp(-0.2, 0.2))", ")"),
        ("adaptive beta limited on one side only", ".clamp(-0.2, 0.2)", ".clamp(max=0.2)"),
        ("adaptive beta by the absolute error", "((kl - target) / target)", "(kl - target)"),
    ),
    # Objectives: the policy gradient and its ratio -------------------------------------------------------------------
    *planted("optimization/policy.py", "test_optimization.py -k 'polic or surrogate or clip or advantages'",
        ("policy gradient ascends the loss", "return -_per_token(", "return _per_token("),
        ("policy gradient: advantages not detached", "-_per_token(advantages, logprobs).detach() *", "-_per_token(advantages, logprobs) *"),
        ("clip sides swapped", "clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)"),
        ("clip high only", "clamp(1 - clip_low, 1 + clip_high)", "clamp(max=1 + clip_high)"),
        ("clip: max in place of min", "-torch.minimum(", "-torch.maximum("),
        ("clip: no min with the plain ratio", "-torch.minimum(ratio * advantages, clipped * advantages)", "-clipped * advantages"),
        ("clip: ratio upside down", "(logprobs - old_logprobs.detach())", "(old_logprobs.detach() - logprobs)"),
        ("clip: old log-probabilities not detached", "old_logprobs.detach()).exp()", "old_logprobs).exp()"),
        ("clip: advantages not detached", "    advantages = _per_token(advantages, logprobs).detach()\n", "    advantages = _per_token(advantages, logprobs)\n"),
        ("is_clipped whatever the sign of the advantage", "(ratio > 1 + clip_high) & (advantages > 0)", "ratio > 1 + clip_high"),
        ("is_clipped with the sides swapped", "(ratio < 1 - clip_low)", "(ratio < 1 - clip_high)"),
    ),
    *planted("optimization/policy.py", "test_optimization.py -k 'dual'",
        ("dual clip missing", ".exp().clamp(max=clip_dual)", ".exp()"),
        ("dual clip cuts at 1 / clip_dual too", "clamp(max=clip_dual)", "clamp(1 / clip_dual, clip_dual)"),
    ),
    *planted("optimization/ratio.py", "test_optimization.py -k 'gspo or cispo or weighted'",
        ("gspo: sum in place of mean", "sequence_mean(x, mask)[:, None]", "(sequence_mean(x, mask) * mask.sum(-1))[:, None]"),
        ("gspo: mean over the padding too", "sequence_mean(x, mask)[:, None]", "x.mean(-1)[:, None]"),
        ("gspo: clip sides swapped", 'mean, old_mean, advantages, clip_low=clip_low, clip_high=clip_high', 'mean, old_mean, advantages, clip_low=clip_high, clip_high=clip_low'),
        ("cispo: weight not detached", "return weight * policy_gradient_loss(logprobs, advantages)",
         "return -(logprobs - old_logprobs).exp().clamp(1 - clip_low, 1 + clip_high) * advantages.detach() * logprobs"),
        ("cispo: weight not limited", ".exp().clamp(1 - clip_low, 1 + clip_high)", ".exp()"),
        ("cispo: limits swapped", ".clamp(1 - clip_low, 1 + clip_high)", ".clamp(1 - clip_high, 1 + clip_low)"),
        ("cispo: no weight at all", "return weight * policy_gradient_loss", "return policy_gradient_loss"),
        ("weighted KL: ratio not differentiated", "(logprobs - old_logprobs.detach()).exp() * kl", "(logprobs - old_logprobs).detach().exp() * kl"),
        ("weighted KL: old log-probabilities not detached", "- old_logprobs.detach()).exp() * kl", "- old_logprobs).exp() * kl"),
        ("weighted KL without the weight", "return (logprobs - old_logprobs.detach()).exp() * kl", "return kl"),
    ),
    # Objectives: preferences -----------------------------------------------------------------------------------------
    *planted("optimization/preference.py", "test_optimization.py -k 'bradley or dpo or implicit or pair or rank or wins'",
        ("margin of the wrong sign", "rejected - margin)", "rejected + margin)"),
        ("chosen and rejected swapped in Bradley-Terry", "logsigmoid(chosen - rejected -", "logsigmoid(rejected - chosen -"),
        ("sigmoid then log, which overflows", "-logsigmoid(chosen - rejected - margin)", "-(chosen - rejected - margin).sigmoid().log()"),
        ("implicit reward without beta", "return beta * (logprob - ref_logprob)", "return logprob - ref_logprob"),
        ("implicit reward: beta on the policy's side only", "beta * (logprob - ref_logprob)", "beta * logprob - ref_logprob"),
        ("dpo: references swapped", 'implicit_reward(chosen, ref_chosen, beta=beta),\n        implicit_reward(rejected, ref_rejected, beta=beta),',
         'implicit_reward(chosen, ref_rejected, beta=beta),\n        implicit_reward(rejected, ref_chosen, beta=beta),'),
        ("ranked pairs: ties count", "> grouped[:, None, :]", ">= grouped[:, None, :]"),
        ("ranked pairs: the lower reward wins", "> grouped[:, None, :]", "< grouped[:, None, :]"),
        ("pairwise loss over all cells, not pairs", "/ pairs.sum((1, 2)).clamp(min=1)", "/ group_size**2"),
        ("pairwise loss of a group without pairs divides by 0", "pairs.sum((1, 2)).clamp(min=1)", "pairs.sum((1, 2))"),
    ),
    *planted("optimization/preference.py", "test_optimization.py -k 'center'",
        ("centering pulls the scores together", "(chosen + rejected).square()", "(chosen - rejected).square()"),
        ("centering to the first power", "(chosen + rejected).square()", "(chosen + rejected).abs()"),
    ),
    *planted("optimization/preference_variants.py", "test_optimization.py -k 'hinge or conserv or robust or smooth or ipo or simpo'",
        ("hinge of the wrong sign", "(1 - (chosen - rejected)).relu()", "(1 + (chosen - rejected)).relu()"),
        ("hinge at 0, not 1", "(1 - (chosen - rejected)).relu()", "(rejected - chosen).relu()"),
        ("hinge that never rests", "(1 - (chosen - rejected)).relu()", "1 - (chosen - rejected)"),
        ("label smoothing silently ignored", ') + label_smoothing * bradley_terry_loss(rejected, chosen)', ') + label_smoothing * bradley_terry_loss(chosen, rejected)'),
        ("label smoothing takes eps for 1 - eps", "return (1 - label_smoothing) * bradley", "return (1 + label_smoothing) * bradley"),
        ("robust without its 1 / (1 - 2 eps)", " / (1 - 2 * label_smoothing)", ""),
        ("robust that smooths", "correct - label_smoothing * flipped", "correct + label_smoothing * flipped"),
        ("ipo: 1 / beta in place of 1 / (2 beta)", "1 / (2 * beta)).square()", "1 / beta).square()"),
        ("ipo: beta / 2 in place of 1 / (2 beta)", "1 / (2 * beta)).square()", "beta / 2).square()"),
        ("ipo: reference of the wrong sign", "(chosen - rejected) - (ref_chosen", "(chosen - rejected) + (ref_chosen"),
        ("simpo: margin of the wrong sign", "margin=gamma)", "margin=-gamma)"),
        ("simpo: margin times beta", "margin=gamma)", "margin=beta * gamma)"),
        ("simpo without beta", "bradley_terry_loss(beta * chosen, beta * rejected,", "bradley_terry_loss(chosen, rejected,"),
    ),
    *planted("optimization/preference_variants.py", "test_optimization.py -k 'odds or orpo or log1m'",
        ("odds ratio without the log1mexp", "chosen - _log1mexp(chosen), rejected - _log1mexp(rejected)", "chosen, rejected"),
        ("odds ratio: p (1 - p)", "chosen - _log1mexp(chosen), rejected - _log1mexp", "chosen + _log1mexp(chosen), rejected + _log1mexp"),
        ("log1mexp is infinite at 0", "    x = x.clamp(max=-torch.finfo(x.dtype).eps)\n", ""),
        ("log1mexp on the wrong branch loses its digits", "torch.where(x > -0.693,", "torch.where(x < -0.693,"),
    ),
    *planted("optimization/preference_variants.py", "test_optimization.py -k 'kto'",
        ("kto: reference point of the wrong sign", "ref_logprob + kl.detach()", "ref_logprob - kl.detach()"),
        ("kto: reference point differentiated", "ref_logprob + kl.detach()", "ref_logprob + kl"),
        ("kto: desirable and undesirable swapped", "torch.where(desirable, -lead, lead)", "torch.where(desirable, lead, -lead)"),
        ("kto: log sigmoid in place of 1 - sigmoid", "torch.where(desirable, -lead, lead).sigmoid()", "torch.where(desirable, -lead, lead).exp().log1p()"),
    ),
    # Advantages ------------------------------------------------------------------------------------------------------
    *planted("optimization/advantages.py", "test_optimization.py -k 'advantage or group or leave or reward'",
        ("group advantages: mean of the batch", "grouped = rewards.view(-1, group_size)  #", "grouped = rewards.view(1, -1)  #"),
        ("group advantages: groups interleaved", "grouped = rewards.view(-1, group_size)  #", "grouped = rewards.view(group_size, -1).T  #"),
        ("group advantages: NaN counts as 0", "grouped = rewards.view(-1, group_size)  #", "grouped = rewards.view(-1, group_size).nan_to_num()  #"),
        ("group advantages: NaN counts in the mean", "count = scored.sum(1, keepdim=True)", "count = scored.long().sum(1, keepdim=True).clamp(min=group_size)"),
        ("group advantages: biased deviation", "keepdim=True) / (count - 1).clamp(min=1)", "keepdim=True) / count.clamp(min=1)"),
        ("group advantages: epsilon of 1e-8", "advantages = advantages / (variance.sqrt() + 1e-4)", "advantages = advantages / (variance.sqrt() + 1e-8)"),
        ("group advantages: epsilon under the root", "advantages = advantages / (variance.sqrt() + 1e-4)", "advantages = advantages / (variance + 1e-4).sqrt()"),
        ("group advantages: always normalized", "    if normalize:", "    if True:"),
        ("constant rewards no longer exactly zero", "anchor = grouped.nan_to_num(-torch.inf).amax(1, keepdim=True)", "anchor = torch.zeros_like(grouped[:, :1])"),
        ("leave-one-out without G / (G - 1)", " * (count / (count - 1).clamp(min=1))", ""),
    ),
    *planted("optimization/advantages.py", "test_optimization.py -k 'leave or known or unknown or scale'",
        ("leave-one-out counts the unknown rewards", "* (count / (count - 1).clamp(min=1))", "* (group_size / (group_size - 1))"),
        ("batch scale: biased deviation", "((~rewards.isnan()).sum() - 1).clamp(min=1)", "(~rewards.isnan()).sum().clamp(min=1)"),
        ("batch scale: unknown rewards count", "((~rewards.isnan()).sum() - 1).clamp(min=1)", "(len(rewards) - 1)"),
        ("batch scale: deviation of the advantages", "centered = group_advantages(rewards, len(rewards))", "centered = advantages"),
        ("batch scale: no epsilon", "return advantages / (variance.sqrt() + 1e-4)", "return advantages / variance.sqrt()"),
    ),
    # The critic ------------------------------------------------------------------------------------------------------
    *planted("optimization/value.py", "test_optimization.py -k 'gae or critic'",
        ("gae: gamma forgotten in delta", "rewards[:, t] + gamma * next_value", "rewards[:, t] + next_value"),
        ("gae: gamma forgotten in the trace", "delta + gamma * lam * next_advantage", "delta + lam * next_advantage"),
        ("gae: lambda forgotten", "delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
        ("gae bootstraps past the end", "next_value = next_advantage = torch.zeros_like(values[:, 0])",
         "next_value, next_advantage = values[:, -1], torch.zeros_like(values[:, 0])"),
        ("gae: value of a masked token leaks in", "next_value = torch.where(real, values[:, t], next_value)", "next_value = values[:, t]"),
        ("gae: the trace stops at a masked token", "next_advantage = torch.where(real, advantage, next_advantage)",
         "next_advantage = torch.where(real, advantage, 0.0)"),
        ("gae: advantages outside the mask", "advantages[:, t] = torch.where(real, advantage, 0.0)", "advantages[:, t] = advantage"),
        ("gae: returns are the advantages", "torch.where(mask, advantages + values, 0.0)", "torch.where(mask, advantages, 0.0)"),
    ),
    *planted("optimization/value.py", "test_optimization.py -k 'value or variance'",
        ("value loss: min in place of max", "torch.maximum((values - returns)", "torch.minimum((values - returns)"),
        ("value loss without its half", "(clipped - returns).square()) / 2", "(clipped - returns).square())"),
        ("value loss clips the value, not its step", "old_values + (values - old_values).clamp(-clip, clip)", "values.clamp(-clip, clip)"),
        ("explained variance counts a shift", "torch.where(mask, x - x.sum() / count, 0.0)", "torch.where(mask, x, 0.0)"),
        ("explained variance upside down", "1 - error / spread", "1 - spread / error"),
    ),
    # Reductions ------------------------------------------------------------------------------------------------------
    *planted("optimization/reduce.py", "test_optimization.py -k 'mean or reduc or real or masked'",
        ("token_mean ignores the total", "total = mask.sum() if total is None else torch.as_tensor(total, device=x.device)", "total = mask.sum()"),
        ("token_mean is a mean of sequence means", "sequence_sum(x, mask).sum() / total.clamp(min=1)", "sequence_mean(x, mask).mean()"),
        ("token_mean of nothing is NaN", "/ total.clamp(min=1)", "/ total"),
        ("mask ignored in sums", "torch.where(mask, x, 0.0).sum(-1)", "x.sum(-1)"),
        ("mask multiplied, so padding's NaN spreads", "torch.where(mask, x, 0.0).sum(-1)", "(x * mask).sum(-1)"),
        ("sequence_mean divides by the padded width", "/ mask.sum(-1).clamp(min=1)", "/ mask.shape[-1]"),
    ),
    *planted("optimization/normalize.py", "test_optimization.py -k 'whiten or scale or unit'",
        ("whiten puts the mean back", "return centered * scale", "return centered * scale + token_mean(x, mask)"),
        ("whiten: biased variance", "/ (count - 1).clamp(min=1)", "/ count.clamp(min=1)"),
        ("whiten: padding counts", "centered = torch.where(mask, anchored - token_mean(anchored, mask), 0.0)", "centered = anchored - token_mean(anchored, mask)"),
        ("whiten: equal numbers no longer exactly zero", "anchored = torch.where(mask, x - torch.where(mask, x, -torch.inf).amax(), 0.0)", "anchored = torch.where(mask, x, 0.0)"),
        ("whiten divides by the variance", "(variance + 1e-8).rsqrt()", "1 / (variance + 1e-8)"),
        ("rewards are shifted as they are scaled", "return torch.where(mask, x, 0.0) *", "return _centered(x, mask)[0] *"),
    ),
    # Reward signals --------------------------------------------------------------------------------------------------
    *planted("rewards/shaping.py", "test_rewards.py -k 'charge or token or likely or last'",
        ("score on the first token", "torch.where(mask, column, -1).amax(1, keepdim=True)", "mask.long().argmax(1, keepdim=True)"),
        ("score one after the last token", "column == last,", "column == last + 1,"),
        ("score where holes in the mask are not seen", "torch.where(mask, column, -1).amax(1, keepdim=True)", "mask.sum(1, keepdim=True) - 1"),
        ("score on every token", "torch.where(column == last, scores[:, None], 0.0)", "scores[:, None].expand_as(kl)"),
        ("KL charge of the wrong sign", "paid - beta * kl", "paid + beta * kl"),
        ("KL charge on the last token only", "paid - beta * kl", "paid - beta * torch.where(column == last, kl, 0.0)"),
        ("KL charged outside the mask", "return torch.where(mask, paid - beta * kl, 0.0)", "return paid - beta * kl"),
    ),
    *planted("rewards/overlong.py", "test_recipes.py -k overlong",
        ("overlong penalty is a bonus", "return -(lengths", "return (lengths"),
        ("overlong penalty begins at the limit", "lengths - (longest - buffer)", "lengths - longest"),
        ("overlong penalty in tokens", ".clamp(min=0) / buffer", ".clamp(min=0)"),
    ),
    *planted("rewards/reward.py", "test_rewards.py -k 'weight or opinion'",
        ("weights of rewards ignored", "weights * stacked, 0.0)", "stacked, 0.0)"),
        ("no opinion is a reward of 0", "counts.any(0), torch.where(scored, weights * stacked, 0.0).sum(0), torch.nan", "counts.any(0), torch.where(scored, weights * stacked, 0.0).sum(0), 0.0"),
        ("one reward without an opinion silences all", "torch.where(scored, weights * stacked, 0.0).sum(0)", "(weights * stacked).sum(0)"),
        ("a reward of weight 0 is an opinion", "scored & (weights != 0)", "scored"),
    ),
    *planted("rewards/functions.py", "test_hostile_functions.py -k 'changing or retry or skipping or failed'",
        ("what a function is given is not its own", "copy.deepcopy(row.get(name))", "row.get(name)"),
        ("a failed call's numbers count", "partial(_log, logged)", "partial(_log, self.logged)"),
        ("a failure is a score of 0", "failed, values = 0, 0, [math.nan] * count", "failed, values = 0, 0, [0.0] * count"),
        ("skipping a group skips all", "values[start : start + size] = self._call(rollouts, start, start + size)", "values = values")),
    *planted("rewards/guard.py", "test_hostile_functions.py -k 'hangs or everything or alarm or live'",
        ("what is out of time can be swallowed", "class OutOfTime(BaseException)", "class OutOfTime(Exception)"),
        ("the alarm rings once", "signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)", "signal.setitimer(signal.ITIMER_REAL, seconds)"),
        ("the alarm is left on", "signal.setitimer(signal.ITIMER_REAL, 0)", "pass"),
        ("the live line is drawn into the ear", "self.rich_proxied_file =", "self.proxied_file =")),
    *planted("rewards/confined.py", "test_code_reward.py -k 'share or network or bomb or rights or outside or killing or files or environment or count or sees'",
        ("code has the network", "NEWPID | NEWNET | (", "NEWPID | ("),
        ("code sees the machine's files", "os.chroot(folder)", "os.chdir(folder)"),
        ("what code sees it can write", "else READ_ONLY | NO_SUID", "else NO_SUID"),
        ("code stays root", "        os.setresuid(number, number, number)\n", ""),
        ("processes are not limited", "\"NPROC\": job[\"processes\"]", "\"NPROC\": 4000"),
        ("all programs are one user", "61184 + outside % 4000", "61184"),
        ("code inherits the environment", "*program], environment)", "*program], os.environ | {\"HOME\": \"/root\", \"A\": \"secret\"})"),
        ("what ends early has passed", "except BaseException:\n    os._exit(1)", "except BaseException:\n    names[\"add\"] = lambda a, b: a + b")),
    *planted("rewards/judge.py", "test_judge.py -k 'wrong or retry or half or key or place or opinion or filled'",
        ("the key is repeated", "return line.replace(self.key, \"(the key)\") if self.key else line", "return line"),
        ("Retry-After is not kept to", "while (wait := self.resume - time.monotonic()) > 0:", "while (wait := 0.0) > 0:"),
        ("an answer may take its time", "timeout=self.timeout, largest", "timeout=1e9, largest"),
        ("an answer may be of any length", 'client, how, self.url, what, body, timeout=self.timeout, largest=LARGEST', 'client, how, self.url, what, body, timeout=self.timeout, largest=1 << 60'),
        ("a score beyond the scale counts", "if 0 <= score <= 10 else", "if score == score else"),
        ("the first score counts", "return matched[-1] if", "return matched[0] if")),
    *planted("rewards/pairwise.py", "test_judge.py -k 'comparisons or everybody or win or place'",
        ("a tie is a defeat", "won[j] + 1 - share", "won[j] + (share == 0)"),
        ("one place is favored", "(i, (i + step) % group_size)", "tuple(sorted((i, (i + step) % group_size)))")),
    *planted("rewards/functions.py", "test_rewards.py -k 'columns or row or ids'",
        ("columns tiled, not repeated", "[row for row in rollouts.rows for _ in range(size)]", "[row for _ in range(size) for row in rollouts.rows]"),
        ("completion ids with their padding", "row[:n] for row, n", "row for row, n"),
    ),
    # Steps that go wrong ---------------------------------------------------------------------------------------------
    *planted("step/optimizer.py", "test_rescue.py -k 'without_the_step or lower'",
        ("a step that is not finite is taken", "if math.isfinite(norm):", "if True:"),
        ("the schedule goes on over a skipped step", "            self.skipped += 1\n", "            self.skipped += 1\n            self.schedule.step()\n")),
    *planted("step/optimizer.py", "test_rescue.py -k 'is_replayed and grpo'",
        ("a replay names no parameters", "self.bad = self._not_finite() or self.bad", "pass"),
    ),
    *planted("step/optimizer.py", "test_rescue.py -k 'names_what'",
        ("a replay names parameters that are finite", "strict=True) if n]", "strict=True)]"),
    ),
    *planted("runner/replay.py", "test_ranks.py -k 'is_replayed and grpo'",
        ("a step of several processes is replayed by each alone", "join_group(config) if started_by_torchrun() else nullcontext(OneProcess())", "nullcontext(OneProcess())"),
    ),
    *planted("distributed/ranks.py", "test_ranks.py -k 'is_replayed and grpo'",
        ("a replay counts the shards of one process", "return self.total(counts).tolist()", "return counts.tolist()"),
    ),
    *planted("runner/rescue.py", "test_ranks.py -k 'is_replayed and grpo'",
        ("a step of several processes is not kept", "if self.in_a_row == 1 else", "if self.in_a_row == 1 and self.run.devices.size == 1 else"),
    ),
    *planted("store/checkpoints.py", "test_rescue.py -k 'nothing_and_is_replayed and grpo or lower'",
        ("a step is replayed with the noise after it", 'self.before["random"] if beginning', 'self.before["random"] if False')),
    *planted("step/optimizer.py", "test_rescue.py -k 'lower'",
        ("a resumed run keeps the old learning rate", "        self.schedule.base_lrs = base\n", "        base = self.schedule.base_lrs\n")),
    *planted("runner/rescue.py", "test_rescue.py -k 'too_many or second_epoch or three'",
        ("skipped steps in a row are never enough", 'if (\n            self.in_a_row == self.run.config.max_skipped_steps\n            or self.in_a_row == step == self.run.steps\n        ):', 'if False or self.in_a_row == step == self.run.steps:'),
        ("skipped steps are not counted in a row", "            self.in_a_row = 0\n", "            pass\n"),
        ("weights that moved pass for the step's beginning", 'if (\n        done\n        and checkpoints.untouched\n        and run.devices.first(lambda: last not in steps(checkpoints.folder))\n    ):', 'if done and run.devices.first(lambda: last not in steps(checkpoints.folder)):')),
    # Samples of another engine --------------------------------------------------------------------------------------
    *planted("optimization/policy.py", "test_servers.py -k importance",
        ("importance weights: upside down", "return (logprobs - sampler_logprobs).detach()", "return (sampler_logprobs - logprobs).detach()"),
        ("importance weights: not cut", ".detach().exp().clamp(max=cap)", ".detach().exp()"),
        ("importance weights: differentiated", "return (logprobs - sampler_logprobs).detach()", "return (logprobs - sampler_logprobs)")),
    *planted("recipes/grpo.py", "test_servers.py -k cap_acts",
        ("importance weights: not used by grpo", "objective.mean(trace.weights(rows, old) * loss,", "objective.mean(loss,")),
    *planted("recipes/ppo.py", "test_servers.py -k cap_acts",
        ("importance weights: not used by ppo", "token_mean(trace.weights(rows, old) * loss, part.mask, total=total)", "token_mean(loss, part.mask, total=total)")),
    *planted("step/trace.py", "test_servers.py -k cap_acts",
        ("importance weights: a trace ignores them", "if self.sampler is None:", "if True:")),
    *planted("step/trace.py", "test_ranks_servers.py -k 'give_one and options1'",
        ("importance weights: those of other rows", "self.sampler[rows], cap", "self.sampler[: len(rows)], cap")),
    *planted("step/run.py", "test_servers.py -k cap_acts",
        ("importance weights: a trace is not told of the sampler", 'if given.versions and (cap :=', 'if False and (cap :=')),
    *planted("generation/vllm.py", "test_servers.py -k 'in_part or temperature_that or back_with_old'",
        ("the probe is never failed", "if not (self.difference if self.exact else average) <= self.tolerance:", "if False:")),
    *planted("generation/server.py", "test_servers.py -k 'weights_are_sent'",
        ("weights that have changed are not sent", "if (current := fingerprint(policy)) != self.fingerprint:", "if (current := fingerprint(policy)) != self.fingerprint and not self.fingerprint:")),
    # The forward: shift, positions, attention ------------------------------------------------------------------------
    *planted("model/attention.py", "test_forward.py -k 'one_sequence_at_a_time'",
        ("next-token shift: predicts itself", "completion_column == 0, prompt_end, completion_start[:, None] + completion_column - 1", "completion_column == 0, prompt_end, completion_start[:, None] + completion_column"),
        ("next-token shift: first token from the token before the prompt's last", "(before_start + before - 1)[:, None]", "(before_start + before - 2).clamp(min=0)[:, None]"),
        ("positions restart for completions", "completion_position = (before[:, None] + completion_column)[", "completion_position = completion_column["),
        ("positions start at the padded width", "completion_position = (before[:, None] + completion_column)[", "completion_position = (groups.prompts.shape[1] + completion_column)["),
        ("no causal mask among a completion's tokens", "behind = self.where[:, :, None] -",
         "behind = torch.where(self.where[:, :1] > 0, self.where.masked_fill(~self.real, 0).amax(1, keepdim=True), self.where)[:, :, None] -"),
        ("a completion does not see itself", "hidden = behind < 0 if", "hidden = (behind < 0) | (behind == 0) & (self.where[:, :, None] > 0) if"),
        ("no causal mask in prompts", "behind = self.where[:, :, None] -",
         "behind = torch.where(self.where[:, :1] == 0, self.where.masked_fill(~self.real, 0).amax(1, keepdim=True), self.where)[:, :, None] -"),
        ("a completion sees its sibling's prompt", '[\n                before_start,\n                completion_start,', '[\n                prompt_start.repeat(size),\n                completion_start,'),
        ("a completion's first key is what follows its prompt in the packed row", 'torch.where(\n            column < prompt,', "torch.where(column <= prompt,"),
        ("packed rows stay in the order of the blocks", ".index_select(0, self.place)[None]", "[None]"),
        ("packed rows by the inverse order", "self.query_index[real].argsort()", "self.query_index[real]"),
        ("gradient of the keys lost", "(k, self.key_index, keys),", "(k.detach(), self.key_index, keys),"),
        ("gradient of prompts' values lost where completions share them", "(v, self.key_index, keys),",
         "(torch.cat([v[:, :, : int(self.key_index.bincount().argmin())].detach(), v[:, :, int(self.key_index.bincount().argmin()) :]], 2), self.key_index, keys),"),
        ("scale of attention forgotten", "q = (query * (scale or width**-0.5))", "q = query"),
        ("query heads share the keys of others", "(query * (scale or width**-0.5)).reshape(",
         "(query * (scale or width**-0.5)).unflatten(1, (-1, groups)).transpose(1, 2).reshape("),
    ),
    *planted("model/attention.py", "test_layouts.py -k blocks_of_any_size",
        ("padding of a block's keys is seen", "hidden = behind < 0 if",
         "hidden = (behind < 0) & (behind >= self.where[:, :, None] - self.where.masked_fill(~self.real, 0).amax(1, keepdim=True)[:, :, None]) if"),
        ("padded queries of a block count as real", ".nonzero()[:, 0]", ".new_ones(len(self.asked)).nonzero()[:, 0]"),
    ),
    *planted("model/attention.py", "test_forward.py -k 'padding_amount'",
        ("padding of the prompt counts as real", "groups.prompt_mask.cumsum(1) - 1",
         "torch.ones_like(groups.prompts).cumsum(1) - 1"),
    ),
    *planted("model/attention.py", "test_forward.py -k 'sliding'",
        ("sliding window off by one in prompts", "(behind >= window)", "(behind >= window + (self.where[:, :1, None] == 0))"),
        ("sliding window off by one in completions", "(behind >= window)", "(behind >= window + (self.where[:, :1, None] > 0))"),
        ("sliding window counts from the completion's start", "(behind >= window)", "(behind - self.where[:, :1, None] >= window)"),
        ("sliding window lets queries see ahead", "else (behind < 0) | (behind >= window)", "else behind >= window"),
    ),
    *planted("model/attention.py", "test_forward.py -k 'scores'",
        ("score read one token early", "completion > 0, completion_start + completion - 1, prompt_end[:, 0]", "completion > 0, completion_start + completion - 2, prompt_end[:, 0]"),
    ),
    *planted("model/forward.py", "test_forward.py -k 'one_sequence or cannot_share or scores or learned'",
        ("plain rows: next-token shift twice", "before = (start + prompt)[:, None] + completion_column - 1", "before = (start + prompt)[:, None] + completion_column - 2"),
        ("plain rows: score at the first token", "start + real.sum(1) - 1", "start"),
        ("plain rows: score at the padded end", "start + real.sum(1) - 1", "start + ids.shape[1] - 1"),
        ("plain rows: padding first", "(~real).long().argsort(", "real.long().argsort("),
        ("plain rows: mask of the rows before they were sorted", "real.gather(1, order).long()", "real.long()"),
        ("microbatches come back in their own order", "[torch.cat(rows).argsort()]", ""),
        ("microbatches come back by the inverse order", "[torch.cat(rows).argsort()]", "[torch.cat(rows)]"),
        ("tokens not learned get a number", "targets = model.get_output_embeddings(), groups.completions[groups.mask]",
         "targets = model.get_output_embeddings(), groups.completions[groups.mask] * 0 + groups.completions[0, 0]"),
    ),
    *planted("model/forward.py", "test_forward.py -k cannot_share",
        ("plain rows: no temperature", "torch.promote_types(logits.dtype, torch.float32)) / temperature", "torch.promote_types(logits.dtype, torch.float32))"),
    ),
    *planted("model/logprobs.py", "test_forward.py -k 'chunked or one_sequence'",
        ("temperature not applied in training", "targets, 1.0 / temperature)", "targets, 1.0)"),
        ("temperature upside down", "targets, 1.0 / temperature)", "targets, temperature)"),
        ("temperature forgotten in the gradient", "(-ctx.sharpness * grads[0])", "(-grads[0])"),
        ("normalizer of the last chunk only", "lse = torch.logaddexp(lse, logits.sub_(top)", "lse = torch.logaddexp(lse - torch.inf, logits.sub_(top)"),
        ("gradient of the softmax alone", 'slope = logits.sub_(lse).exp_().scatter_add_(1, column, -here.to(lse.dtype))', 'slope = logits.sub_(lse).exp_()'),
        ("bias forgotten where the softmax is made again", 'hidden, weight, bias, targets, ctx.sharpness, kept', 'hidden, weight, None, targets, ctx.sharpness, kept'),
        ("temperature forgotten where the softmax is made again", 'for start, _, logits, here, column in _chunks(\n            hidden, weight, bias, targets, ctx.sharpness, kept\n        ):', 'for start, _, logits, here, column in _chunks(hidden, weight, bias, targets, 1.0, kept):'),
        ("kept logits of another chunk", "product = kept[i] if", "product = kept[i - i % 2] if"),
        ("gradient of the hidden states from one chunk only", "grad_hidden += slope @", "grad_hidden = slope @"),
        ("gradient of the hidden states without what came from above", "return (grad_hidden * scale).to(", "return grad_hidden.to("),
        ("target's logit of the last chunk only", "picked = torch.where(here, logits.gather(1, column), picked)", "picked = logits.gather(1, column)"),
    ),
    *planted("model/scalar.py", "test_forward.py -k 'scores'",
        ("reward model scores the first token", "hidden.index_select(0, last)", "hidden.index_select(0, 0 * last)"),
        ("reward model scores the token before EOS", "hidden.index_select(0, last)", "hidden.index_select(0, last - 1)"),
        ("critic values the state after the token", "hidden.index_select(0, before)", "hidden.index_select(0, before + 1)"),
    ),
    # What a run leaves, and goes on from -----------------------------------------------------------------------------
    *planted("step/metrics.py", "test_record.py -k 'means'",
        ("a mean counts what is not known", "mask & ~x.isnan()", "mask"),
        ("a mean over the whole tensor", "return torch.where(counted, x, 0).sum(), counted.sum()", "return torch.where(counted, x, 0).sum(), torch.tensor(x.numel())"),
    ),
    *planted("store/record.py", "test_record.py -k 'agree or gradient or charge or both or whole'",
        ("tokens: the ratio upside down", '(numbers["logprob"] - numbers.pop("old_logprob")).exp()', '(numbers.pop("old_logprob") - numbers["logprob"]).exp()'),
        ("tokens: KL of the wrong sign", 'numbers["kl"] = numbers["logprob"] - numbers["ref_logprob"]', 'numbers["kl"] = numbers["ref_logprob"] - numbers["logprob"]'),
    ),
    *planted("recipes/on_policy.py", "test_record.py -k 'gradient_of_grpo'",
        ("tokens: the gradient pushes the other way", '"gradient": -trace.slope', '"gradient": trace.slope'),
    ),
    *planted("recipes/dpo.py", "test_record.py -k 'both_sides'",
        ("tokens: the gradient of dpo pushes the other way", '"gradient": -trace.slope', '"gradient": trace.slope'),
        ("tokens: chosen and rejected swapped in the record", '"chosen": chosen}', '"chosen": ~chosen}'),
    ),
    *planted("step/trace.py", "test_record.py -k 'gradient_of_grpo'",
        ("trace: the slope is not recorded", "logprobs.register_hook(partial(self._keep_slope, rows))", "pass"),
    ),
    *planted("step/trace.py", "test_record.py -k 'agree or both_sides or gradient_of'",
        ("trace: the slope of other rows", "self.slope[rows] = slope", "self.slope[: len(rows)] = slope"),
        ("trace: the last pass is not recorded", "self.latest[rows] = logprobs.detach()", "pass"),
    ),
    *planted("timing.py", "test_record.py -k 'clock'",
        ("a part inside another one counts twice", 'if clock is None or clock.part not in ("other", "backward"):', 'if clock is None:'),
        ("what follows a forward pass is not backward", 'clock.part = "backward"', 'clock.part = "other"'),
    ),
    *planted("model/lean.py", "test_lean.py",
        ("lean: the norm's gradient without the mean's", "grad.sub_(normed.mul_(mean)).mul_(scale)", "grad.mul_(scale)"),
        ("lean: the norm's weight has the gradient of one row", "(grad * normed).flatten(0, -2).sum(0)", "(grad * normed).flatten(0, -2)[0]"),
        ("lean: gate's gradient without up", "silu_backward(grad * up, gate)", "silu_backward(grad, gate)"),
        ("lean: up's gradient without silu", "grad * opened, grad_weight", "grad * gate, grad_weight"),
        ("lean: the product made again is half of it", "opened * up, weight, 2)", "opened, weight, 2)"),
        ("lean: a gated layer's weight has no gradient", "grad * opened, grad_weight", "grad * opened, None"),
        ("lean: the cast of a weight is kept", "ctx.save_for_backward(x, weight)\n        return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))", "weight = weight.to(x.dtype)\n        ctx.save_for_backward(x, weight)\n        return linear(x, weight, None if bias is None else bias.to(x.dtype))"),
        ("lean: a bias has the gradient of one row", "grads[0].flatten(0, -2).sum(0)", "grads[0].flatten(0, -2)[0]"),
        ("lean: the weight's gradient of one sequence", "(grad.flatten(0, -2).t() @ x.flatten(0, -2))", "(grad[0].t() @ x[0])"),
        ("lean: a cast for each product", "narrow = x._narrow = x.to(", "narrow = x.to("),
        ("lean: what only looks alike is replaced", "lean if torch.equal(lean(module, x), module(x)) else None", "lean"),
        ("lean: without gradients no up", "return down(silu(gate) * up)", "return down(silu(gate))"),
    ),
    *planted("store/checkpoints.py", "test_resume.py -k 'same_bits and everything'",
        ("resume: the data begins again", 'run.done = state["step"]\n        restore(run.model', "run.done = 0\n        restore(run.model"),
    ),
    *planted("step/optimizer.py", "test_resume.py -k 'same_bits and everything'",
        ("resume: the optimizer begins again", 'self.adamw.load_state_dict(state["adamw"])', "pass"),
        ("resume: the schedule begins again", "self.schedule.load_state_dict(state)", "pass"),
    ),
    *planted("recipes/ppo_parts.py", "test_resume.py -k 'same_bits and everything'",
        ("resume: the adapted beta begins again", "        self.beta = state\n", "        pass\n"),
    ),
    *planted("store/state.py", "test_resume.py -k 'same_bits and everything'",
        ("resume: the sampler begins again", 'generator.set_state(state["run"])', "pass"),
        ("resume: the critic begins again", "part.load_state_dict(state, strict=False)", "pass"),
    ),
    *planted("store/files.py", "test_durable.py -k 'nothing_gets'",
        ("durable: a file has its name before it is on the disk", "    to_disk(half)\n    half.replace(path)", "    half.replace(path)"),
        ("durable: a new folder's name is not on the disk", "        path.mkdir(exist_ok=True)\n        to_disk(path.parent)", "        path.mkdir(exist_ok=True)"),
    ),
    *planted("store/checkpoints.py", "test_durable.py -k 'nothing_gets'",
        ("durable: a checkpoint is ahead of its record", '*run.glob("*.jsonl"), ', ""),
        ("durable: a checkpoint's name is not on the disk", "half.rename(whole)\n    to_disk(whole.parent)", "half.rename(whole)"),
    ),
    *planted("store/checkpoints.py", "test_durable.py -k 'half_a_tensor'",
        ("durable: half a tensor file passes", "        _require_whole(path)", "        pass"),
    ),
    *planted("store/record.py", "test_durable.py -k 'in_the_middle or resumed_run or can_not_be_written'",
        ("durable: config.toml is written in place", 'write_text(self.out / "config.toml", command + to_toml(self.config))',
         '(self.out / "config.toml").write_text(command + to_toml(self.config), encoding="utf-8")'),
        ("durable: a resumed run that fails at once is undone", "if self.resumed or (", "if ("),
        ("durable: a full disk is a traceback where Rust writes", "rust = isinstance(error, SafetensorError) or type(error) is Exception", "rust = False"),
    ),
    *planted("store/trackers.py", "test_trackers.py -k 'told_each_step_once'",
        ("trackers: a resumed run is another one to wandb", 'options: dict[str, Any] = {\n        "id": identifier,\n        "resume": "allow",\n        "name": out.name,\n        "config": config,\n        "dir": str(out),\n    }', 'options: dict[str, Any] = {"name": out.name, "config": config, "dir": str(out)}'),
        ("trackers: wandb is told what it has", "if line[0] >= run.starting_step:", "if True:"),
    ),
    *planted("store/trackers.py", "test_trackers.py -k 'synced'",
        ("trackers: offline, what was synced gets all steps once more", 'identifier += f"-{sent}"', "pass"),
        ("trackers: offline, a file that a kill cut stays", "            shutil.rmtree(life)", "            pass"),
        ("trackers: what was recorded before is not sent", "    for metrics in recorded:", "    for metrics in []:"),
    ),
    *planted("store/trackers.py", "test_trackers.py -k 'test_tensorboard or mlflow or test_trackio'",
        ("trackers: tensorboard shows a step twice", "purge_step=done + 1", "purge_step=None"),
        ("trackers: mlflow has a step twice", "if line[0] > last:", "if True:"),
        ("trackers: trackio has a step twice", "if line[0] >= following:", "if True:"),
    ),
    *planted("store/record.py", "test_trackers.py -k 'mlflow'",
        ("trackers: a resumed run has another identifier", '("began", "id", "out_of_memory")', '("began", "out_of_memory")'),
    ),
    *planted("runner/resume.py", "test_resume.py -k 'may_not or anew'",
        ("resume: any option may be given anew", "if other := sorted(options.keys() - set(MAY_CHANGE)):", "if other := list[str]():"),
        ("resume: servers in the place of the run's own engine", "if _uses_servers(config) != _uses_servers(before):", "if False:"),
        ("resume: what is given anew is not taken", 'parse_values(type(before), options, "") | {"out": str(out)}', '{"out": str(out)}'),
    ),
    *planted("store/state.py", "test_servers.py -k 'not_yet_used and grpo'",
        ("survive: rollouts not yet used are in no checkpoint", "return batches_to_json(part)", "return None"),
    ),
    *planted("generation/server.py", "test_servers.py -k 'not_yet_used and grpo'",
        ("survive: rollouts of a checkpoint are not used", 'self.kept = {batch["step"]: batch for batch in state}', "self.kept = {}"),
    ),
    *planted("store/shard_files.py", "test_ranks_servers.py -k 'not_yet_used'",
        ("survive: rollouts of a checkpoint in shards are not used", "            part.set_state(kept)\n", "            pass\n"),
    ),
    *planted("distributed/ranks.py", "test_ranks_servers.py -k 'not_yet_used'",
        ("survive: rollouts of a checkpoint are not given to rank 0", "            self.servers.set_state(state)\n", "            pass\n"),
    ),
    *planted("runner/launch.py", "test_servers.py -k 'in_an_evaluation'",
        ("without servers: the sentence promises a step that is not saved", 'to continue" if step == done else where', 'to continue"'),
    ),
    *planted("store/record.py", "test_resume.py -k 'forked or without_locks'",
        ("survive: what was forked holds the lock", "os.register_at_fork(after_in_child=file.close)", "pass"),
        ("survive: a file system without locks is another process", "except BlockingIOError:", "except OSError:"),
    ),
    *planted("runner/resume.py", "test_resume.py -k 'second_time or paths_are'",
        ("survive: a run that goes on is loaded a second time", "    require_free(out)\n", ""),
        ("survive: paths are meant from anywhere", "    require_paths(config, out)\n", ""),
    ),
    *planted("store/fingerprint.py", "test_resume.py -k 'data_that'",
        ("survive: less data is no other data", "    if counts[0] != counts[1]:", "    if False:"),
        ("survive: a row that has changed is not seen", "examples = (*train, *heldout)", "examples = heldout"),
    ),
    *planted("store/fingerprint.py", "test_resume.py -k 'reward_that_has'",
        ("survive: a reward model whose end has changed is not seen", "                file.seek(max(file.tell(), size - END))\n", "                continue\n"),
        ("survive: a reward function that has changed is not seen", '        source', '        name'),
    ),
    *planted("runner/stopping.py", "test_resume.py -k 'signal'",
        ("survive: the end of a terminal kills", 'getattr(signal, "SIGHUP", signal.SIGTERM)', "signal.SIGTERM"),
        ("survive: what was forked hears no signal", "if os.getpid() != own:", "if False:"),
        ("survive: nohup is no help", "if signal.getsignal(number) is not signal.SIG_IGN", "if number"),
    ),
    *planted("report/terminal.py", "test_resume.py -k nobody_needs",
        ("survive: a disk that is full below the log ends the run", "        except OSError:\n", "        except BlockingIOError:\n"),
        ("survive: a pipe that nobody reads ends the run", "    def on_broken_pipe(self)", "    def silenced(self)"),
    ),
    *planted("runner/rescue.py", "test_rescue.py -k only_what",
        ("survive: a replay is named that is not there", "if kept.exists() else", "if kept else"),
    ),
    *planted("runner/launch.py", "test_ranks.py -k killed_ends_all",
        ("survive: a process that was killed is a traceback on another", "    elif is_lost_process(error):", "    elif False:"),
    ),
    *planted("distributed/checkpoints.py", "test_ranks.py -k shards_that",
        ("survive: shards that can't be written are a traceback", "if isinstance(error, dcp.api.CheckpointException):", "if False:"),
    ),
    *planted("data/rows.py", "test_rows.py -k 'twice'",
        ("a key that stands twice is not seen", "if len(row) < len(pairs):", "if False:"),
    ),
    *planted("store/checkpoints.py", "test_resume.py -k 'damaged and flip'",
        ("a flipped bit is not seen", 'if _sha256(folder / name) != facts["sha256"]:', "if False:"),
    ),
    *planted("model/scalar.py", "test_recipes.py -k shared_critic",
        ("critic trains the policy's trunk", "copy.deepcopy(policy.base_model, frozen)", "policy.base_model"),
        ("shared critic has a trunk of its own", "model = _with_head(policy, policy.base_model)", "model = _with_head(policy, copy.deepcopy(policy.base_model))"),
        ("critic starts at random", "    torch.nn.init.zeros_(model.score.weight)\n", ""),
    ),
    *planted("dependencies.py", "test_dependencies.py -k 'untried or nightlies or missing or old'",
        ("versions: any is a tried one", "needed.specifier.contains(installed, prereleases=True)", "True"),
        ("versions: a nightly build is untried", "contains(installed, prereleases=True)", "contains(installed, prereleases=False)"),
        ("versions: the way out for any version is closed", 'os.environ.get(ANY_VERSION) == "1" or', ""),
        ("versions: what an extra needs is not looked for", "except PackageNotFoundError:\n            raise InputError(", "except ZeroDivisionError:\n            raise InputError("),
        ("versions: of an extra nothing is asked", 'not always and needed.marker and needed.marker.evaluate({"extra": extra})', "False"),
    ),
    *planted("cli/early.py", "test_dependencies.py -k 'before_anything'",
        ("early: torch is imported first", "from trivet.runner.checks import check\n", "import torch  # noqa\nfrom trivet.runner.checks import check\n"),
        ("early: what is named and not there waits for torch", "    require_places(config)\n", ""),
        ("early: values are not checked", "    check(config, method)\n", ""),
        ("early: a run without a model waits for torch", "        require_model(config.model and model_folder(config.model))\n", ""),
        ("early: options of resume are not read", 'kind(**parse_values(kind, read_flags(kind, args[1:]), "--"))', "kind()"),
    ),
    *planted("timing.py", "test_record.py -k 'clock or add_up'",
        ("what another clock timed goes to this one", "        _running.reset(self.before)\n", "        pass\n"),
    ),
    *planted("model/weights.py", "test_ranks.py -k 'processes_does_not and sft'",
        ("a pass does not ask for its weights", "if holder is None:", "if True:"),
    ),
    *planted("model/copies.py", "test_lora.py -k 'reference'",
        ("adapters: the reference copies the base", 'copied = copy.deepcopy(\n        model, {id(x): x for x in model.parameters() if not x.requires_grad}\n    ).requires_grad_(False)', 'copied = copy.deepcopy(model, {id(x): x for x in model.parameters() if False}).requires_grad_(\n        False\n    )'),
        ("adapters: the reference shares the adapter", 'copied = copy.deepcopy(\n        model, {id(x): x for x in model.parameters() if not x.requires_grad}\n    ).requires_grad_(False)', 'copied = copy.deepcopy(model, {id(x): x for x in model.parameters()}).requires_grad_(False)'),
        ("adapters: every reference is the base", "if moved and not any(moved):", "if moved:"),
        ("adapters: no reference is the base", "if moved and not any(moved):", "if False:"),
    ),
    *planted("model/scalar.py", "test_lora.py -k 'roles or critic_without'",
        ("adapters: the critic copies the base", "frozen = {id(x): x for x in policy.parameters() if not x.requires_grad}", "frozen = {id(x): x for x in policy.parameters() if False}"),
        ("adapters: the critic shares the policy's adapter", "frozen = {id(x): x for x in policy.parameters() if not x.requires_grad}", "frozen = {id(x): x for x in policy.parameters()}"),
    ),
    *planted("model/adapters.py", "test_lora.py -k 'changes_nothing or gradients or merged_is or targets or together'",
        ("adapters: the head too", 'linear = {\n        n: m\n        for n, m in model.named_modules()\n        if isinstance(m, torch.nn.Linear | Conv1D) and id(m) not in heads\n    }', 'linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}'),
        ("adapters: alpha is not what was asked for", "lora_alpha=alpha or 2 * rank", "lora_alpha=2 * rank"),
        ("adapters: half of the layers", "target_modules=list(targets or names)", "target_modules=list(targets or names[::2])"),
        ("adapters: merged is the base", "            module.merge()\n", "            pass\n"),
        ("adapters: any target is taken", "if not any(f\".{name}\".endswith(f\".{target}\") for name in linear):", "if False:"),
    ),
    *planted("model/adapters.py", "test_lora.py -k 'head or folder or fit or merge_saves or only_adapter'",
        ("adapters: the head is not trained", '*(("score",) if scorer else ())', "*()"),
        ("adapters: names without peft's prefix", '{f"{PREFIX}{name}": x.detach()', '{name: x.detach()'),
        ("adapters: targets in any order", "sorted(value) if isinstance(value, set)", "sorted(value, reverse=True) if isinstance(value, set)"),
        ("adapters: the base is a relative path", "str(Path(base).resolve()) if Path(base).exists() else base\n    return inject", "base\n    return inject"),
        ("adapters: tensors that do not fit are passed over", "if wrong := [*filter(is_adapter_parameter, result.missing_keys), *result.unexpected_keys]:", "if wrong := []:"),
    ),
    *planted("model/adapters.py", "test_lora.py -k 'roles or all_weights or by_itself'",
        ("adapters: the reward model has a base of its own", "if config is None or policy_config is None:", "if True:"),
        ("adapters: the reward model keeps the policy's adapter", "model = without_layers(with_scalar_head(policy))", "model = with_scalar_head(policy)"),
        ("adapters: the critic is the reward model", "copied = copy.deepcopy(model, shared)", "copied = model"),
        ("adapters: the critic copies the reward model's base", "for name, x in model.named_parameters() if not is_adapter_parameter(name)}", "for name, x in ()}"),
        ("adapters: the critic trains its base", "x.requires_grad_(is_adapter_parameter(name))", "x.requires_grad_(True)"),
    ),
    *planted("model/load.py", "test_lora.py -k 'killed or gone_on'",
        ("adapters: a checkpoint's adapter is not taken back", "        read_adapter(model, str(folder))\n", "        pass\n"),
        ("adapters: an adapter to go on with begins anew", "        read_adapter(model, name)\n", "        pass\n"),
    ),
    *planted("model/copies.py", "test_recipes.py -k 'shared_critic or reference or frozen'",
        ("reference is the policy itself", "    return copied\n", "    return model\n"),
        ("reference shares the policy's weights", 'copied = copy.deepcopy(\n        model, {id(x): x for x in model.parameters() if not x.requires_grad}\n    ).requires_grad_(False)', 'copied = copy.deepcopy(model, {id(x): x for x in model.parameters()})'),
    ),
    # Generation ------------------------------------------------------------------------------------------------------
    *planted("generation/sampling.py", "test_sampling.py",
        ("log-probabilities of the distribution without temperature", "return torch.cat(tokens), torch.cat(logprobs)",
         "tokens = torch.cat(tokens); return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]"),
        ("a few rows at a time: the levels of the first", "level.split(rows), strict=True)", "[level[:rows]] * len(logits), strict=False)"),
        ("a few rows at a time: whatever is cut, plain", "draw(x if plain else", "draw(x if True else"),
        ("temperature not applied in the sampler", "else logits / temperature)", "else logits)"),
        ("top-k not normalized again", 'logprobs = (\n            torch.full_like(logprobs, -torch.inf)\n            .scatter(-1, keep, logprobs.gather(-1, keep))\n            .log_softmax(-1)', 'logprobs = torch.full_like(logprobs, -torch.inf).scatter(\n            -1, keep, logprobs.gather(-1, keep)'),
        ("top-p keeps one token too few", "(before >= top_p) & (before > 0)", "(ordered.exp().cumsum(-1) > top_p) & (before > 0)"),
        ("top-p keeps one token too many", "(before >= top_p) & (before > 0)", "(before > top_p) & (before > 0)"),
        ("top-p may keep nothing", "(before >= top_p) & (before > 0)", "before >= top_p"),
        ("top-p cut in the sorted order, not put back", ".gather(-1, order.argsort(-1))", ".gather(-1, order)"),
        ("the sampler can draw what has no mass", "level, right=True)", "level, right=False)"),
        ("draw: always the first stretch", "stretch, level = _search(mass, level)  #",
         "level = _search(mass, level)[1]; stretch = torch.zeros_like(level, dtype=torch.int64)  #"),
        ("draw: level not rescaled inside the stretch", "stretch, level = _search(", "stretch, _ = _search("),
        ("draw: level inside the stretch not a share of it", "+ own) / own).clamp(0, 1)", "+ own).clamp(0, 1))"),
    ),
    *planted("distributed/ranks.py", "test_ranks.py -k 'processes_does_not and sft'",
        ("ranks: the norm of one rank's shards", "self.total(squares[0])", "squares[0]"),
        ("ranks: every rank takes every group", "only=owner == self.rank))", "only=owner >= 0))"),
        ("ranks: metrics of one rank's groups", "self.total(torch.where(mine, rows, 0))", "torch.where(mine, rows, 0)"),
    ),
    *planted("distributed/fsdp.py", "test_ranks.py -k 'processes_does_not and sft'",
        ("ranks: gradients are averaged", "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(2.0)"),
    ),
    *planted("distributed/ranks.py", "test_ranks.py -k 'processes_does_not and pairwise'",
        ("ranks: noise of local rows", "return self._draw()[self.rows[rows]]", "return torch.rand((len(rows), 1), generator=self.generator)"),
        ("ranks: generators drift apart", "        self.generator.set_state(start)\n", ""),
        ("ranks: prompts of another rank", "own = [prompts[p] for p in mine]", "own = prompts[: len(mine)]"),
    ),
    *planted("distributed/fsdp.py", "test_ranks.py -k 'variants and options5'",
        ("ranks: a pass for company teaches", "if self.models.idle and result.requires_grad", "if False"),
    ),
    *planted("distributed/ranks.py", "test_ranks.py -k 'as_one_without_it and grpo'",
        ("ranks: the same noise in every step", "0 if plain else rollouts.logprobs.shape[1]", "0"),
    ),
    *planted("distributed/ranks.py", "test_ranks.py -k 'variants and options0'",
        ("ranks: the head on a shared trunk is not added up", "                self.total(grad)\n", "                pass\n"),
    ),
    *planted("distributed/ranks.py", "test_ranks.py -k 'lengths or noise or said_once'",
        ("ranks: shares by number, not by length", "loads[rank] += lengths[group]", "loads[rank] += 1"),
        ("ranks: every process says why", "ranks.store.add(\"failed\", 1) == 1", "True"),
        ("ranks: a reward's error stays with rank 0", "outcome = None, error\n", "outcome = None, None\n"),
    ),
    *planted("distributed/ranks.py", "test_ranks.py -k 'asks_the_reward'",
        ("ranks: every process asks the reward", 'scores, self.logged = self.ranks.first(\n            lambda: (own(rollouts).cpu(), getattr(own, "logged", {}))\n        )', 'scores, self.logged = own(rollouts).cpu(), getattr(own, "logged", {})'),
    ),
    *planted("step/trace.py", "test_ranks.py -k 'gradient_of_all'",
        ("ranks: the record has the gradient of one rank's tokens", "self.filled[:] = [self.latest, self.slope]", "self.filled[:] = [self.latest]"),
    ),
    *planted("store/shard_files.py", "test_ranks.py -k 'resumes_on'",
        ("shards: without the moments", 'if key != "step"}', "if not key}"),
        ("shards: steps are counted anew", "torch.tensor(float(step), device", "torch.tensor(0.0, device"),
        ("shards: random numbers begin again", "    set_random_state(run.generator, state[\"random\"])\n", ""),
    ),
    *planted("distributed/ranks.py", "test_ranks_servers.py -k 'give_one and options0'",
        ("ranks: versions stay with rank 0", 'ranks.join(part[0] if part else None, rows, prompts, group_size), versions=versions', 'ranks.join(part[0] if part else None, rows, prompts, group_size),\n            versions=versions if part else (),'),
    ),
    *planted("distributed/checkpoints.py", "test_ranks_servers.py -k any_number",
        ("shards: random numbers of the middle of a step", 'random, parts = self.before["random"], parts |', "parts = parts |"),
        ("shards: the beginning of a step is not saved", "    def expected(self)", "    untouched = False\n\n    def expected(self)"),
    ),
    *planted("generation/server.py", "test_ranks_servers.py -k however_long",
        ("others hear nothing while servers write", "                self.waits()\n", "                pass\n"),
    ),
    *planted("generation/local.py", "test_ranks_servers.py -k ends_with_it",
        ("a server takes itself for a process of torchrun", 'environment |= {\n            name: value for name, value in os.environ.items() if not TORCHRUN.fullmatch(name)\n        }', "environment |= {name: value for name, value in os.environ.items()}"),
    ),
    *planted("distributed/fsdp.py", "test_ranks_lora.py -k one_base",
        ("ranks: a base of its own for every role", "Hollow(shard, self.device) if base", "Hollow(shard, self.device, copied=True) if base"),
    ),
    *planted("distributed/fsdp.py", "test_ranks.py -k 'as_one_without_it and grpo'",
        ("ranks: a copy is the thing itself", "        return Hollow(self.of, self.device, copied=True)", "        return self"),
    ),
    *planted("model/weights.py", "test_ranks_lora.py -k 'in_one_process and grpo and not pairwise'",
        ("ranks: the reference moves with the policy", "else holder.make(function, model, *args, **kwargs)", "else model"),
    ),
    *planted("distributed/fsdp.py", "test_ranks_lora.py -k 'in_one_process and grpo and not pairwise'",
        ("ranks: the base is trained too", "torch.nn.Parameter(full, x.requires_grad)", "torch.nn.Parameter(full)"),
    ),
    *planted("distributed/fsdp.py", "test_ranks_lora.py -k 'in_one_process and ppo'",
        ("ranks: who has loaded nothing draws other numbers", "        torch.set_rng_state(random_state)\n        return model", "        return model"),
    ),
    *planted("distributed/fsdp.py", "test_ranks_lora.py -k 'gone_on_with and options3'",
        ("ranks: the reference of an adapter is its base", "memo[id(x)] = Hollow(shard, self.device) if base else", "memo[id(x)] = Hollow(shard, self.device) if True else"),
    ),
    *planted("rewards/learned.py", "test_lora.py -k reward_model_merged",
        ("an adapter of a reward model is not merged", '"merge": not hasattr(like, "peft_config")', '"merge": False'),
    ),
    *planted("store/shard_files.py", "test_ranks_lora.py -k 'goes_on_from_it and 2'",
        ("shards: the base below an adapter is written", 'found: dict[str, Tensor] = {\n        f"model/{name}": x for name, x in named if x.requires_grad or not adapter\n    }', 'found: dict[str, Tensor] = {f"model/{name}": x for name, x in named if True}'),
        ("shards: adapters are not", 'found: dict[str, Tensor] = {\n        f"model/{name}": x for name, x in named if x.requires_grad or not adapter\n    }', 'found: dict[str, Tensor] = {f"model/{name}": x for name, x in named if not adapter}'),
    ),
    *planted("model/blocks.py", "test_ranks.py -k checkpointed",
        ("checkpointing does nothing", "if not torch.is_grad_enabled():", "if True:"),
    ),
    *planted("generation/engine.py", "test_engine.py",
        ("one random number for all rows", "torch.rand((len(rows), 1), generator", "torch.rand((1, 1), generator"),
        ("the sampler ignores its generator", "generator=self.generator, device=rows", "device=rows"),
        ("only the first stop id is honored", "stops = torch.tensor(engine.stops, device=device)", "stops = torch.tensor(engine.stops[:1], device=device)"),
        ("only the first stop id counts as finished", 'completions.gather(1, last[:, None])[:, 0], completions.new_tensor(self.stops)', 'completions.gather(1, last[:, None])[:, 0], completions.new_tensor(self.stops[:1])'),
        ("finished rows keep writing", "present[alive, t] = writing", "present[alive, t] = True"),
        ("finished rows begin again", "writing = writing & ~torch.isin(tokens, stops)", "writing = ~torch.isin(tokens, stops)"),
        ("EOS is not part of the completion", "present[alive, t] = writing", "present[alive, t] = writing & ~torch.isin(tokens, stops)"),
        ("a row goes on with its sibling's cache", "[x[rows] for x in store]", "[x[: int(rows.sum())] for x in store]"),
        ("a row goes on with its sibling's prompt length", "self.start = self.start[rows]", "self.start = self.start[: int(rows.sum())]"),
        ("keys of the prompt stored for other rows", "transpose(1, 2).repeat_interleave(self.group_size, 0)", "transpose(1, 2).repeat(self.group_size, 1, 1, 1)"),
        ("columns that the cache grew are seen", 'hidden = (column < self.width - self.start[:, None]) | (column >= self.used)', "hidden = column < self.width - self.start[:, None]"),
        ("the newest column is hidden", 'column >= self.used', 'column >= self.used - 1'),
        ("the cache grows at its beginning", "pad(store[i], (0, 0, 0, STRETCH))", "pad(store[i], (0, 0, STRETCH, 0))"),
        ("every layer opens a column", "if layer == next(iter(self.stores)):", "if True:"),
        ("prompts left-aligned in the cache", 'self.column = (\n            row * self.width\n            + (self.width - lengths).repeat_interleave(lengths)\n            + prefill.positions[0]\n        )', 'self.column = row * self.width + prefill.positions[0]'),
        ("positions off by one while decoding", "(cache.start + t)[:, None], cache)", "(cache.start + t + 1)[:, None], cache)"),
        ("padding of the prompt counts as real while decoding", "(column < self.width - self.start[:, None])", "(column < 0 * self.start[:, None])"),
        ("sliding window off by one while decoding", "hidden |= column < self.used - (window or", "hidden |= column <= self.used - (window or"),
        ("groups tiled while decoding", "logits = head(hidden).repeat_interleave(group_size, 0)", "logits = head(hidden).repeat(group_size, 1)"),
    ),
    *planted("generation/engine.py", "test_engine.py -k 'recurrent or transformers'",
        ("transformers' sampling leaves EOS out", "ended.cumsum(1) - ended == 0", "ended.cumsum(1) == 0"),
        ("transformers' sampling: log-probabilities without temperature", "groups, temperature=temperature or 1.0)", "groups)"),
        ("transformers' sampling ignores the seed", 'torch.manual_seed(\n        int(torch.randint(2**31, (), generator=engine.generator, device=engine.generator.device))\n    )', 'torch.manual_seed(0)'),
    ),
    # Data ------------------------------------------------------------------------------------------------------------
    *planted("model/text.py", "test_data.py -k 'not real_files and not real_conv'",
        ("EOS not appended to data", "return [*ids, stops[0]], [True] * (len(ids) + 1)", "return ids, [True] * len(ids)"),
        ("EOS appended and not trained", "[True] * (len(ids) + 1)", "[True] * len(ids) + [False]"),
        ("EOS of a turn not trained", "[is_assistant and i < end for i in", "[is_assistant and i < end - 1 for i in"),
        ("a template that opens replies otherwise is taken at its word", ".removesuffix(cache[template])", ""),
        ("the user's turns are trained", "[is_assistant and i < end for i in", "[i < end for i in"),
        ("what follows EOS in the template is trained", "[is_assistant and i < end for i in", "[is_assistant for i in"),
        ("completions tokenized without their prompt", "if joint[: len(before_ids)] == list(before_ids):", "if False:"),
        ("a merge across the border changes the prompt", "if joint[: len(before_ids)] == list(before_ids):", "if True:"),
        ("prompt tokens are in the completion, and trained", "return joint[len(before_ids) :]", "return joint"),
        ("only the first stop id is known", "ids = list(dict.fromkeys([*first, *configured]))", "ids = [*first, *configured][:1]"),
        ("a prompt keeps the EOS that its tokenizer puts there", "return ids[:-1] if special and", "return ids if special and"),
        ("stop ids: that of the tokenizer is forgotten", "ids = list(dict.fromkeys([*first, *configured]))", "ids = list(configured or first)"),
    ),
    *planted("data/examples.py", "test_data.py -k 'not real_files and not real_conv'",
        ("chosen and rejected swapped in data", '("chosen", "rejected") if pair', '("rejected", "chosen") if pair'),
        ("supervised learning of the rejected side", '{"supervised": sides[:1],', '{"supervised": sides[-1:],'),
        ("text without EOS", "ids = [*encode_prompt(tokenizer, completions[0]), stops[0]]", "ids = encode_prompt(tokenizer, completions[0])"),
        ("text learns from its second token on", "learned=[[True] * (len(ids) - 1)]", "learned=[[False] + [True] * (len(ids) - 2)]"),
        ("split by row, not by prompt", "json.dumps([seed, example.prompt + whole])", "json.dumps([seed, example.prompt, example.completions])"),
        ("split ignores the seed", "json.dumps([seed, example.prompt + whole])", "json.dumps([example.prompt + whole])"),
        ("a long prompt keeps its beginning", "del example.prompt[:-max_prompt]", "del example.prompt[max_prompt:]"),
        ("a completion too long is cut at its beginning", "del part[max_completion:]", "del part[:-max_completion]"),
        ("a pair of equal sides is kept", 'return "chosen equals rejected"\n', 'return ""\n'),
        ("a prompt said again is not taken off the sides", "[side[len(prompt) :] for side in sides] if repeated else sides", "sides"),
    ),
    *planted("data/examples.py", "test_rows.py -k 'not odd'",
        ("rows not held: held-out prompts are trained on", "if example and not (self.heldout and _split_key(example, self.seed) in self.heldout):", "if example:"),
        ("rows not held: what was asked for before changes a row", "draw = random.Random(row)", "draw = random"),
        ("rows not held: counted at every look", "self.counted[row] = 1", "pass"),
        ("texts are split by their first token", "json.dumps([seed, example.prompt + whole])", "json.dumps([seed, example.prompt])"),
    ),
    *planted("data/rows.py", "test_rows.py",
        ("lines: the first of a block is lost", "starts.append(size + begins[~odd])", "starts.append(size + begins[~odd][size > 0 :])"),
        ("lines: a block forgets those before it", "size, lines = size + len(block), lines + len(ends)", "size, lines = size + len(block), len(ends)"),
        ("lines: empty ones are rows", "odd[line] = row is None or", "odd[line] = row is not None and"),
        ("lines: their number leaves out those before the block", "number + block.count(b", "1 + block.count(b"),
        ("half of a surrogate pair is let in", 'if b"\\\\ud" in text or', "if"),
    ),
    *planted("model/load.py", "test_safe.py -k 'code or pickles'",
        ("a model's own code is run", '{"trust_remote_code": trusted(), "use_safetensors"', '{"trust_remote_code": True, "use_safetensors"'),
        ("a model's own code is run where its config is read", "lambda: AutoConfig.from_pretrained(base, trust_remote_code=trusted())", "lambda: AutoConfig.from_pretrained(base, trust_remote_code=True)"),
        ("pickles are read", '"use_safetensors": None if trusted() else True', '"use_safetensors": None'),
    ),
    *planted("model/text.py", "test_safe.py -k 'code'",
        ("a tokenizer's own code is run", "trust_remote_code=trusted()", "trust_remote_code=True"),
    ),
    *planted("batch.py", "test_data.py test_invariance.py -k 'learned or trained or pairs_of'",
        ("collate trains what a user said", 'mask[present] = torch.tensor(\n            [flag for flags in trained for flag in flags], dtype=torch.bool\n        )', 'pass'),
    ),
    *planted("batch.py", "test_forward.py -k 'microbatches'",
        ("microbatches drop the last part", "for p in [*order, None]:", "for p in order:"),
        ("microbatches ignore `only`", "groups, first = groups.select(chosen), group_rows(chosen, size)", "pass"),
        ("microbatches number the rows of `only` anew", "groups, first = groups.select(chosen), group_rows(chosen, size)", "groups = groups.select(chosen)"),
        ("microbatches split groups that must stay whole", 'while (\n        not whole\n        and size > 1\n        and (groups.lengths > (2 * groups.prompt_mask.sum(1)).clamp(min=budget)).any()\n    ):', 'while size > 1 and (groups.lengths > (2 * groups.prompt_mask.sum(1)).clamp(min=budget)).any():'),
        ("microbatches take a long prompt apart from its completions", "(2 * groups.prompt_mask.sum(1)).clamp(min=budget)", "budget"),
        ("microbatches: rows of another part", "yield first[group_rows(index, size)], groups.select(index)", "yield first[group_rows(index.sort()[0], size)], groups.select(index)"),
        ("regroup tiles the prompts", "x.repeat_interleave(copies, 0)", "x.repeat(copies, 1)"),
    ),
    # Runs ------------------------------------------------------------------------------------------------------------
    *planted("step/optimizer.py", "test_recipes.py -k 'sft_learns or optimizer or learning_rate'",
        ("gradients are never cleared", "        self.adamw.zero_grad(set_to_none=True)\n", ""),
        ("the gradient's norm is not limited", "clip_grad_norm(self.parameters, self.max_grad_norm)", "clip_grad_norm(self.parameters, math.inf)"),
        ("the learning rate starts at 0 without a warm-up", "(done + 1) / (warmup + 1)", "done / (warmup + 1)"),
        ("linear decay rises", "max(0.0, 1 - done / steps)", "min(1.0, done / steps)"),
    ),
    *planted("step/run.py", "test_recipes.py -k 'batches or microbatch_size'",
        ("data order differs at every call", "random.Random(self.config.seed)", "random.Random()"),
    ),
    *planted("step/run.py", "test_recipes.py -k 'batches or sft_learns'",
        ("data order ignores the seed", "random.Random(self.config.seed)", "random.Random(0)"),
        ("an epoch draws with replacement", "moved[i] = moved.pop(last, last)", "pass"),
        ("an epoch never draws its last row", "moved[i] = moved.pop(last, last)", "moved[i] = moved.get(last, i)"),
    ),
    *planted("runner/prepare.py", "test_recipes.py test_commands.py -k seed",
        ("sampling ignores the seed", "torch.Generator(device).manual_seed(config.seed)", "torch.Generator(device).manual_seed(0)"),
    ),
    # Recipes: the step's totals --------------------------------------------------------------------------------------
    *planted("recipes/sft.py", f"{SPLIT} -k 'sft'",
        ("sft: mean of each microbatch", "part.mask, total=total)", "part.mask)"),
    ),
    *planted("step/reference_cache.py", "test_remembered.py",
        ("reference cache: weights are not part of the name", "sha256.update(x.cpu()", "(x.cpu()"),
        ("reference cache: precision is not part of the name", 'getattr(model, "compute_dtype", None)', "None"),
        ("reference cache: what is learned is not part of the name", ", example.learned))", "))"),
        ("reference cache: a damaged file stops the run", "OSError, SafetensorError, KeyError", "OSError"),
    ),
    *planted("recipes/offline.py", "test_recipes.py -k 'reference_of_its_own'",
        ("dpo: references of other rows, by the order of the data", "[self.row[example.index] for example in examples]", "[*range(len(examples))]"),
    ),
    *planted("step/run.py", "test_recipes.py -k 'dpo_starts'",
        ("dpo: rows without their number have one reference", "replace(self.train[number], index=number)", "self.train[number]"),
    ),
    *planted("step/run.py", "test_recipes.py -k 'reference_of_its_own'",
        ("dpo: held-out rows without their number have one reference", "self.heldout = [replace(x, index=len(self.train) + i) for i, x in enumerate(self.heldout)]", "pass"),
        ("dpo: held-out rows have the references of the trained ones", "index=len(self.train) + i)", "index=i)"),
    ),
    *planted("recipes/dpo.py", f"{SPLIT} -k 'dpo'",
        ("dpo: mean of each microbatch", "(loss.sum() / len(pairs) +", "(loss.mean() +"),
        ("dpo: reference of other rows", "ref_logprob[rows], part", "ref_logprob[: len(rows)], part"),
        ("dpo: supervised mean of each microbatch", "/ sft_mask.sum()", "/ sft_mask[rows].sum()"),
    ),
    *planted("recipes/reward_model.py", f"{SPLIT} -k 'reward'",
        ("reward model: mean of each microbatch", "(loss.sum() / len(pairs)).backward()", "loss.mean().backward()"),
    ),
    *planted("recipes/pairwise_grpo.py", f"{SPLIT} -k 'pairwise'",
        ("pairwise grpo: mean of each microbatch", "(loss.sum() / teaches.sum()).backward()", "loss.mean().backward()"),
        ("pairwise grpo: rewards of other rows", "ref_logprob[rows], rewards[rows], size", "ref_logprob[rows], rewards[: len(rows)], size"),
    ),
    *planted("recipes/ppo.py", f"{SPLIT} -k 'ppo'",
        ("ppo: mean of each microbatch", "token_mean(trace.weights(rows, old) * loss, part.mask, total=total)", "token_mean(trace.weights(rows, old) * loss, part.mask)"),
        ("ppo: value loss by the mean of each microbatch", "token_mean(value_loss, part.mask, total=total)", "token_mean(value_loss, part.mask)"),
        ("ppo: old log-probabilities of other rows", "old = old_logprobs[rows]", "old = old_logprobs[: len(rows)]"),
    ),
    *planted("recipes/grpo.py", "test_recipes.py -k constant",
        ("grpo: the KL charged is the sampler's, not exactly 0 at first", "by=policy if objective.charges_kl else None", "by=None"),
    ),
    *planted("step/trace.py", "test_invariance.py test_recipes.py -k 'first_pass or exactly_no_kl'",
        ("trace: what stood before the update moves with it", "self.first = self.latest.clone()", "self.first = self.latest"),
        ("trace: the first pass is taken after the update", "        if self.passes == 0:\n", "        if True:\n"),
    ),
    *planted("step/trace.py", "test_recipes.py -k 'compared or constant'",
        ("trace: what was seen is not noted", "self.seen = self.seen if only is None else only", "pass"),
    ),
    *planted("recipes/on_policy.py", "test_recipes.py -k compared",
        ("groups that the learner passed over agree with the sampler", "seen.repeat_interleave(rollouts.groups.group_size)[:, None]", "mask"),
    ),
    *planted("optimization/policy.py", "test_optimization.py -k one_advantage",
        ("one advantage a completion is taken for one a token", "advantages[:, None] if", "advantages if"),
    ),
    *planted("recipes/grpo_variants.py", f"{SPLIT} -k 'grpo or deepseek'",
        ("grpo: mean of each microbatch", "total=step.sum())", "total=mask.sum())"),
        ("grpo: sequence mean of each microbatch", "sequence_mean(loss, mask).sum() / len(step)", "sequence_mean(loss, mask).mean()"),
    ),
    *planted("recipes/grpo_variants.py", f"{SPLIT} test_recipes.py -k 'dr-grpo and split or k2 or batch_baseline'",
        ("grpo: k3 in place of k2", "ref: k2(new, ref)", "ref: k3(new, ref)"),
        ("grpo: batch baseline is that of the group", '"batch": lambda: group_advantages(rewards, len(rewards))', '"batch": lambda: group_advantages(rewards, config.group_size)'),
    ),
    *planted("recipes/grpo.py", f"{SPLIT} -k 'grpo or deepseek'",
        ("grpo: advantages of other rows", "advantages[rows], part.mask", "advantages[: len(rows)], part.mask"),
    ),
    *planted("recipes/objective.py", f"{SPLIT} test_recipes.py -k 'dr-grpo and split or equal_rewards'",
        ("grpo: groups of equal rewards are not tied to the reference", " | (self.beta > 0)", ""),
    ),
    *planted("recipes/objective.py", f"{SPLIT} test_recipes.py -k 'dr-grpo and split or equal_rewards or constant'",
        ("objective: every group teaches", ".any(1) | (self.beta > 0)", ".any(1) | True"),
        ("objective: groups that differ do not teach", "return advantages.reshape(len(advantages) // group_size, -1).any(1)", "return ~advantages.reshape(len(advantages) // group_size, -1).any(1)"),
    ),
    *planted("recipes/grpo_variants.py", f"{SPLIT} test_recipes.py -k 'dr-grpo and split or equal_rewards'",
        ("grpo: beta is dropped", "beta=0.0 if charged else config.beta", "beta=0.0"),
    ),
    *planted("recipes/grpo_variants.py", f"{PADDING} -k 'dr-grpo'",
        ("grpo: constant mean over the padded width", "total=len(step) * longest)", "total=step.numel())"),
    ),
    # Recipes: what goes into the loss --------------------------------------------------------------------------------
    *planted("recipes/grpo_variants.py", PARITY,
        ("rloo: KL charge of the wrong sign", "rewards = rewards - config.beta *", "rewards = rewards + config.beta *"),
        ("leave-one-out baseline ignored", "leave_one_out_advantages(rewards, config.group_size)", "group_advantages(rewards, config.group_size)"),
        ("rloo: the KL is charged and in the loss too", "beta=0.0 if charged else config.beta", "beta=config.beta"),
        ("grpo: the dual clip is not passed on", ", clip_dual=config.clip_dual or torch.inf)", ")"),
    ),
    *planted("recipes/dpo_variants.py", PARITY,
        ("length-normalized dpo: reference not normalized", "logprob / tokens, ref_logprob / tokens", "logprob / tokens, ref_logprob"),
        ("dpo: label smoothing not passed on", "on_rewards(robust_loss, **smoothing)", "on_rewards(robust_loss, label_smoothing=0.0)"),
    ),
    *planted("recipes/dpo.py", PARITY,
        ("dpo: the rejected side is the good one", "device=groups.mask.device) % 2 == 0", "device=groups.mask.device) % 2 == 1"),
    ),
    *planted("recipes/kto.py", "test_recipes.py -k 'variant_of_dpo and kto'",
        ("kto: the rejected side is the good one", "(True, False) if len(", "(False, True) if len("),
    ),
    *planted("recipes/kto.py", PARITY,
        ("kto: weights swapped", "torch.where(good, config.desirable_weight, config.undesirable_weight)", "torch.where(good, config.undesirable_weight, config.desirable_weight)"),
        ("kto: reference point from each prompt's own completions", "zip(examples, [examples[-1], *examples[:-1]], strict=True)", "zip(examples, examples, strict=True)"),
        ("kto: references of mismatched completions in the place of the rows' own", "index=(a.index, b.index)", "index=a.index"),
    ),
    *planted("recipes/reward_model.py", PARITY,
        ("reward model: margins of other rows", "margin=margin[rows[::2] // 2])", "margin=margin[: len(chosen)])"),
    ),
    *planted("step/trace.py", PARITY,
        ("grpo learns without the temperature that sampled", "token_logprobs(policy, part, temperature=self.temperature)", "token_logprobs(policy, part)"),
    ),
    *planted("step/run.py", PARITY,
        ("grpo: reference without the temperature that sampled", "(token_logprobs, model, given, temperature=self.temperature)", "(token_logprobs, model, given)"),
    ),
    *planted("recipes/dynamic_sampling.py", "test_recipes.py -k 'takes_the_place'",
        ("dynamic sampling: completions of other groups", "(rollouts, rewards, p * size + i) for rollouts, rewards, p", "(rollouts, rewards, i * len(rollouts.rows) + p) for rollouts, rewards, p"),
        ("dynamic sampling: rows of the prompts as they came", "rows=[r.rows[p] for r, _, p in groups]", "rows=groups[0][0].rows"),
        ("dynamic sampling: tokens of other prompts are not counted", 'self.tally["tokens/generated"] += others.groups.present.sum()', "pass"),
    ),
    *planted("recipes/dynamic_sampling.py", "test_recipes.py::test_each_variant_of_grpo_climbs[dapo]",
        ("dynamic sampling keeps what teaches nothing", "sides[not informative]", "sides[informative]"),
        ("dynamic sampling: rewards of the rows before others took their place", "rollouts, self.rewards = _concatenate(useful + useless)", "rollouts, self.rewards = _concatenate(useful + useless)[0], rewards"),
    ),
    *planted("recipes/ppo_parts.py", PARITY_PPO,
        ("ppo: missing-EOS penalty on those that ended", "penalty * ~rollouts.finished", "penalty * rollouts.finished"),
        ("ppo: returns from whitened advantages", "return (whiten(advantages, mask) if config.whiten_advantages else advantages), returns",
         "advantages = whiten(advantages, mask) if config.whiten_advantages else advantages; return advantages, advantages + old_values"),
    ),
    # Plan ---------------------------------------------------------------------------------------------------------------
    *planted("plan/step.py", "test_plan.py -k few_bits",
        ("plan: a quantized base in shards", "return possible and max(", "return max("),
    ),
    *planted("plan/formulas.py", "test_plan.py -k 'by_hand'",
        ("plan: weights of all ranks on each", "return 4 * parameters / ranks", "return 4 * parameters"),
        ("plan: a quantized base without its scales", "(bits / 8 + 4 / 64)", "(bits / 8)"),
        ("plan: gradients in half precision", "return 4 * trained / ranks", "return 2 * trained / ranks"),
        ("plan: one moment for two", "return 8 * trained / ranks", "return 4 * trained / ranks"),
        ("plan: casts of four bytes", "return 2 * matrices\n", "return 4 * matrices\n"),
        ("plan: cast of the head of four bytes", "return 2 * head\n\n\ndef gathered_weights", "return 4 * head\n\n\ndef gathered_weights"),
        ("plan: only the block at work is gathered", "return size * 2 * block + 4 * root", "return size * block + 4 * root"),
        ("plan: the root gathered for sampling in half precision", "size * (parameters - root) + 4 * root", "size * parameters"),
        ("plan: a block's gradient not yet in float32", "(size + 4) * block", "size * block"),
        ("plan: activations in float32 throughout", "(size * inputs + 4 * norms)", "(4 * inputs + 4 * norms)"),
        ("plan: expert activations of the input only", "(expert_inputs + 3 * expert_gates)", "(expert_inputs + expert_gates)"),
        ("plan: attention that keeps no probabilities", "            + heads * pairs\n", ""),
        ("plan: fused attention without its output", "heads * (key_width + value_width) * queries", "heads * key_width * queries"),
        ("plan: checkpointing that keeps nothing of a block", "* layers + kept / layers", "* layers"),
        ("plan: adapters without a rank", "return tokens * rank * adapters * size", "return tokens * adapters * size"),
        ("plan: logits of one byte", "return learned * columns * size", "return learned * columns"),
        ("plan: a head without gradients of its states", "chunk * (4 + size) + learned * hidden * (8 + 2 * size)", "chunk * (4 + size)"),
        ("plan: head's gradient in half precision", "return 4 * head\n", "return 2 * head\n"),
        ("plan: one gradient of a tied embedding", "return 8 * head\n", "return 4 * head\n"),
        ("plan: cache of keys alone", "layers * kv_heads * (key_width + value_width) * size", "layers * kv_heads * key_width * size"),
        ("plan: every server holds all", "return 2 * parameters / servers", "return 2 * parameters"),
        ("plan: every server holds the whole cache", "layers * numbers / servers", "layers * numbers"),
        ("plan: sampling without exponentials", "vocabulary * (size + 12)", "vocabulary * (size + 4)"),
        ("plan: multiplications without additions", "return 2 * active * tokens", "return active * tokens"),
        ("plan: attention's scores alone", "return 2 * layers * heads * (key_width + value_width) * pairs", "return 2 * layers * heads * key_width * pairs"),
        ("plan: a head's multiplications without additions", "return 2 * head * learned", "return head * learned"),
        ("plan: a backward that computes nothing again", "factors * forward + again", "factors * forward"),
        ("plan: logits again of half the operations", "return 2 * learned * hidden * columns", "return learned * hidden * columns"),
        ("plan: adapters of half the operations", "return 2 * adapters * tokens", "return adapters * tokens"),
        ("plan: matrices that are not cast", "matrices * (12 - 2 * size) + kept", "matrices * 4 + kept"),
        ("plan: gradients written and never read", "matrices * (size + 8) + 2 * kept", "matrices * (size + 4) + 2 * kept"),
        ("plan: every row reads other experts", "(1 - (1 - share) ** rows)", "share * rows"),
        ("plan: decoding without the cache", "steps * (size * matrices + cache)", "steps * size * matrices"),
        ("plan: AdamW that reads no gradient twice", "return 40 * trained / ranks", "return 28 * trained / ranks"),
        ("plan: own weights received too", "parameters * (ranks - 1) / ranks", "parameters"),
        ("plan: own gradients received too", "trained * (ranks - 1) / ranks", "trained"),
        ("plan: weights go to the host and do not return", "(4 * passes * parameters + 4 * trained) / ranks", "4 * trained / ranks"),
        ("plan: servers synchronized in float32", "return 2 * parameters\n", "return 4 * parameters\n"),
        ("plan: efficiency the wrong way round", "flops / (peak * efficiency)", "flops * efficiency / peak"),
        ("plan: bandwidth the wrong way round", "moved / (bandwidth * efficiency)", "moved * efficiency / bandwidth"),
    ),
    *planted("plan/step.py", "test_plan.py -k 'operations or epochs'",
        ("plan: epochs forgotten", "part.number * self.epochs)\n            work[FORWARD", "part.number)\n            work[FORWARD"),
        ("plan: decoding as long as the completion", "self.config.completion_tokens - 1,\n            self._prompts_sampled", "self.config.completion_tokens,\n            self._prompts_sampled"),
        ("plan: logits made again though kept", "columns = self.shape.vocabulary - self.head_columns[0]", "columns = self.shape.vocabulary"),
    ),
    *planted("plan/parts.py", "test_plan.py -k 'microbatches_are or rows_of'",
        ("plan: lengths of attention not rounded", "return length if length < ROUND else", "return length if length else"),
        ("plan: groups that must stay whole taken apart", "while not whole and size > 1 and prompt", "while size > 1 and prompt"),
    ),
    *planted("plan/step.py", "test_plan.py -k 'which or adapters_need or second or checkpointing or remedy or largest'",
        ("plan: a reference without need", '"grpo": config.reference}', '"grpo": True}'),
        ("plan: adapters with a second base", "own if lora and model == shape else", ""),
        ("plan: a critic without optimizer", "trained = sum(model.trained for model in self.models.values())\n        terms[", "trained = self.models['weights'].trained\n        terms["),
        ("plan: gradients of the first microbatch forgotten", "several = self.part.number > 1", "several = False"),
        ("plan: the largest microbatch is one too large", "return budgets[low - 1] if low else 0", "return budgets[min(low, len(budgets) - 1)]"),
        ("plan: a remedy that does not fit", "if best.fits:", "if not best.fits:"),
    ),
    # What a run says and shows -----------------------------------------------------------------------------------------
    *planted("report/compare.py", "test_page.py test_plots.py -k 'the_command or some_runs'",
        ("report: a page of some runs over the page of all", '    if {run.resolve() for run in runs} == {run.resolve() for run in runs_in(folder)}:\n        return', "    if True:\n        return"),
        ("report: long names cut to the same", '{names[:140]}-{hashlib.sha256(names.encode()).hexdigest()[:8]}', '{names[:40]}'),
    ),
    *planted("report/page.py", "test_page.py -k the_command",
        ("report: a run named twice makes another page", "list(dict.fromkeys(run for arg in args[:flags] for run in runs_in(Path(arg))))", "[run for arg in args[:flags] for run in runs_in(Path(arg))]"),
    ),
    *planted("cli/help.py", "test_commands.py -k help",
        ("help: a switch that is on is told as off", "    if option.default is True:", "    if False:"),
        ("help: torch is imported for it", "    from rich.console import Console\n", "    import torch  # noqa: F401\n    from rich.console import Console\n"),
    ),
    *planted("runner/methods.py", "test_own_method.py -k 'killed_and or found_again or lacks or has_gone'",
        ("own method: its file is run anew at every look", "    loaded = sys.modules.get(name)\n", "    loaded = None\n"),
        ("own method: another file of the same name stands in for it", "if loaded is not None and Path(str(loaded.__file__)).resolve() == path.resolve():", "if loaded is not None:"),
        ("own method: a resumed run looks for a module", 'return (\n        str(Path(str(recipe.__file__)).resolve())\n        if getattr(recipe, "__file__", None)\n        else recipe.__name__\n    )', 'return recipe.__name__'),
        ("own method: an error in its file is a traceback", "        if built_in:\n            raise\n", "        raise\n"),
        ("own method: any kind of model is trained", 'parts.get("TRAINS") in ("policy", "scorer")', "True"),
        ("own method: what it lacks is not looked for", "        if not is_valid:\n", "        if False:\n"),
    ),
    *planted("runner/methods.py", "test_own_method.py -k 'not_taken_for'",
        ("own method: a file that can't be imported stays half a module", "        del sys.modules[name]\n        raise\n", "        raise\n"),
    ),
    *planted("cli/early.py", "test_own_method.py -k has_gone",
        ("own method: that its file is gone is a traceback", "        if not Path(source).is_file():\n", "        if False:\n"),
    ),
    *planted("recipes/objective.py", "test_own_method.py -k another_objective",
        ("own method: what is put in the place of a function is not called", "return replace(self, **changes)", "return self"),
    ),
    *planted("step/option_texts.py", "test_commands.py -k help",
        ("help: a group ends with its first option", 'if above.startswith("# ") else group', 'if above.startswith("# ") else "Options"'),
        ("help: what is inherited is left out", "            options |= options_of(*place)\n", "            pass\n"),
        ("help: presets of variants are left out", ', file.with_name(f"{file.stem}_variants.py"))', ",)"),
    ),
    *planted("report/compare.py", "test_commands.py -k compare",
        ("report: compare takes no folder", "for run in runs_in(Path(arg))]):", "for run in [Path(arg)]]):"),
        ("report: a reward with fewer digits than its error", "{finite['gold']:.2f} ±", "{finite['gold']:.3g} ±"),
        ("report: nothing generated is 0k", 'f"{n / 1000:,.0f}k" if n else "-"', 'f"{n / 1000:,.0f}k"'),
    ),
    *planted("report/watch.py", "test_watch.py -k 'begin or watched'",
        ("report: watch waits for nothing", "until += WAIT", "until += 0"),
        ("report: watch waits for what is there and no run", " for path in paths if not path.exists()]", " for path in paths]"),
    ),
    *planted("report/gather.py", "test_page.py -k 'speed or machine or turning'",
        ("report: the speed pays for the evaluation", ' - (_number(line.get("time/evaluation")) or 0)', ""),
        ("report: the path of the checkout on the page", "return inside[1] if inside else", "return"),
        ("report: a turn within the noise", 'turns = fall > noise["fall_noise"] and', "turns = fall > 0 and"),
    ),
    *planted("report/terminal.py", "test_terminal.py",
        ("terminal: the first step after a resume as the first of the run", "_summary(rows[0], metrics)", "_summary(dict(self.first), metrics)"),
        ("terminal: a damaged record ends the run", 'with suppress(InputError, OSError):', 'with suppress(OSError):'),
        ("terminal: warnings of the last step alone", "warnings(asdict(launched.config), rows)", "warnings(asdict(launched.config), rows[-1:])"),
        ("terminal: warnings that know no options", "warnings(asdict(launched.config), rows)", "warnings({}, rows)"),
        ("terminal: the speed pays for the evaluation", "spent - self.evaluating", "spent"),
        ("terminal: all tied where something was lost", '(*ACCURACIES, "margin", "rewards/margins")', "ACCURACIES"),
    ),
]
# fmt: on


# The machinery ------------------------------------------------------------------------------------------------------


def controls(mutants: list[Mutant]) -> list[Mutant]:
    """All tests that the mutants name, on the package as it is; what one -k leaves out is left out."""
    words: dict[str, set[str]] = {}
    for mutant in mutants:
        paths, _, chosen = mutant.tests.partition(" -k ")
        words.setdefault(paths, set()).update(shlex.split(chosen))
    whole = {mutant.tests for mutant in mutants if " -k " not in mutant.tests}
    result = []
    for paths, chosen in words.items():
        some = shlex.join(["-k", " or ".join(f"({word})" for word in sorted(chosen))])
        tests = paths if paths in whole else f"{paths} {some}"
        result.append(Mutant(f"nothing planted: {paths}", "", "", "", tests))
    return result


def occurrences(mutant: Mutant) -> int:
    return (PACKAGE / mutant.file).read_text(encoding="utf-8").count(mutant.old)


def preload() -> None:
    """What the comparison with TRL would import for each defect again."""
    with (
        contextlib.suppress(ImportError),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        trl = importlib.import_module("trl")
        for name in ("SFT", "Reward", "DPO", "KTO", "GRPO", "RLOO"):
            getattr(trl, f"{name}Trainer")
        for name in ("cpo", "orpo"):
            importlib.import_module(f"trl.experimental.{name}")


class Outcomes:
    """A pytest plugin that counts the tests that were run, not skipped."""

    def __init__(self) -> None:
        self.run = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.run += report.outcome == "failed" or (
            report.when == "call" and report.outcome == "passed"
        )


def child(mutant: Mutant, folder: Path) -> NoReturn:
    """Plant the defect in a copy of the package and run the tests on it; the exit code is pytest's, or REFUSED."""
    code = REFUSED
    try:
        resource.setrlimit(
            resource.RLIMIT_CPU, (LIMIT, LIMIT)
        )  # what others do on this machine does not count
        copy = folder / "src" / "trivet"
        shutil.copytree(folder.parent / "trivet", copy)
        for name in TOY_DATA:
            (copy / "toy" / name).symlink_to(PACKAGE / "toy" / name)
        if mutant.old:
            file = copy / mutant.file
            file.write_text(
                file.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8"
            )
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.dump_traceback_later(
            WAITS, exit=True
        )  # no alarm: reward functions take it off
        os.chdir(TESTS)
        sys.path.insert(0, str(copy.parent))
        os.environ["PYTHONPATH"] = str(copy.parent)  # for processes that a test starts
        outcomes = Outcomes()
        options = [
            "-q",
            *PLAIN,
            "-m",
            "",
            "--limit",
            "0",
            "--basetemp",
            str(folder / "tmp"),
        ]  # of both tiers
        stop = ["-x", "--tb=line"] if mutant.old else []
        code = int(pytest.main([*shlex.split(mutant.tests), *stop, *options], plugins=[outcomes]))
        found = sys.modules["trivet"].__file__ or ""
        if not found.startswith(str(copy)) or not outcomes.run:
            print(f"trivet is {found}, {outcomes.run} tests were run")
            code = REFUSED
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tried(mutants: list[Mutant], at_once: int) -> Iterator[tuple[Mutant, str]]:
    """(mutant, outcome) of each as it ends, so many at a time; prints a line each."""
    for mutant, outcome, seconds, log in ended(mutants, at_once):
        if not mutant.old:
            outcome = {"SURVIVED": "passed", "killed": "FAILED"}.get(outcome, outcome)
        print(f"{outcome:8} {seconds:6.1f}  {mutant.name}", flush=True)
        if outcome in ("ERROR", "FAILED"):
            print("\n".join(log.splitlines()[-12:]))
        yield mutant, outcome


def ended(mutants: list[Mutant], at_once: int) -> Iterator[tuple[Mutant, str, float, str]]:
    """(mutant, outcome, seconds, log) of each as it ends."""
    waiting, running = list(enumerate(mutants)), dict[int, tuple[Mutant, Path, float]]()
    with tempfile.TemporaryDirectory(prefix="trivet-mutants-") as scratch:
        shutil.copytree(
            PACKAGE, f"{scratch}/trivet", ignore=shutil.ignore_patterns("__pycache__", *TOY_DATA)
        )
        compileall.compile_dir(
            f"{scratch}/trivet", quiet=1
        )  # once, not for each defect; so are the tests
        sys.dont_write_bytecode = False
        while waiting or running:
            while waiting and len(running) < at_once:
                number, mutant = waiting.pop(0)
                folder = Path(scratch) / str(number)
                folder.mkdir()
                began = time.perf_counter()
                pid = os.fork()
                if not pid:
                    child(mutant, folder)
                running[pid] = mutant, folder, began
            pid, status = os.wait()
            mutant, folder, began = running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            log = (folder / "log").read_text(errors="replace") if (folder / "log").exists() else ""
            outcome = {0: "SURVIVED", 1: "killed"}.get(
                code if "Timeout (" not in log else REFUSED, "ERROR"
            )
            yield mutant, outcome, time.perf_counter() - began, f"exit code {code}\n{log}"
            shutil.rmtree(folder, ignore_errors=True)


def main(words: list[str]) -> int:
    """Try all defects, or those whose name has one of these words; print a line each and a summary."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    chosen = [
        mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)
    ]
    fresh = [mutant for mutant in chosen if occurrences(mutant) == 1]
    wrong = [
        f"STALE {m.name}: {occurrences(m)} times in {m.file}" for m in chosen if m not in fresh
    ]
    settings.register_profile("no shrinking", phases=[Phase.explicit, Phase.generate])
    settings.load_profile("no shrinking")
    if any(mutant.tests == PARITY for mutant in fresh):
        preload()
    gc.freeze()  # what is here now stays: no child looks through it
    right, outcomes = ("killed", "passed"), dict(tried(controls(fresh) + fresh, AT_ONCE))
    again = [mutant for mutant, outcome in outcomes.items() if outcome not in right]
    said = [f"{outcomes[mutant]} at first: {mutant.name}" for mutant in again]
    outcomes |= dict(tried(again, 1))
    wrong += [
        f"{outcome} {mutant.name}" for mutant, outcome in outcomes.items() if outcome not in right
    ]
    killed = sum(outcome == "killed" for outcome in outcomes.values())
    print(
        *said,
        *wrong,
        f"{killed} of {len(chosen)} killed in {time.perf_counter() - began:.0f} s",
        sep="\n",
    )
    return int(bool(wrong) or not chosen)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
    sys.exit(130)
