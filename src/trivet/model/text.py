"""Turn prompts and completions into token ids: strings as they are, conversations through the chat
template.
"""

from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from trivet.errors import InputError, first_line
from trivet.model.trust import refusal, trusted

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '\n\n' if not loop.first else '' }}{{ message['role'] | "
    "capitalize + ':' }}"
    "{{ ' ' + message['content'] | trim }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% "
    "endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


def load_tokenizer(name: str, chat_template: str = "") -> Any:
    """Load the tokenizer of a model folder or hub name. chat_template: 'plain' (Role: text) or a
    Jinja file that replaces the tokenizer's own.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trusted())
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise InputError(
            f"tokenizer of {name}: {refusal(error)}"
            if refusal(error)
            else f"{name} has no tokenizer ({first_line(error)}); add one with "
            "tokenizer.save_pretrained"
        ) from error
    if chat_template == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    elif chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--chat-template takes 'plain' or the path of a Jinja template: {error}"
            ) from None
    return tokenizer


def stop_ids(name: str, tokenizer: Any) -> list[int]:
    """Return every token id that ends a completion: the tokenizer's EOS first, then those of the
    generation config.
    """
    try:
        configured = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        configured = None
    configured = [configured] if isinstance(configured, int) else configured or []
    first = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = list(dict.fromkeys([*first, *configured]))
    if not ids:
        raise InputError(
            f"{name}: neither its tokenizer nor its generation config names an EOS token; set "
            "tokenizer.eos_token"
        )
    return ids


def is_conversation(value: Any) -> bool:
    """Return whether this is a list of messages, each {"role": str, "content": str} or with tool
    calls instead of content.
    """
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and (isinstance(message.get("content"), str) or bool(message.get("tool_calls")))
        for message in value
    )


def render(tokenizer: Any, messages: list[dict[str, Any]], *, reply: bool) -> str:
    """Render a conversation with the chat template; reply: append the opening of the assistant's
    next turn.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"the data holds conversations, but the tokenizer of {tokenizer.name_or_path} has no "
            "chat template; pass --chat-template plain or --chat-template FILE.jinja"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
    except Exception as error:  # templates can raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the chat template fails on messages of roles {roles}: {first_line(error)}"
        ) from error


def prompt_text(tokenizer: Any, prompt: Any) -> str:
    """Return what the model reads before it answers."""
    return render(tokenizer, prompt, reply=True) if is_conversation(prompt) else prompt


def text_before_answer(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """Render a conversation up to where an existing answer begins: with the opening of a reply,
    minus what the template does not write before existing answers, the <think> that some reasoning
    models are prompted with.
    """
    cache: dict[str, str] = tokenizer.__dict__.setdefault("_generation_only", {})
    template = str(tokenizer.chat_template)
    if template not in cache:
        cache[template], question = "", {"role": "user", "content": "."}
        with suppress(InputError):  # a template that needs more than a user's message
            opened = render(tokenizer, [question], reply=True)
            bare = render(tokenizer, [question], reply=False)
            answer = {"role": "assistant", "content": "."}
            answered = render(tokenizer, [question, answer], reply=False)
            alike = takewhile(lambda pair: pair[0] == pair[1], zip(opened, answered, strict=False))
            shared = "".join(letter for letter, _ in alike)
            cache[template] = opened[len(shared) :] if shared.startswith(bare) else ""
    return render(tokenizer, messages, reply=True).removesuffix(cache[template])


def encode_prompt(tokenizer: Any, prompt: Any, *, has_answer: bool = False) -> list[int]:
    """Return the token ids of a prompt: a string with the tokenizer's BOS, a conversation as its
    template renders it.

    has_answer: the prompt precedes an existing answer rather than one to be sampled.
    """
    if has_answer and is_conversation(prompt):
        return _encode(tokenizer, text_before_answer(tokenizer, prompt), special=False)
    return _encode(tokenizer, prompt_text(tokenizer, prompt), special=not is_conversation(prompt))


def encode_completion(
    tokenizer: Any, prompt: Any, prompt_ids: Sequence[int], completion: Any, stops: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a completion of a `has_answer` prompt, ending in EOS, and which of
    them are trained: the assistant's own text and the EOS of each of its turns.

    The text is tokenized as a continuation of its prompt if the prompt's tokens stay the same, and
    on its own if a merge would cross the boundary. completion: a string, or messages of which the
    assistant's are trained.
    """
    if not is_conversation(completion):
        ids = _continue(
            tokenizer, prompt_text(tokenizer, prompt), prompt_ids, completion, special=True
        )
        return [*ids, stops[0]], [True] * (len(ids) + 1)
    messages = list(prompt)
    before = text_before_answer(tokenizer, messages)
    ids, learned = list(prompt_ids), [False] * len(prompt_ids)
    for turn, message in enumerate(completion):
        is_assistant = message["role"] == "assistant"
        messages.append(message)
        following = (
            turn + 1 < len(completion)
            and completion[turn + 1]["role"] == "assistant"
            and not is_assistant
        )
        after = (
            text_before_answer(tokenizer, messages)
            if following
            else render(tokenizer, messages, reply=False)
        )
        if not after.startswith(before):
            raise InputError(
                "the chat template rewrites earlier turns, so they can't be trained turn by turn; "
                "move all but the last answer into the prompt"
            )
        new = _continue(tokenizer, before, ids, after[len(before) :], special=False)
        end = max((i + 1 for i, token in enumerate(new) if token in stops), default=len(new))
        if is_assistant and (end == 0 or new[end - 1] not in stops):
            new, end = [*new, stops[0]], len(new) + 1
        ids, learned = ids + new, learned + [is_assistant and i < end for i in range(len(new))]
        before = after
    # Text after the last trained EOS is not needed.
    last = max((i + 1 for i, flag in enumerate(learned) if flag), default=0)
    return ids[len(prompt_ids) : last], learned[len(prompt_ids) : last]


def decode_completion(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text that these tokens add to their prompt, without special tokens."""
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    after = tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=True)
    return (
        after[len(before) :]
        if after.startswith(before)
        else tokenizer.decode(ids, skip_special_tokens=True)
    )


def _encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    try:
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    except TypeError:  # tokenizers' error for half of a surrogate pair
        raise InputError(
            "its text is not valid Unicode (it contains half of a surrogate pair); repair or "
            "remove it"
        ) from None
    return ids[:-1] if special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _continue(
    tokenizer: Any, before: str, before_ids: Sequence[int], text: str, *, special: bool
) -> list[int]:
    joint = _encode(tokenizer, before + text, special=special)
    if joint[: len(before_ids)] == list(before_ids):
        return joint[len(before_ids) :]
    return _encode(tokenizer, text, special=False)
