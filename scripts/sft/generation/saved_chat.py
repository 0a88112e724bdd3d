"""Conversations in a file: a row of messages a line, as training takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft import files
from sft.errors import DataError

Message = dict[str, Any]
_ROLES = ("system", "user", "assistant")


def save(path: Path, messages: list[Message], *, append: bool) -> None:
    """Writes the conversation as the file's last line, or as its only one. Raises DataError."""
    try:
        older = path.read_text(encoding="utf-8") if append and path.is_file() else ""
        files.write_text(path, older + json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(f"the conversation cannot be written: {error}", where=str(path)) from None


def last_conversation(path: Path) -> list[Message]:
    """The messages in the last line of a file that /save wrote. Raises DataError."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        messages: list[Message] = json.loads(lines[-1])["messages"]
        assert all(isinstance(m["content"], str) and m["role"] in _ROLES for m in messages)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AssertionError, RecursionError):
        raise DataError("no saved conversation there", where=str(path), mend="/load a file that /save wrote") from None
    return messages
