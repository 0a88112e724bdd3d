"""What one render of a template may still spend: time, text, and the size of what it builds."""

from __future__ import annotations

import re
import time
from typing import Any

import jinja2

SECONDS = 5.0
MOST_TEXT = 100_000_000  # characters that one render may make on the way, all pieces counted
MOST_OUTPUT = 20_000_000  # characters of one text
MOST_NUMBER = 1_000_000  # largest number that a filter or a method takes
ITEM = 16  # characters that one item of a list costs
_WIDE = re.compile(r"\d{6,}|%[-+ #0]*\*|%[^%a-zA-Z]*\.\*")


class OutOfBounds(jinja2.TemplateError):
    """The template takes too long or makes too much text."""


class Purse:
    """What one render may still spend."""

    def __init__(self) -> None:
        self.until = time.monotonic() + SECONDS
        self.text = MOST_TEXT
        self._weights: dict[int, tuple[Any, int]] = {}  # by identity; the value is held, so that it stays the same

    def tick(self) -> None:
        if time.monotonic() > self.until:
            raise OutOfBounds(f"the template runs for more than {SECONDS:g} seconds")

    def spend(self, size: int) -> None:
        self.text -= size
        if size > MOST_OUTPUT or self.text < 0:
            most = MOST_OUTPUT if size > MOST_OUTPUT else MOST_TEXT
            raise OutOfBounds(f"the template makes more than {most:,} characters of text")

    def weighed(self, value: Any) -> Any:
        """The value, if it is small when written out in full: `[x, x]` holds x twice, and 40 levels of it no memory.

        Whatever walks through a value (text, JSON, `==`, sorting) takes as long as it is large. Sandboxed templates
        cannot change a list or mapping, so what one weighs is reckoned once.
        """
        if isinstance(value, (list, tuple, dict, set, frozenset)):
            self._weight(value)
        return value

    def _weight(self, value: Any) -> int:
        if isinstance(value, (str, bytes)):
            return ITEM + len(value)
        if isinstance(value, int):
            return ITEM + value.bit_length() // 3
        if not isinstance(value, (list, tuple, dict, set, frozenset)):
            return ITEM
        if (known := self._weights.get(id(value))) is not None:
            return known[1]
        self.tick()
        weight = ITEM + sum(map(self._weight, value))
        if isinstance(value, dict):
            weight += sum(map(self._weight, value.values()))
        if weight > MOST_OUTPUT:
            raise OutOfBounds(f"the template builds a value that is more than {MOST_OUTPUT:,} characters when written")
        self._weights[id(value)] = value, weight
        return weight


def check_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if type(value) is int and not -MOST_NUMBER <= value <= MOST_NUMBER:
            raise OutOfBounds(f"the template gives the number {value:.3e} to a filter or method")


def check_format(text: str | bytes) -> None:
    if _WIDE.search(text if isinstance(text, str) else text.decode("latin-1")):
        raise OutOfBounds("the template formats to a very large width")


def product(operator: str, left: Any, right: Any) -> int:
    """Characters, items or bits that a product or power will have."""
    for sized, number in ((left, right), (right, left)):
        if isinstance(sized, (str, bytes, list, tuple)):
            each = 1 if isinstance(sized, (str, bytes)) else ITEM
            return each * len(sized) * number if isinstance(number, int) else 0
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_NUMBER:
            raise OutOfBounds("the template computes a very large number")
    return 0


def replaced(text: Any, old: Any, new: Any) -> int:
    if not isinstance(old, (str, bytes)) or not isinstance(new, (str, bytes)):
        return 0
    times = text.count(old) if old else len(text) + 1
    return len(text) + int(times) * len(new)
