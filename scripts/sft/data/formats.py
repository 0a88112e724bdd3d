"""The formats that rows come in, told row by row from their keys, each turned into messages (and tools)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from sft.data.faults import EMPTY_ANSWER, NO_USER_TURN, UNKNOWN_FORMAT, RowFault
from sft.data.row_readers import (
    ANSWERS,
    COMPLETIONS,
    INPUTS,
    QUESTIONS,
    READ,
    READERS,
    SYSTEM,
    TURNS,
    Parsed,
    first,
    in_turns,
)
from sft.errors import DataError

Row = dict[str, Any]
MOST_PLANS = 1_000  # different sets of keys remembered
MOST_KEYS = 20  # unread keys of a row that are told
ASKING = ("user", "prompt", *QUESTIONS)
GIVING = ("assistant", "completion", *ANSWERS)
ASIDE = ("id", "origin", "tags", "tag", "weight", "references", *SYSTEM)  # read whatever the format is


class Formats:
    """Turns raw rows into turns. format: `auto` or the one to hold every row to. columns: role -> column's name."""

    def __init__(self, format: str, columns: dict[str, str] | None) -> None:
        if (columns or format == "columns") and not {"user", "assistant"} <= set(columns or ()):
            mend = "--set data.columns.user=NAME --set data.columns.assistant=NAME"
            raise DataError("data.columns must name the columns of user and assistant", where="data.columns", mend=mend)
        self._format, self._columns = format, columns
        self._plans: dict[tuple[str, ...], tuple[dict[str, str], str, list[str]]] = {}
        self.unread: Counter[str] = Counter()  # key -> rows in which nobody read it

    def parse(self, row: Any) -> Parsed:
        """The row's turns. Raises RowFault where the format is not known or a field is not text."""
        if not isinstance(row, dict):
            raise RowFault(UNKNOWN_FORMAT, "not an object with keys")
        keys = tuple(row)
        if keys not in self._plans:
            if len(self._plans) > MOST_PLANS:
                self._plans.clear()
            names = _names(keys)
            self._plans[keys] = names, *self._choice(row, names)
        names, format, unread = self._plans[keys]
        self.unread.update(unread)
        if format == "prompt" and in_turns(row, names):
            format = "prompt as messages"
        return READERS[format](row, self._columns if format == "columns" and self._columns else names)

    def _choice(self, row: Row, names: dict[str, str]) -> tuple[str, list[str]]:
        """The format of rows with these keys, and the keys that it does not read."""
        format = self._choose(row, names)
        if format == "columns":
            return format, [key for key in row if key not in (self._columns or {}).values()][:MOST_KEYS]
        return format, [key for name, key in names.items() if name not in (*ASIDE, *READ[format])][:MOST_KEYS]

    def _choose(self, row: Row, names: dict[str, str]) -> str:
        if self._columns and self._format in ("auto", "columns"):
            missing = [name for name in self._columns.values() if name not in row]
            if missing:
                raise RowFault(UNKNOWN_FORMAT, f"no column {missing[0]!r}, only {_listed(row)}")
            return "columns"
        if self._format != "auto":
            if not FITS[self._format](names, row):
                raise RowFault(UNKNOWN_FORMAT, f"not {self._format}: the keys are {_listed(row)}")
            return self._format
        for format, fits in FITS.items():
            if fits(names, row):
                return format
        asks, gives = first(names, ASKING), first(names, GIVING)
        if asks and not gives:
            raise RowFault(EMPTY_ANSWER, f"no answer beside {asks!r}: the keys are {_listed(row)}")
        if gives and not asks:
            raise RowFault(NO_USER_TURN, f"no question beside {gives!r}: the keys are {_listed(row)}")
        raise RowFault(UNKNOWN_FORMAT, f"no format is known for it: the keys are {_listed(row)}")


def _names(keys: tuple[str, ...]) -> dict[str, str]:
    """Plain spelling (`best answer` -> `best_answer`) to the key as it stands; an exact spelling wins."""
    names = {key.strip().lower().replace(" ", "_").replace("-", "_"): key for key in reversed(keys) if key}
    return {**names, **{key: key for key in keys if key in names}}


def _listed(row: Row) -> str:
    keys = ", ".join(str(key) for key in list(row)[:12])
    return keys[:200] + ("..." if len(keys) > 200 or len(row) > 12 else "") if keys else "(none)"


def _has(*groups: tuple[str, ...]) -> Callable[[dict[str, str], Row], bool]:
    return lambda names, _row: all(first(names, group) for group in groups)


def _turns_of(names: dict[str, str], row: Row, key: str) -> bool:
    """Whether the row has a list of turns whose first is told by `role` or by `from`, as `key` says."""
    name = first(names, TURNS)
    if name is None:
        return False
    turns = row[name]
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
        return (name.lower() == "messages") == (key == "role")
    return key in turns[0] if key == "from" else "from" not in turns[0]


# In this order: the first that fits is taken.
FITS: dict[str, Callable[[dict[str, str], Row], bool]] = {
    "sharegpt": lambda names, row: _turns_of(names, row, "from"),
    "messages": lambda names, row: _turns_of(names, row, "role"),
    "chat": _has(("user",), ("assistant",)),
    "rendered": lambda names, row: "input" in names and "target" in names and "instruction" not in names,
    "alpaca": lambda names, row: (
        "instruction" in names and ("output" in names or ("response" in names and bool(first(names, INPUTS))))
    ),
    "prompt": _has(("prompt",), COMPLETIONS),
    "qa": lambda names, row: (
        bool(first(names, QUESTIONS) and first(names, ANSWERS)) or {"input", "output"} <= names.keys()
    ),
    "text": lambda names, row: "text" in names and not first(names, (*ASKING, *GIVING)),
}
