"""What each format yields: which tokens are given, which are learned, what is left out, and how prompts are split."""

import csv
import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from trivet.batch import Example
from trivet.cli.main import main
from trivet.data.examples import load_examples, split_by_prompt
from trivet.data.rows import read_rows
from trivet.model.text import (
    PLAIN_TEMPLATE,
    encode_completion,
    encode_prompt,
    load_tokenizer,
    stop_ids,
)
from trivet.recipes.offline import to_groups

EOS = 0
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
MORE, AGAIN = {"role": "user", "content": "and"}, {"role": "assistant", "content": "so"}


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, and one merge: a b -> ab."""
    letters = {
        letter: i + 1 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    raw = Tokenizer(models.BPE(vocab={"<eos>": EOS, **letters, "ab": 257}, merges=[("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    fast.chat_template = PLAIN_TEMPLATE
    return fast


@pytest.fixture
def load(tokenizer, tmp_path):
    """Examples of rows, and the counts."""

    def run(
        form: str, *rows: dict, max_prompt: int = 100, max_completion: int = 100, **options
    ) -> tuple[list[Example], Counter]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        counts: Counter[str] = Counter()
        limits = {"max_prompt": max_prompt, "max_completion": max_completion, **options}
        return load_examples(
            str(tmp_path / "rows.jsonl"), tokenizer, [EOS], form, counts=counts, **limits
        ), counts

    return run


def texts(tokenizer, example: Example) -> tuple[str, list[str]]:
    return tokenizer.decode(example.prompt), [tokenizer.decode(ids) for ids in example.completions]


def learned(tokenizer, example: Example, side: int = 0) -> list[str]:
    """The learned stretches of a completion."""
    pairs = list(zip(example.completions[side], example.learned[side], strict=True))
    words, open_ = [], False
    for token, flag in pairs:
        if flag:
            words = [*words, [token]] if not open_ else [*words[:-1], [*words[-1], token]]
        open_ = flag
    return [tokenizer.decode(word) for word in words]


def test_text_learns_all_but_its_first_token_and_then_eos(load, tokenizer):
    [example], _ = load("supervised", {"text": "hello"})
    assert texts(tokenizer, example) == ("h", ["ello<eos>"])
    assert all(example.learned[0])


@pytest.mark.parametrize("column", ["completion", "chosen"])
def test_prompt_and_completion(load, tokenizer, column):
    [example], _ = load("supervised", {"prompt": "2+2=", column: "4", "other": 1})
    assert texts(tokenizer, example) == ("2+2=", ["4<eos>"])
    assert example.learned == [[True, True]]
    assert example.row["other"] == 1


def test_messages_learn_the_assistants_turns_each_with_its_eos(load, tokenizer):
    [example], _ = load("supervised", {"messages": [USER, ANSWER, MORE, AGAIN]})
    assert texts(tokenizer, example)[0] == "User: hi\n\nAssistant:"
    assert learned(tokenizer, example) == [" yo<eos>", " so<eos>"]
    assert tokenizer.decode(example.completions[0]) == " yo<eos>\n\nUser: and\n\nAssistant: so<eos>"


def test_messages_after_the_last_answer_are_not_kept(load, tokenizer):
    [example], _ = load("supervised", {"messages": [USER, ANSWER, MORE]})
    assert texts(tokenizer, example) == ("User: hi\n\nAssistant:", [" yo<eos>"])


@pytest.mark.parametrize("prompt", ["hi", [USER], None])
def test_pairs_of_messages_whether_the_prompt_is_a_string_said_again_or_implicit(
    load, tokenizer, prompt
):
    rejected = ANSWER | {"content": "no"}
    wanted = ("User: hi\n\nAssistant:", [" yo<eos>", " no<eos>"])
    apart = {"prompt": prompt, "chosen": [ANSWER], "rejected": [rejected]}
    again = {"prompt": prompt, "chosen": [USER, ANSWER], "rejected": [USER, rejected]}
    for row in [again] if prompt is None else [apart, again]:
        [example], _ = load("preference", row)
        assert texts(tokenizer, example) == wanted
        [example], _ = load("supervised", row)
        assert texts(tokenizer, example) == (wanted[0], wanted[1][:1])


def test_pairs_of_strings(load, tokenizer):
    [example], _ = load("preference", {"prompt": "2+2=", "chosen": "4", "rejected": "5"})
    assert texts(tokenizer, example) == ("2+2=", ["4<eos>", "5<eos>"])
    groups = to_groups([example], "cpu")
    assert groups.group_size == 2
    assert groups.completions.shape == (2, 2)


def test_implicit_prompt_of_transcripts(load, tokenizer):
    start = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: and\n\nAssistant:"
    row = {"chosen": start + " so be it", "rejected": start + " so no"}
    for form, wanted in {
        "preference": [" so be it<eos>", " so no<eos>"],
        "supervised": [" so be it<eos>"],
    }.items():
        [example], _ = load(form, row)
        assert texts(tokenizer, example) == (start, wanted)
    [example], _ = load("prompts", row)
    assert texts(tokenizer, example) == (start, [])
    assert example.row["prompt"] == start


def test_implicit_prompt_of_strings_ends_before_a_space(load, tokenizer):
    [example], _ = load("preference", {"chosen": "The sky is blue", "rejected": "The sky is black"})
    assert texts(tokenizer, example) == ("The sky is", [" blue<eos>", " black<eos>"])


def test_prompts_keep_their_columns_and_rewards_see_the_prompt_of_messages(load, tokenizer):
    [one, two], _ = load("prompts", {"prompt": "2+2=", "answer": 4}, {"messages": [USER, ANSWER]})
    assert texts(tokenizer, one) == ("2+2=", [])
    assert one.row == {"prompt": "2+2=", "answer": 4}
    assert texts(tokenizer, two) == ("User: hi\n\nAssistant:", [])
    assert two.row["prompt"] == [USER]


def test_a_string_may_answer_a_conversation(load, tokenizer):
    [example], _ = load("supervised", {"prompt": [USER], "completion": " yo"})
    assert texts(tokenizer, example) == ("User: hi\n\nAssistant:", [" yo<eos>"])


def test_completions_are_tokenized_with_their_prompt_except_where_that_would_change_the_prompt(
    load, tokenizer
):
    [inside, across], _ = load(
        "supervised", {"prompt": "x", "completion": "ab"}, {"prompt": "xa", "completion": "bc"}
    )
    assert inside.completions == [[257, EOS]]
    assert across.prompt == tokenizer.convert_tokens_to_ids(["x", "a"])
    assert across.completions == [[*tokenizer.convert_tokens_to_ids(["b", "c"]), EOS]]


def test_long_rows_are_counted(load):
    row = {"prompt": "2+2=", "completion": "4"}
    rows = [row, row | {"prompt": "1" * 11}, row | {"completion": "123456"}]
    examples, counts = load("supervised", *rows, max_prompt=10, max_completion=5)
    assert counts["left out: prompt over 10 tokens"] == 1
    assert counts["cut: completion over 5 tokens (its EOS is not learned)"] == 1
    assert counts["examples"] == len(examples) == 2
    assert len(examples[1].completions[0]) == len(examples[1].learned[0]) == 5
    assert EOS not in examples[1].completions[0]


def test_a_long_prompt_may_keep_its_end(load, tokenizer):
    row = {"prompt": "0123456789+1=", "completion": "x"}
    [example], counts = load("supervised", row, max_prompt=5, truncate_prompts=True)
    assert tokenizer.decode(example.prompt) == "89+1="
    assert counts["cut: prompt over 5 tokens (its end is kept)"] == 1


def test_a_completion_without_an_assistants_turn_is_counted_and_a_cut_keeps_what_came_before(load):
    row = {"prompt": [USER], "completion": [ANSWER, MORE, AGAIN]}
    nobody = {"prompt": [USER], "completion": [ANSWER | {"role": "Assistant"}]}
    [example], counts = load("supervised", row, nobody, max_completion=6)
    assert example.learned[0] == [True] * 4 + [False] * 2
    assert counts["left out: nothing to learn"] == 1


def test_chosen_equal_to_rejected_and_empty_sides_are_counted(load):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    messages = {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}
    silent = {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER | {"content": ""}]}
    _, counts = load(
        "preference", pair, pair | {"chosen": "c"}, messages, silent, pair | {"rejected": ""}
    )
    assert counts["left out: chosen equals rejected"] == 2
    assert counts["left out: empty completion"] == 2


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "csv":
        plain = path.with_suffix(".plain")
        with plain.open(
            "w", encoding="utf-8-sig", newline=""
        ) as file:  # with a byte order mark, as Excel writes it
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        content = plain.read_bytes()
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        plain = path.with_suffix(".plain")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
        content = plain.read_bytes()
    else:
        texts = [json.dumps(row, ensure_ascii=False) for row in rows]
        content = ("\n\n".join(texts) if kind == "jsonl" else f"[{','.join(texts)}]").encode(
            "utf-8-sig"
        )
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("packed", ["", ".gz", ".GZ"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind, packed):
    rows = [
        {"prompt": 'é, "x"\nline\r\n two', "completion": "1" * 200_000},
        {"prompt": "\u2028", "completion": "0"},
    ]
    if packed == ".GZ":
        (tmp_path / f"A.{kind.upper()}.GZ").write_bytes(
            write(tmp_path / f"a.{kind}.gz", rows).read_bytes()
        )
        assert list(read_rows(str(tmp_path / f"A.{kind.upper()}.GZ"))) == rows
    else:
        assert list(read_rows(str(write(tmp_path / f"a.{kind}{packed}", rows)))) == rows


def test_split_puts_all_rows_of_a_prompt_on_one_side_whatever_their_order(load):
    rows = [{"prompt": f"{i % 40}", "completion": f"{i}"} for i in range(120)]
    examples, _ = load("supervised", *rows)
    train, heldout = split_by_prompt(examples, 0.3, seed=0)
    assert len(train) + len(heldout) == 120
    assert len(heldout) % 3 == 0
    assert 3 * 4 <= len(heldout) <= 3 * 20
    assert not {tuple(e.prompt) for e in train} & {tuple(e.prompt) for e in heldout}
    mixed = random.Random(0).sample(examples, len(examples))
    assert {id(e) for e in split_by_prompt(mixed, 0.3, seed=0)[1]} == {id(e) for e in heldout}
    assert {id(e) for e in split_by_prompt(examples, 0.3, seed=1)[1]} != {id(e) for e in heldout}
    assert split_by_prompt(examples, 0.0, seed=0)[1] == []


SHARED_FILES = [
    ("preference/hh_harmless_base_test.raw.jsonl.gz", "preference"),
    ("preference/hh_harmless_base_test.jsonl.gz", "preference"),
    ("preference/tulu3_if_sample.jsonl.gz", "preference"),
    ("preference/tldr_oai1b_judged.jsonl.gz", "preference"),
    ("preference/oasst_en100_pairs.jsonl.gz", "prompts"),
    ("preference/kto_en_demo_unpaired.jsonl.gz", "supervised"),
    ("sft/oasst_en100_best_threads.jsonl.gz", "supervised"),
    ("text/tinystories_2300.jsonl.gz", "supervised"),
    ("math/gsm8k_test.jsonl.gz", "prompts"),
]


@pytest.mark.shared
@pytest.mark.parametrize(("name", "form"), SHARED_FILES)
def test_real_files(shared, tmp_path, name, form):
    folder = shared / "models" / "stories260K"
    tokenizer = load_tokenizer(str(folder), "plain")
    rows = [row for row, _ in zip(read_rows(str(shared / "data" / name)), range(100), strict=False)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts: Counter[str] = Counter()
    limits = {"max_prompt": 5000, "max_completion": 100_000}
    stops = stop_ids(str(folder), tokenizer)
    examples = load_examples(
        str(tmp_path / "a.jsonl"), tokenizer, stops, form, counts=counts, **limits
    )
    left = sum(count for reason, count in counts.items() if reason.startswith("left out"))
    assert counts["rows read"] == 100 == len(examples) + left
    assert left <= 10
    for example in examples:
        assert len(example.completions) == {"preference": 2, "supervised": 1, "prompts": 0}[form]
        for ids, flags in zip(example.completions, example.learned, strict=True):
            assert ids[-1] in stops
            assert flags[-1]


@pytest.mark.shared
def test_a_prefix_space_is_not_put_between_prompt_and_completion(shared, tmp_path):
    tokenizer = load_tokenizer(str(shared / "models" / "stories260K"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Once upon", "completion": " a time"}))
    limits = {"max_prompt": 100, "max_completion": 100}
    [example] = load_examples(
        str(tmp_path / "a.jsonl"), tokenizer, [2], "supervised", counts=Counter(), **limits
    )
    whole = tokenizer("Once upon a time")["input_ids"]
    assert example.prompt + example.completions[0] == [*whole, 2]


@pytest.mark.shared
def test_conversations_through_a_real_chat_template(shared):
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "minimind-6400"))
    stops = [tokenizer.eos_token_id]
    prompt = encode_prompt(tokenizer, [USER])
    ids, flags = encode_completion(tokenizer, [USER], prompt, [ANSWER, MORE, AGAIN], stops)
    words = tokenizer.decode([token for token, flag in zip(ids, flags, strict=True) if flag])
    assert words == f"yo{tokenizer.eos_token}so{tokenizer.eos_token}"
    whole = tokenizer.apply_chat_template([USER, ANSWER, MORE, AGAIN], tokenize=False)
    assert whole.startswith(tokenizer.decode(prompt + ids))


THINKING = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + (eos_token if m['role'] == 'assistant' else '') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]<think>' }}{% endif %}"
)


def test_a_template_that_opens_replies_otherwise_than_it_writes_answers(tokenizer):
    """As of reasoning models, whose replies are opened with <think> and whose answers are kept without it."""
    tokenizer.chat_template = THINKING
    prompt = encode_prompt(tokenizer, [USER], has_answer=True)
    ids, flags = encode_completion(tokenizer, [USER], prompt, [ANSWER, MORE, AGAIN], [EOS])
    whole = tokenizer.apply_chat_template([USER, ANSWER, MORE, AGAIN], tokenize=False)
    assert tokenizer.decode(prompt + ids) == whole
    assert tokenizer.decode(prompt).endswith("[assistant]")
    words = tokenizer.decode([token for token, flag in zip(ids, flags, strict=True) if flag])
    assert words == f"{ANSWER['content']}<eos>{AGAIN['content']}<eos>"
    assert tokenizer.decode(encode_prompt(tokenizer, [USER])).endswith("[assistant]<think>")


@pytest.mark.shared
@pytest.mark.slow
def test_a_run_on_real_conversations(shared, tmp_path):
    data = shared / "data" / "preference" / "hh_harmless_base_test.jsonl.gz"
    options = [
        "--model",
        str(shared / "models" / "stories260K"),
        "--data",
        str(data),
        "--chat-template",
        "plain",
    ]
    small = [
        "--steps",
        "1",
        "--prompts-per-step",
        "2",
        "--eval-limit",
        "2",
        "--max-completion-tokens",
        "30",
    ]
    assert main(["dpo", *options, *small, "--out", str(tmp_path / "run")]) == 0
    counts = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    assert counts["rows read"] == 2299
    assert counts["examples"] == counts["for training"] + counts["held out"]


def test_every_stop_counts_the_tokenizers_own_first(tokenizer, tmp_path):
    GenerationConfig(eos_token_id=[5, 7]).save_pretrained(tmp_path)
    assert stop_ids(str(tmp_path), tokenizer) == [EOS, 5, 7]


def test_a_prompt_does_not_keep_the_eos_that_its_tokenizer_appends(tokenizer):
    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", EOS)]
    )
    appending = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    assert appending("hi")["input_ids"][-1] == EOS
    assert encode_prompt(appending, "hi") == encode_prompt(tokenizer, "hi")


def test_what_the_user_said_in_between_is_present_and_not_learned(load):
    [example], _ = load("supervised", {"messages": [USER, ANSWER, MORE, AGAIN]})
    groups = to_groups([example], "cpu")
    assert groups.mask[groups.present].tolist() == example.learned[0]
    assert (groups.present & ~groups.mask).any()


def test_rows_with_a_label_are_single_completions(load, tokenizer):
    rows = [
        {"prompt": "a", "completion": " b", "label": label} for label in (True, 0, "1", "False")
    ]
    examples, _ = load("feedback", *rows)
    assert [example.row["label"] for example in examples] == [True, False, True, False]
    assert all(len(example.completions) == 1 for example in examples)
    [pair], _ = load("feedback", {"prompt": "a", "chosen": " b", "rejected": " c"})
    assert len(pair.completions) == 2


def test_real_unpaired_feedback(shared, tokenizer):
    path, counts = str(shared / "data/preference/kto_en_demo_unpaired.jsonl.gz"), Counter()
    rows = load_examples(
        path, tokenizer, [EOS], "feedback", max_prompt=9999, max_completion=9999, counts=counts
    )
    assert counts["rows read"] == 300
    assert {example.row["label"] for example in rows} == {True, False}
