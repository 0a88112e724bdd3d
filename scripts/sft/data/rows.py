"""Stored rows: short (`system`, `user`, `assistant`), `messages` (with `tools`), or rendered (`input`, `target`); each
with `id`, a hash of its content, and `origin`.
"""

from __future__ import annotations

import hashlib
from typing import Any

from sft.data.formats import STORED, Formats, Parsed
from sft.data.ledger import EMPTY_ANSWER, NO_USER_TURN, NOT_TEXT, UNREADABLE, RowFault
from sft.data.messages import Message, check_turns
from sft.data.readers import RawRow, dump_json

Row = dict[str, Any]
ID_BYTES = 8
SHORT_QUESTION = 16  # characters below which ("Go on.") rows with other system texts are other questions


def make_row(raw: RawRow, formats: Formats, system_prompt: str | None) -> tuple[Row, str]:
    """The stored row and the format it was read in. system_prompt: for rows that have none. Raises RowFault."""
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
        return rendered_record(source, target, origin=origin, **extra)
    turns = parsed.messages
    if system_prompt and turns and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system_prompt}, *turns]
    check_turns(turns)
    return to_record(turns, parsed.tools, origin=origin, **extra)


def to_record(messages: list[Message], tools: list[Message] | None = None, *, origin: str = "", **extra: Any) -> Row:
    """The stored row of these turns: short if it is one plain exchange without tools, else `messages`.

    extra: more keys, such as `tags`.
    """
    row: Row = {"id": content_id(messages, tools)} | ({"origin": origin} if origin else {})
    texts = {message["role"]: message["content"] for message in messages}
    roles = [message["role"] for message in messages]
    plain = all(len(message) == 2 and isinstance(message["content"], str) for message in messages)
    if plain and not tools and roles in (["user", "assistant"], ["system", "user", "assistant"]):
        row |= {"system": texts.get("system", ""), "user": texts["user"], "assistant": texts["assistant"]}
    else:
        row |= {"messages": messages} | ({"tools": tools} if tools else {})
    return row | extra


def rendered_record(source: str, target: str, *, origin: str = "", **extra: Any) -> Row:
    """The stored row of a text that no template is applied to."""
    content = {"input": source, "target": target}
    return {"id": _hash(content)} | ({"origin": origin} if origin else {}) | content | extra


def to_line(row: Row) -> bytes:
    """The row as a line of JSON. Raises RowFault for what JSON cannot hold."""
    try:
        return dump_json(row) + b"\n"
    except (TypeError, ValueError) as error:
        raise RowFault(NOT_TEXT, str(error)) from None


def is_rendered(row: Row) -> bool:
    """Whether this is `{"input", "target"}`: text that no template is applied to."""
    return "input" in row and "target" in row and "messages" not in row and "user" not in row


def messages(row: Row) -> list[Message]:
    """The turns of a stored row of either shape; an empty system text is no turn."""
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


def row_id(row: Row) -> str:
    """The row's own id, else the hash of its content: 16 hex digits."""
    if row.get("id"):
        return str(row["id"])
    if is_rendered(row):
        return _hash({"input": row["input"], "target": row["target"]})
    return content_id(messages(row), tools(row))


def reference(row: Row) -> str:
    """The last answer, which a generated one is compared with."""
    if is_rendered(row):
        return str(row["target"])
    return next((str(turn["content"]) for turn in reversed(messages(row)) if turn["role"] == "assistant"), "")


def references(row: Row) -> list[str]:
    """Every answer that counts as right: the row's `references`, else the last answer."""
    answers = row.get("references")
    return [str(answer) for answer in answers] if isinstance(answers, list) and answers else [reference(row)]


def question(row: Row) -> str:
    """The first question of a row: its first user turn, or the input of a rendered row."""
    if is_rendered(row):
        return str(row["input"])
    return next((str(turn["content"] or "") for turn in messages(row) if turn["role"] == "user"), "")


def prompt_id(row: Row) -> str:
    """16 hex digits, equal for rows with the same question: all turns but the answers, ignoring case and white space.

    The system text counts only with a short question, whose answer depends on it.
    """
    if is_rendered(row):
        prompt, system = str(row["input"]), ""
    else:
        turns = messages(row)
        prompt = "\n".join(str(turn["content"] or "") for turn in turns if turn["role"] not in ("system", "assistant"))
        system = str(turns[0]["content"] or "") if turns and turns[0]["role"] == "system" else ""
    text = prompt if len(prompt) >= SHORT_QUESTION else f"{system}\n{prompt}"
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=ID_BYTES).hexdigest()


def comparison_text(row: Row) -> str:
    """All turns but the system text, which many rows share: what rows are compared by."""
    if is_rendered(row):
        return f"{row['input']}\n{row['target']}"
    return "\n".join(str(turn["content"] or "") for turn in messages(row) if turn["role"] != "system")


def content_id(messages: list[Message], tools: list[Message] | None = None) -> str:
    """Equal turns and tools have an equal id; nothing else counts."""
    return _hash([messages, tools or None])


def _hash(content: Any) -> str:
    return hashlib.blake2b(dump_json(content, sort_keys=True), digest_size=ID_BYTES).hexdigest()
