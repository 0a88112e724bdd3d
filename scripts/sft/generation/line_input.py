"""Where the chat's lines come from: a terminal with line editing and history, or a plain pipe."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

PROMPT = "you> "


def on_terminal() -> bool:
    """Whether a person sits there."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def reader(history: Path) -> Callable[[], str]:
    """Gives the next line, EOFError at the end. prompt_toolkit on a terminal (history kept in a file), else stdin."""
    if not on_terminal():
        return _from_pipe
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    history.parent.mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(history=FileHistory(str(history)), key_bindings=keys)
    return lambda: session.prompt(PROMPT)


def _from_pipe() -> str:
    line = sys.stdin.readline() if sys.stdin is not None else ""  # None: it was closed
    if not line:
        raise EOFError
    return line.rstrip("\n")


def read_whole(read: Callable[[], str]) -> str:
    """One input: lines that end in a backslash go on in the next one; bytes that are no UTF-8 become U+FFFD."""
    lines = [read()]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read())
    return re.sub("[\ud800-\udfff]", "\ufffd", "\n".join(lines))
