"""Does an answer keep to the form that is asked for: a pattern of the user's, or else the form of the reference."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sft.errors import ConfigError
from sft.metrics import schema

_ITEM = re.compile(r"\s*(?:[-*+•]|\d+[.)])\s+\S")
_NUMBER = re.compile(r"[-+]?[$€£]?\d[\d.,]*%?")


def form(text: str) -> str:
    """The form of a text: nothing, json, number, code (fenced), list, table, N fields (a line parted by `|`), line or
    lines."""
    text = text.strip()
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return "nothing"
    if text[0] in "{[" and not schema.broken(schema.parse(text)):
        return "json"
    if _NUMBER.fullmatch(text):
        return "number"
    if text.startswith("```"):
        return "code"
    if len(lines) > 1 and all(_ITEM.match(line) for line in lines):
        return "list"
    if len(lines) > 1 and all(line.lstrip().startswith("|") for line in lines):
        return "table"
    if len(lines) == 1 and "|" in text:
        return f"{text.count('|') + 1} fields"
    return "line" if len(lines) == 1 else "lines"


def adherence(prediction: str, references: Sequence[str], pattern: re.Pattern[str] | None) -> float:
    """1 when the whole answer matches the pattern; without one, when its form is that of a reference."""
    if pattern is not None:
        return float(pattern.fullmatch(prediction.strip()) is not None)
    return float(form(prediction) in {form(reference) for reference in references})


def compiled(pattern: str | None) -> re.Pattern[str] | None:
    """The pattern of `eval.format`, in which a dot is any letter, line breaks too. Raises ConfigError."""
    try:
        return None if pattern is None else re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(
            f"not a regular expression: {error}", where="eval.format", mend="mend it, or set it to null"
        ) from None
