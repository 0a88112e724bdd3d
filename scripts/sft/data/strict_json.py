"""JSON as it is defined, which Python's json is not: NaN, a key given twice, half a surrogate pair, numbers that no
program can hold and bottomless nesting are faults of the row, each with its own words.
"""

from __future__ import annotations

import json
import math
from typing import Any

import orjson

from sft.data.faults import UNREADABLE, RowFault

MOST_DIGITS = 4_300  # what Python itself turns into an int, in every version
MOST_LEVELS = 128  # orjson writes 254; a row that needs 128 is not a row


def parse(text: str) -> Any:
    """The one JSON value in `text`. Raises RowFault with what is wrong and at which column."""
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RowFault(UNREADABLE, f"broken JSON: {error.msg} at column {error.pos + 1}") from None
    except RecursionError:
        raise _too_deep() from None
    check(value, text)
    return value


def check(value: Any, text: str) -> None:
    """Faults that parsing lets through; `text` is what `value` was read from, looked at first because it is cheap."""
    if "\\ud" in text or "\\uD" in text or "\\UD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            said = "half a surrogate pair (\\ud800-\\udfff): the text was cut inside a character"
            raise RowFault(UNREADABLE, said) from None
        except RecursionError:
            raise _too_deep() from None
    if text.count("{") + text.count("[") > MOST_LEVELS and _levels(value) > MOST_LEVELS:
        raise _too_deep()


def dumps(value: Any) -> bytes:
    """`value` as one line of UTF-8 JSON, keys in the order given."""
    try:
        return orjson.dumps(value)
    except TypeError:  # an integer over 64 bits: Python's own writer knows them all
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def sorted_dumps(value: Any) -> bytes:
    """The same with keys sorted, for hashing: equal values give equal bytes."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode("utf-8")


def _levels(value: Any) -> int:
    """How deep lists and objects nest, counted without recursion."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        item, level = waiting.pop()
        deepest = max(deepest, level)
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        waiting.extend((child, level + 1) for child in inner if isinstance(child, (dict, list)))
    return deepest


def _too_deep() -> RowFault:
    return RowFault(UNREADABLE, f"nested deeper than {MOST_LEVELS} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise RowFault(UNREADABLE, f"the key {twice[:80]!r} is given twice")
    return made


def _constant(name: str) -> Any:
    raise RowFault(UNREADABLE, f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise RowFault(UNREADABLE, f"an integer of {len(digits):,} digits")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RowFault(UNREADABLE, f"the number {text[:40]} is too large")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_number)
