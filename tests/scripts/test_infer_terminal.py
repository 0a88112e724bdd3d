"""The chat on a terminal: line editing, Ctrl-C during an answer, the line history, and a clean end."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import sys
import time
from pathlib import Path

from tests.conftest import ROOT
from tests.generation import tiny_runs


class Terminal:
    """A program on a pseudo-terminal that answers cursor position requests."""

    def __init__(self, *args: str, **env: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, *args], {**os.environ, **env})
        self.seen = ""

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self.fd, text.encode())

    def until(self, pattern: str, limit: float = 120.0) -> str:
        end = time.monotonic() + limit
        while not re.search(pattern, self.seen):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen[-600:]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    piece = os.read(self.fd, 65536).decode(errors="replace")
                    if "\x1b[6n" in piece:
                        os.write(self.fd, b"\x1b[1;1R")
                    self.seen += piece
        return self.seen

    def close(self) -> int:
        """The exit code, once the program has ended."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                if select.select([self.fd], [], [], 0.1)[0]:
                    os.read(self.fd, 65536)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("it does not end")


def test_a_chat_on_a_terminal(tmp_path: Path, tiny_qwen2: Path) -> None:
    root = tiny_runs.project(tmp_path, tiny_qwen2)
    tiny_runs.finished_run(root, seed=3, scale=0.1)  # these weights repeat themselves for 900 tokens
    chat = Terminal(
        str(ROOT / "scripts" / "infer.py"), "--set", "generation.max_new_tokens=900", SFT_ROOT=str(root),
        OMP_NUM_THREADS="1", TERM="xterm", COLUMNS="100", LINES="40",
    )  # fmt: skip
    chat.until("you>")
    chat.type("hello\r")
    chat.until(r"([^\s\x1b]+ ?)\1{9}")
    os.write(chat.fd, b"\x03")
    chat.until(r"(?s)\[stopped\].*you>")
    chat.type("/tokens\r")
    chat.until(r"(?s)tokens in 2 turns.*you>")
    chat.type("\x1b[A\r")
    chat.until(r"(?s)tokens in 2 turns.*you>")
    chat.type("\x03")
    chat.until(r"(?s)Ctrl-D leaves.*you>")
    chat.type("/set max_new_tokens 12\r")
    chat.until(r"(?s)max_new_tokens = 12.*you>")
    chat.type("/compare again?\r")
    chat.until(r"base")
    chat.until(r"(?s)tuned.*you>")
    chat.type("/set max_new_tokens 300\r")
    chat.until(r"(?s)max_new_tokens = 300.*you>")
    chat.type("again\r")
    chat.until(r"([^\s\x1b]+ ?)\1{9}")
    os.write(chat.fd, b"/undo\r/bye\r")  # typed while the model answers: shown and run after its answer
    answer = chat.until(r"(?s)tokens/s; cut at max_new_tokens.*you>.*\(removed\)")
    assert "reading" in answer and "/undo" not in answer.partition("tokens/s;")[0]
    assert chat.close() == 0
    assert "hello" in (root / "outputs" / ".chat_history").read_text()
