"""Where the chat's lines come from: a terminal with line editing and history, or a plain pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

PROMPT = "you> "


def reader(history: Path) -> Callable[[], str]:
    """Gives the next line, EOFError at the end. prompt_toolkit on a terminal (history kept in a file), else stdin."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _from_pipe
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    history.parent.mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(history=FileHistory(str(history)))
    return lambda: session.prompt(PROMPT)


def _from_pipe() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
