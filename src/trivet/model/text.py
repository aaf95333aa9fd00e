"""Prompts and completions to token ids: strings as they are, conversations through the chat template."""

from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from trivet.errors import InputError, first_line
from trivet.model.trust import refusal, trusted

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '\n\n' if not loop.first else '' }}{{ message['role'] | capitalize + ':' }}"
    "{{ ' ' + message['content'] | trim }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


def load_tokenizer(name: str, chat_template: str = "") -> Any:
    """The tokenizer of a model folder or hub name. chat_template: 'plain' (Role: text) or a Jinja file, to replace its own."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trusted())
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise InputError(
            f"tokenizer of {name}: {refusal(error)}"
            if refusal(error)
            else f"{name}: no tokenizer there ({first_line(error)}); add it with tokenizer.save_pretrained"
        ) from error
    if chat_template == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    elif chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--chat-template takes 'plain' or the path of a Jinja template: {error}") from None
    return tokenizer


def stop_ids(name: str, tokenizer: Any) -> list[int]:
    """Every token id that ends a completion: those of the generation config, and the tokenizer's EOS, which comes first."""
    try:
        configured = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        configured = None
    configured = [configured] if isinstance(configured, int) else configured or []
    first = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = list(dict.fromkeys([*first, *configured]))
    if not ids:
        raise InputError(
            f"{name}: neither its tokenizer nor its generation config names an EOS token; set tokenizer.eos_token"
        )
    return ids


def is_conversation(value: Any) -> bool:
    """Whether this is a list of messages, each {"role": str, "content": str}, or with tool calls for content."""
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and (isinstance(message.get("content"), str) or bool(message.get("tool_calls")))
        for message in value
    )


def render(tokenizer: Any, messages: list[dict[str, Any]], *, reply: bool) -> str:
    """The conversation as the chat template writes it; reply: with the opening of the assistant's next turn."""
    if not tokenizer.chat_template:
        raise InputError(
            f"the data holds conversations, but the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "give one with --chat-template plain or --chat-template FILE.jinja"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
    except Exception as error:  # a stranger's template
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(f"the chat template fails on messages of roles {roles}: {first_line(error)}") from error


def prompt_text(tokenizer: Any, prompt: Any) -> str:
    """What the model reads before it answers."""
    return render(tokenizer, prompt, reply=True) if is_conversation(prompt) else prompt


def before_answer(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """The conversation up to where an answer that is given begins: what opens a reply, but for what the template writes before
    none, the <think> that some reasoning models are opened with."""
    known, template = tokenizer.__dict__.setdefault("_opens_with", {}), str(tokenizer.chat_template)
    if template not in known:
        known[template], asked = "", {"role": "user", "content": "."}
        with suppress(InputError):  # a template that wants more than a user's message
            opened, bare = render(tokenizer, [asked], reply=True), render(tokenizer, [asked], reply=False)
            answered = render(tokenizer, [asked, {"role": "assistant", "content": "."}], reply=False)
            alike = takewhile(lambda pair: pair[0] == pair[1], zip(opened, answered, strict=False))
            shared = "".join(letter for letter, _ in alike)
            known[template] = opened[len(shared) :] if shared.startswith(bare) else ""
    return render(tokenizer, messages, reply=True).removesuffix(known[template])


def encode_prompt(tokenizer: Any, prompt: Any, *, answered: bool = False) -> list[int]:
    """Token ids of a prompt: a string with the tokenizer's own BOS, a conversation with what its template writes.

    answered: before an answer that is given, not before one that is to be sampled.
    """
    if answered and is_conversation(prompt):
        return _encode(tokenizer, before_answer(tokenizer, prompt), special=False)
    return _encode(tokenizer, prompt_text(tokenizer, prompt), special=not is_conversation(prompt))


def encode_completion(
    tokenizer: Any, prompt: Any, prompt_ids: Sequence[int], completion: Any, stops: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """Token ids of a completion of an `answered` prompt, ending in EOS, and which of them the policy learns: its own words and each final EOS.

    The text is tokenized as the continuation of its prompt where the prompt's tokens stay the same, on its own where a
    merge would cross the border. completion: a string, or messages of which the assistant's are learned.
    """
    if not is_conversation(completion):
        ids = _continue(tokenizer, prompt_text(tokenizer, prompt), prompt_ids, completion, special=True)
        return [*ids, stops[0]], [True] * (len(ids) + 1)
    messages = list(prompt)
    before, ids, learned = before_answer(tokenizer, messages), list(prompt_ids), [False] * len(prompt_ids)
    for turn, message in enumerate(completion):
        own = message["role"] == "assistant"
        messages.append(message)
        following = turn + 1 < len(completion) and completion[turn + 1]["role"] == "assistant" and not own
        after = before_answer(tokenizer, messages) if following else render(tokenizer, messages, reply=False)
        if not after.startswith(before):
            raise InputError(
                "the chat template rewrites earlier turns, so they can't be trained turn by turn; "
                "put all but the last answer into the prompt"
            )
        new = _continue(tokenizer, before, ids, after[len(before) :], special=False)
        end = max((i + 1 for i, token in enumerate(new) if token in stops), default=len(new))
        if own and (end == 0 or new[end - 1] not in stops):
            new, end = [*new, stops[0]], len(new) + 1
        ids, learned = ids + new, learned + [own and i < end for i in range(len(new))]
        before = after
    last = max((i + 1 for i, flag in enumerate(learned) if flag), default=0)  # what follows the last EOS is not needed
    return ids[len(prompt_ids) : last], learned[len(prompt_ids) : last]


def decode_completion(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text that these tokens add to their prompt, special tokens left out."""
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    after = tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=True)
    return after[len(before) :] if after.startswith(before) else tokenizer.decode(ids, skip_special_tokens=True)


def _encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    try:
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    except TypeError:  # how tokenizers meets half of a surrogate pair
        raise InputError("its text is not valid Unicode (half of a surrogate pair); repair or remove it") from None
    return ids[:-1] if special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _continue(tokenizer: Any, before: str, before_ids: Sequence[int], text: str, *, special: bool) -> list[int]:
    joint = _encode(tokenizer, before + text, special=special)
    if joint[: len(before_ids)] == list(before_ids):
        return joint[len(before_ids) :]
    return _encode(tokenizer, text, special=False)
