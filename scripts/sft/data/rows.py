"""Rows as they are stored: short (`system`, `user`, `assistant`), `messages` (with `tools`), or rendered (`input`,
`target`); each with `id`, a hash of its content, and `origin`.
"""

from __future__ import annotations

import hashlib
from typing import Any

from sft.config.schema import DataSection
from sft.data import messages as conversation
from sft.data import readers
from sft.data.formats import STORED, Formats, Parsed
from sft.data.ledger import EMPTY_ANSWER, NO_USER_TURN, NOT_TEXT, UNREADABLE, RowFault
from sft.data.messages import Message
from sft.data.readers import Raw, sorted_dumps

Row = dict[str, Any]
ID_BYTES = 8
LITTLE = 16  # characters of a question below which ("Go on.") rows of other system texts ask something else


def to_record(messages: list[Message], tools: list[Message] | None = None, *, origin: str = "", **extra: Any) -> Row:
    """The stored row of these turns: short where it is one plain turn without tools, else `messages`.

    extra: more keys, as `tags`.
    """
    row = _headed(content_id(messages, tools), origin)
    texts = {message["role"]: message["content"] for message in messages}
    turns = [message["role"] for message in messages]
    plain = all(len(message) == 2 and isinstance(message["content"], str) for message in messages)
    if plain and not tools and turns in (["user", "assistant"], ["system", "user", "assistant"]):
        row |= {"system": texts.get("system", ""), "user": texts["user"], "assistant": texts["assistant"]}
    else:
        row["messages"] = messages
        if tools:
            row["tools"] = tools
    return row | extra


def rendered_record(source: str, target: str, *, origin: str = "", **extra: Any) -> Row:
    """The stored row of a text that needs no template."""
    content = {"input": source, "target": target}
    return {**_headed(_hash(content), origin), **content, **extra}


def _headed(content_id: str, origin: str) -> Row:
    return {"id": content_id, "origin": origin} if origin else {"id": content_id}


def is_rendered(row: Row) -> bool:
    """Whether this is `{"input", "target"}`: text that no template is put around."""
    return "input" in row and "target" in row and "messages" not in row and "user" not in row


def messages(row: Row) -> list[Message]:
    """The turns of a stored row of either shape; a system text that is empty is no turn."""
    if "messages" in row:
        return list(row["messages"])
    turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*turns, {"role": "user", "content": row["user"]}, {"role": "assistant", "content": row["assistant"]}]


def tools(row: Row) -> list[Message] | None:
    """The tools that the row's turns may call."""
    return row.get("tools") or None


def asked(row: Row | list[Message]) -> tuple[list[Message], list[Message] | None]:
    """The turns of a row, or these turns, without the answer that they end with; and the tools."""
    turns, given = (row, None) if isinstance(row, list) else (messages(row), tools(row))
    return turns[:-1] if turns and turns[-1].get("role") == "assistant" else turns, given


def row_id(row: Row) -> str:
    """The row's own id, else the hash of its content: 16 hex digits."""
    if row.get("id"):
        return str(row["id"])
    if is_rendered(row):
        return _hash({"input": row["input"], "target": row["target"]})
    return content_id(messages(row), tools(row))


def reference(row: Row) -> str:
    """The last answer: what a generated one is compared with."""
    if is_rendered(row):
        return str(row["target"])
    answers = [message["content"] for message in messages(row) if message["role"] == "assistant"]
    return str(answers[-1]) if answers else ""


def question(row: Row) -> str:
    """The first question of a row: its first user turn, or the text that a rendered row begins with."""
    if is_rendered(row):
        return str(row["input"])
    return next((str(turn["content"] or "") for turn in messages(row) if turn["role"] == "user"), "")


def prompt_id(row: Row) -> str:
    """Rows that ask the same have the same: 16 hex digits over all that is not the model's own, capitals and white
    space aside. The system text counts only where so little is asked that it is what the answer depends on.
    """
    if is_rendered(row):
        asked, system = str(row["input"]), ""
    else:
        turns = messages(row)
        asked = "\n".join(str(turn["content"] or "") for turn in turns if turn["role"] not in ("system", "assistant"))
        system = str(turns[0]["content"] or "") if turns and turns[0]["role"] == "system" else ""
    words = asked if len(asked) >= LITTLE else f"{system}\n{asked}"
    return hashlib.blake2b(" ".join(words.casefold().split()).encode(), digest_size=ID_BYTES).hexdigest()


def references(row: Row) -> list[str]:
    """Every answer that counts as right: those of the row's `references`, else the last answer alone."""
    given = row.get("references")
    return [str(one) for one in given] if isinstance(given, list) and given else [reference(row)]


def content_id(messages: list[Message], tools: list[Message] | None = None) -> str:
    """Equal turns and tools, equal id; nothing else counts."""
    return _hash([messages, tools or None])


def _hash(content: Any) -> str:
    return hashlib.blake2b(sorted_dumps(content), digest_size=ID_BYTES).hexdigest()


def formats(data: DataSection) -> Formats:
    """The reader of rows that the config asks for."""
    columns = {role: name for role, name in data.columns if name} if data.columns else None
    return Formats(data.format, columns)


def record(raw: Raw, formats: Formats, system_prompt: str | None) -> tuple[Row, str]:
    """The stored row and the format it came in. Raises RowFault."""
    if raw.fault is not None:
        raise RowFault(UNREADABLE, raw.fault)
    parsed = formats.parse(raw.value)
    extra = {key: raw.value[key] for key in STORED if raw.value.get(key) is not None}
    if raw.value.get("id") is not None:
        extra["source_id"] = raw.value["id"]
    if parsed.references:
        extra["references"] = list(parsed.references)
    try:
        return _stored(parsed, raw.origin, system_prompt, extra), parsed.format
    except TypeError as error:
        raise RowFault(NOT_TEXT, str(error)) from None


def _stored(parsed: Parsed, origin: str, system_prompt: str | None, extra: Row) -> Row:
    if parsed.pair:
        source, target = parsed.pair
        if not source.strip():
            raise RowFault(NO_USER_TURN, "input is empty")
        if not target.strip():
            raise RowFault(EMPTY_ANSWER, "target is empty")
        return rendered_record(*parsed.pair, origin=origin, **extra)
    messages = parsed.messages
    if system_prompt and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    conversation.check(messages)
    return to_record(messages, parsed.tools, origin=origin, **extra)


def line(record: Row) -> bytes:
    """The record as a line of JSON. Raises RowFault for what JSON cannot hold."""
    try:
        return readers.dumps(record) + b"\n"
    except (TypeError, ValueError) as error:
        raise RowFault(NOT_TEXT, str(error)) from None
