"""The in-process engine samples from the learner's distribution, and says what it sampled with which probability."""

import pytest
import torch
from transformers import MambaConfig, MistralConfig

from conftest import tiny
from trivet.batch import Example
from trivet.generation.engine import Engine
from trivet.model.forward import shares_prefix, token_logprobs

PROMPTS = [
    Example(prompt=ids, completions=[], learned=[], row={"prompt": str(ids)})
    for ids in ([5, 6, 7], [9], [8, 3, 2, 1, 4])
]


def engine(
    room: int = 12, stops: tuple[int, ...] = (0, 1), temperature: float = 1.0, seed: int = 0
) -> Engine:
    def decode(prompt, ids):
        return " ".join(map(str, ids))

    return Engine(decode, stops, room, temperature, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_logprobs_are_the_learners(model, temperature):
    rollouts = engine(temperature=temperature).generate(model, PROMPTS, 5)
    learner = token_logprobs(model, rollouts.groups, temperature=temperature)
    torch.testing.assert_close(rollouts.logprobs, learner, rtol=0, atol=1e-5)
    assert (rollouts.logprobs[~rollouts.groups.mask] == 0).all()


def test_greedy_decoding_is_transformers_greedy_decoding(model):
    rollouts = engine(room=10, stops=(60,), temperature=0.0).generate(model, PROMPTS, 1)
    for b, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt.prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=60,
            pad_token_id=60,
        )
        ours = rollouts.groups.completions[b][rollouts.groups.present[b]]
        assert ours.tolist() == theirs[0, len(prompt.prompt) :].tolist()


def test_rows_end_at_any_stop_id_and_stay_as_they_were(model):
    rollouts = engine(room=30, stops=(3, 11, 25)).generate(model, PROMPTS, 16)
    groups = rollouts.groups
    for b in range(len(groups.completions)):
        ids = groups.completions[b][groups.present[b]].tolist()
        stops = [i for i, token in enumerate(ids) if token in (3, 11, 25)]
        assert stops == ([len(ids) - 1] if rollouts.finished[b] else [])
        assert rollouts.finished[b] or len(ids) == 30
        text = ids[:-1] if rollouts.finished[b] else ids
        assert rollouts.texts[b] == " ".join(map(str, text))
    assert rollouts.finished.any()
    assert groups.completions.shape[1] == groups.present.sum(1).max()


def test_the_same_seed_samples_the_same_and_another_does_not(model):
    first, again, other = (
        engine(seed=seed).generate(model, PROMPTS, 4).groups.completions for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_frequencies_of_the_first_token_match_the_model(model):
    rollouts = engine(room=1, stops=(60,)).generate(model, PROMPTS[:1], 20_000)
    counts = torch.bincount(rollouts.groups.completions[:, 0], minlength=61) / 20_000
    expected = model(torch.tensor([PROMPTS[0].prompt])).logits[0, -1].softmax(-1)
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert ((counts - expected).abs() < 5 * error + 1e-4).all()


def test_sliding_windows_hold_while_decoding():
    model = tiny(MistralConfig, sliding_window=4)
    rollouts = engine(stops=(60,)).generate(model, PROMPTS, 3)
    assert shares_prefix(model)
    torch.testing.assert_close(
        rollouts.logprobs, token_logprobs(model, rollouts.groups), rtol=0, atol=1e-5
    )


@pytest.fixture
def recurrent():
    """A model that can't share a prefix."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(
        MambaConfig(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    ).eval()
    assert not shares_prefix(model)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_recurrent_model_samples_through_transformers(recurrent, temperature):
    rollouts = engine(temperature=temperature).generate(recurrent, PROMPTS[:1], 3)
    assert rollouts.groups.completions.shape[0] == 3
    learner = token_logprobs(recurrent, rollouts.groups, temperature=temperature)
    torch.testing.assert_close(rollouts.logprobs, learner, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_recurrent_model_ends_at_any_stop_which_is_part_of_the_completion(recurrent):
    rollouts = engine(room=20, stops=(3, 11, 25, 40, 41, 42)).generate(recurrent, PROMPTS, 8)
    for b, ids in enumerate(rollouts.groups.completions):
        tokens = ids[rollouts.groups.present[b]].tolist()
        ends = [i for i, token in enumerate(tokens) if token in (3, 11, 25, 40, 41, 42)]
        assert ends == ([len(tokens) - 1] if rollouts.finished[b] else [])
    assert rollouts.finished.any()


@pytest.mark.filterwarnings("ignore")
def test_a_recurrent_model_repeats_with_the_seed_and_heeds_no_settings_but_the_engines(recurrent):
    def sample(seed: int):
        return (
            engine(room=20, stops=(60,), seed=seed)
            .generate(recurrent, PROMPTS, 4)
            .groups.completions
        )

    first = sample(0)
    assert torch.equal(first, sample(0))
    assert not torch.equal(first, sample(1))
    recurrent.generation_config.repetition_penalty, recurrent.generation_config.min_p = 5.0, 0.5
    assert torch.equal(first, sample(0))


@pytest.mark.filterwarnings("ignore")
def test_a_recurrent_model_can_be_greedy(recurrent):
    rollouts = engine(room=5, stops=(60,), temperature=0.0).generate(recurrent, PROMPTS[:1], 2)
    assert torch.equal(rollouts.groups.completions[0], rollouts.groups.completions[1])
