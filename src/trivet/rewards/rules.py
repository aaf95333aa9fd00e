"""Rewards that a program can check. Each is a function f(prompts, completions, **columns) -> one
number per completion.
"""

import re
from typing import Any

NUMBER = re.compile(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?")


def text_of(completion: Any) -> str:
    """Return the text of a completion, given as a string or as messages."""
    return (
        completion
        if isinstance(completion, str)
        else "".join(message["content"] for message in completion)
    )


def exact_match(completions: list[Any], answer: list[Any], **columns: Any) -> list[float]:
    """1 where the completion equals the answer up to surrounding white space, else 0."""
    return [
        float(text_of(c).strip() == str(a).strip())
        for c, a in zip(completions, answer, strict=True)
    ]


def last_number(completions: list[Any], answer: list[Any], **columns: Any) -> list[float]:
    """1 where the last number in the completion equals the last one in the answer (72, 72.0,
    1,072), else 0; for GSM8K and similar data.
    """

    def value(text: str) -> float | None:
        numbers = NUMBER.findall(text)
        return float(numbers[-1].replace(",", "")) if numbers else None

    return [
        float((number := value(text_of(c))) is not None and number == value(str(a)))
        for c, a in zip(completions, answer, strict=True)
    ]


def brevity(completions: list[Any], **columns: Any) -> list[float]:
    """Minus the number of words, in hundreds."""
    return [-len(text_of(c).split()) / 100 for c in completions]
