"""Stored rows and their parts: strict JSON, reasons to exclude a row, and the four shapes.

A row is short (`system`, `user`, `assistant`), `messages` (with `tools`), rendered (`input`, `target`), or a preference
pair (`prompt` or `messages`, `chosen`, `rejected`); each has `id`, a hash of its content, and `origin`, the file and
line that it was read from. Wherever one answer is meant, a pair counts as the row of its chosen answer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, get_args

import orjson

Row = dict[str, Any]
Message = dict[str, Any]
ID_BYTES = 8
SHORT_QUESTION = 16  # characters below which ("Go on.") rows with other system texts are other questions
MAX_DEPTH = 128  # levels of lists and objects; orjson writes up to 254

Fault = Literal[
    "unreadable", "unknown format", "not text", "no user turn", "empty answer", "unknown role", "roles out of order",
    "preference pair", "no weight",
]  # fmt: skip
Filter = Literal[  # by the config: no faults of the rows
    "marked as bad", "exact duplicate", "near duplicate", "leak into val or test", "contamination",
    "control characters", "placeholder", "boilerplate", "length outlier", "other script",
]  # fmt: skip
FAULTS: tuple[Fault, ...] = get_args(Fault)
FILTERS: tuple[Filter, ...] = get_args(Filter)


class RowFault(Exception):
    """One row cannot be used. detail: for the reader of the quarantine."""

    def __init__(self, reason: Fault | Filter, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def parse_json(text: str) -> Any:
    """The one JSON value in `text`. Raises RowFault (unreadable) with the problem and its column."""
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RowFault("unreadable", f"broken JSON: {error.msg} at column {error.pos + 1}") from None
    except RecursionError:
        raise RowFault("unreadable", f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise RowFault("unreadable", "an integer of more than 4,300 digits") from None
    if text.count("{") + text.count("[") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise RowFault("unreadable", f"nested deeper than {MAX_DEPTH} levels")
    try:
        if "\\ud" in text or "\\uD" in text:
            dump_json(value)
    except UnicodeEncodeError:
        what = "half a surrogate pair (\\ud800-\\udfff): the text was cut inside a character"
        raise RowFault("unreadable", what) from None
    return value


def dump_json(value: Any, *, sort_keys: bool = False) -> bytes:
    """`value` as one line of UTF-8 JSON. sort_keys: for hashing, so that equal values give equal bytes."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS if sort_keys else None)
    except TypeError:  # an integer over 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys).encode("utf-8")


def _deeper_than(value: Any, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return items is not None and (levels == 0 or any(_deeper_than(item, levels - 1) for item in items))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RowFault("unreadable", f"the key {repeated[:80]!r} is given twice")
    return row


def _constant(name: str) -> Any:
    raise RowFault("unreadable", f"{name} is not JSON")


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise RowFault("unreadable", f"the number {text[:40]} is too large")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_constant, parse_float=_float)


def is_rendered(row: Row) -> bool:
    """Whether this is `{"input", "target"}`: text that no template is applied to."""
    return "input" in row and "target" in row and "messages" not in row and "user" not in row


def shape(row: Row) -> str:
    """For the user: which of the four shapes a row has."""
    if is_pair(row):
        return "preference pair"
    return "messages" if "messages" in row else "rendered" if is_rendered(row) else "one turn"


def is_pair(row: Row) -> bool:
    """Whether this is a preference pair: a prompt with a better answer and a worse one."""
    return "chosen" in row and "rejected" in row and ("prompt" in row or "messages" in row)


def is_bad(row: Row) -> bool:
    """Whether this is an answer that is rated as bad (KTO): no reference, and no example."""
    return row.get("label") is False


def sides(row: Row) -> tuple[Row, Row]:
    """The two rows of a pair, as `messages`: with its chosen and with its rejected answer.

    Answers in the prompt have `weight: 0`, since the two sides share them.
    """
    prompt = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in prompt_of_pair(row)]
    shared = {"id": row_id(row)} | ({"tools": row["tools"]} if row.get("tools") else {})
    chosen, rejected = ({**shared, "messages": [*prompt, *_answer(row[side])]} for side in ("chosen", "rejected"))
    return chosen, rejected


def prompt_of_pair(row: Row) -> list[Message]:
    """The turns that both answers of a pair follow."""
    return list(row["messages"]) if "messages" in row else [{"role": "user", "content": row["prompt"]}]


def _answer(value: Any) -> list[Message]:
    """The turns of one side of a pair, which is a text or a list of turns."""
    return list(value) if isinstance(value, list) else [{"role": "assistant", "content": value}]


def messages(row: Row) -> list[Message]:
    """The turns of a stored row that is not rendered; an empty system text is left out."""
    if is_pair(row):
        return [*prompt_of_pair(row), *_answer(row["chosen"])]
    if "messages" in row:
        return list(row["messages"])
    turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*turns, {"role": "user", "content": row["user"]}, {"role": "assistant", "content": row["assistant"]}]


def tools(row: Row) -> list[Message] | None:
    """The tools that the row's turns may call."""
    return row.get("tools") or None


def prompt_messages(row: Row | list[Message]) -> tuple[list[Message], list[Message] | None]:
    """The turns of a row, or these turns, without the answer at their end; and the tools."""
    turns, row_tools = (row, None) if isinstance(row, list) else (messages(row), tools(row))
    return turns[:-1] if turns and turns[-1].get("role") == "assistant" else turns, row_tools


def to_weight(value: Any, where: str) -> float:
    """How much a row or a turn counts in the loss: a number from 0 on, or its text. Raises RowFault."""
    try:
        weight = float(value) if isinstance(value, str) else value
        if not isinstance(weight, bool) and 0 <= weight < math.inf:
            return weight  # type: ignore[no-any-return]
    except (ValueError, TypeError):
        pass
    raise RowFault("no weight", f"{where} is {json.dumps(value, default=str)[:40]}, not a number from 0 on")


def row_id(row: Row) -> str:
    """The row's own id, else the hash of its content: 16 hex digits."""
    if row.get("id"):
        return str(row["id"])
    if is_rendered(row):
        return content_hash({"input": row["input"], "target": row["target"]})
    if is_pair(row):
        return content_hash([messages(row), _answer(row["rejected"]), tools(row)])
    return content_hash([messages(row), tools(row)])


def texts(row: Row, *roles: str) -> list[str]:
    """The texts of the turns with these roles; of a rendered row input and target, for user and assistant."""
    if is_rendered(row):
        row = {"user": row["input"], "assistant": row["target"]}
    return [str(turn["content"] or "") for turn in messages(row) if turn["role"] in roles]


def reference(row: Row) -> str:
    """The last answer, which a generated one is compared with."""
    return next(reversed(texts(row, "assistant")), "")


def references(row: Row) -> list[str]:
    """Every answer that counts as right: the row's `references`, else the last answer."""
    answers = row.get("references")
    return [str(answer) for answer in answers] if isinstance(answers, list) and answers else [reference(row)]


def question(row: Row) -> str:
    """The first question of a row: its first user turn, or the input of a rendered row."""
    return next(iter(texts(row, "user")), "")


def prompt_id(row: Row) -> str:
    """16 hex digits, equal for rows with the same question: all turns but the answers, ignoring case and white space.

    The system text counts only with a short question, whose answer depends on it.
    """
    prompt = "\n".join(texts(row, "user", "tool"))
    text = prompt if len(prompt) >= SHORT_QUESTION else "\n".join([*(texts(row, "system") or [""])[:1], prompt])
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=ID_BYTES).hexdigest()


def comparison_text(row: Row) -> str:
    """All turns but the system text, which many rows share: what rows are compared by."""
    rejected = _answer(row["rejected"]) if is_pair(row) else []
    return "\n".join([*texts(row, "user", "assistant", "tool"), *(str(turn["content"] or "") for turn in rejected)])


def content_hash(content: Any) -> str:
    """16 hex digits, equal for equal JSON values."""
    return hashlib.blake2b(dump_json(content, sort_keys=True), digest_size=ID_BYTES).hexdigest()


def shared_system_text(rows: Iterable[Row]) -> str | None:
    """The system text that every row has, character by character; None if they differ or have none."""
    shared: str | None = None
    for row in rows:
        if is_rendered(row):
            return None
        turns = messages(row)
        text = turns[0].get("content") if turns and turns[0]["role"] == "system" else None
        if not isinstance(text, str) or (shared is not None and text != shared):
            return None
        shared = text
    return shared
