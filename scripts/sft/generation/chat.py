"""Conversations in a file: a row of messages a line, as training takes them."""

from __future__ import annotations

import json
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from sft import files
from sft.config.schema import GenerationSection
from sft.errors import DataError, SftError

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
        raise DataError("no saved conversation there", where=str(path), fix="/load a file that /save wrote") from None
    return messages


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


LINES = 12  # of the block under way that are redrawn; the whole of it is printed when it ends


class MarkdownView:
    """A context in which `write` takes pieces of Markdown. console: rich's, on a terminal."""

    def __init__(self, console: Any) -> None:
        self.console, self.block = console, ""

    def __enter__(self) -> MarkdownView:
        from rich.live import Live

        self.live = Live(
            console=self.console,
            transient=True,
            auto_refresh=False,
            vertical_overflow="crop",
            get_renderable=self._last,
        )
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()
        self._print(self.block)
        self.block = ""

    def write(self, piece: str) -> None:
        """More of the answer."""
        self.block += piece
        done, rest = finished(self.block)
        if done:
            self.block = rest
            self._print(done)  # above the block that is redrawn
        self.live.refresh()

    def _print(self, text: str) -> None:
        from rich.markdown import Markdown

        if text.strip():
            self.console.print(Markdown(text), soft_wrap=False)

    def _last(self) -> Any:
        from rich.markdown import Markdown

        return Markdown("\n".join(self.block.split("\n")[-LINES:]))


def finished(text: str) -> tuple[str, str]:
    """The blocks that are whole, and the rest: a blank line ends a block, but not within a code fence."""
    at, start, fenced = 0, 0, False
    for line in text.splitlines(keepends=True)[:-1]:
        start += len(line)
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced and not line.strip():
            at = start
    return text[:at], text[at:]


Answerer = Callable[[list[Message], GenerationSection, int], Iterator[str]]

HELP = """\
/help                 this list
/reset                forget the conversation (the system text stays)
/system [TEXT]        show the system text, or set it and start over; /system none takes it away
/set [KEY VALUE]      show or change a setting of `generation`, such as /set temperature 0.7
/retry                answer the last question again
/undo                 take the last question and its answer back
/save [FILE]          write the conversation as one row of messages (default: outputs/chat.jsonl, appended)
/load [FILE]          go on with the last conversation saved there
/tokens               tokens of the conversation so far
/compare [QUESTION]   base and tuned side by side, on the last question or another; the conversation stays as it is
/exit                 leave (Ctrl-D too)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one (so does Alt-Enter)."""


class View(Protocol):
    """Shows an answer as it streams."""

    def write(self, piece: str) -> None: ...


class ChatSession:
    """A conversation and its commands. Prints through `write` alone, and answers through `view` where one is given."""

    def __init__(
        self,
        answer: Answerer,
        write: Callable[[str], None],
        *,
        settings: GenerationSection,
        system: str | None = None,
        save_path: Path = Path("outputs/chat.jsonl"),
        count_tokens: Callable[[list[Message]], int] | None = None,
        base: Answerer | None = None,
        side_by_side: Callable[[str, str], None] | None = None,
        view: Callable[[], AbstractContextManager[View]] | None = None,
    ) -> None:
        self.answer, self.write, self.settings, self.save_path = answer, write, settings, save_path
        self.system, self.count_tokens = system, count_tokens
        self.base, self.side_by_side, self.view = base, side_by_side, view
        self.turns: list[Message] = []
        self.attempt = 0

    @property
    def messages(self) -> list[Message]:
        """The whole conversation, its system text first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def run(self, read: Callable[[], str]) -> None:
        """Reads and answers until /exit or the end of the input."""
        while True:
            try:
                line = read_whole(read)
            except EOFError:
                return
            except KeyboardInterrupt:
                self.write("\n(/exit or Ctrl-D leaves)\n")
                continue
            try:
                if not self.handle(line):
                    return
            except SftError as error:
                self.write(f"error: {error}\n")
            except KeyboardInterrupt:  # between two pieces, or while the model winds down
                self._drop_question()
                self.write("\n[stopped]\n")

    def handle(self, line: str) -> bool:
        """Does what one input asks for; false when it asks to leave."""
        text = line.strip()
        if not text:
            return True
        if not text.startswith("/"):
            self._ask(line.strip("\n"))
            return True
        name, _, rest = text[1:].partition(" ")
        if name in ("exit", "quit"):
            return False
        command = getattr(self, f"_do_{name}", None) if name.isalpha() else None
        if command is None:
            self.write(f"there is no command /{name}: /help lists them\n")
        else:
            command(rest.strip())
        return True

    def _ask(self, question: str) -> None:
        self.turns.append({"role": "user", "content": question})
        self.attempt = 0
        self._answer()

    def _answer(self) -> None:
        """Streams the answer to the last question; what was shown when it broke off is kept as the answer."""
        said: list[str] = []
        try:
            if self.view is None:
                found = self._stream(self.answer, self.messages, said, self.write)
            else:
                with self.view() as view:
                    found = self._stream(self.answer, self.messages, said, view.write)
            self.write(found)
            self.turns.append({"role": "assistant", "content": "".join(said)})
        except SftError:
            self._drop_question()
            raise
        finally:
            self.write("\n")

    def _stream(self, answer: Answerer, messages: list[Message], said: list[str], write: Callable[[str], None]) -> str:
        """Collects the pieces into `said`; gives what to say after them: that it was stopped, or how fast it was."""
        began, pieces = time.monotonic(), answer(messages, self.settings, self.attempt)
        try:
            while True:
                said.append(next(pieces))
                write(harmless(said[-1]))
        except StopIteration as end:
            tokens = getattr(end.value, "tokens", 0)
            return f"\n({tokens} tokens, {tokens / max(time.monotonic() - began, 1e-9):.1f} a second)" if tokens else ""
        except KeyboardInterrupt:
            return " [stopped]"
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()

    def _do_help(self, rest: str) -> None:
        self.write(HELP + "\n")

    def _do_reset(self, rest: str) -> None:
        self.turns = []
        self.write("(forgotten)\n")

    def _do_system(self, rest: str) -> None:
        if not rest:
            self.write(f"system: {self.system or '(none)'}\n")
            return
        self.system = None if rest == "none" else rest
        self.turns = []
        self.write("(system text set; the conversation starts over)\n")

    def _do_set(self, rest: str) -> None:
        key, _, value = rest.partition(" ")
        current = self.settings.model_dump()
        if not key:
            self.write("".join(f"{name} = {json.dumps(known)}\n" for name, known in current.items()))
            return
        if key not in current or not value:
            self.write(f"/set takes one of {', '.join(current)} and a value\n")
            return
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        drawn = {"do_sample": True} if key in ("temperature", "top_p", "top_k") else {}
        try:
            self.settings = GenerationSection.model_validate({**current, **drawn, key: parsed})
        except ValidationError as error:
            self.write(f"{key}: {error.errors()[0]['msg']}\n")
            return
        self.write(f"{key} = {json.dumps(parsed)}{' (answers are drawn now)' if drawn else ''}\n")

    def _do_retry(self, rest: str) -> None:
        if not self._drop_answer():
            self.write("(there is no question to answer again)\n")
            return
        self.attempt += 1
        if not self.settings.do_sample:
            self.write("(greedy: the answer will be the same; /set temperature 0.7 draws another)\n")
        self._answer()

    def _do_undo(self, rest: str) -> None:
        if self._drop_answer():
            self.turns.pop()
            self.write("(taken back)\n")
        else:
            self.write("(there is nothing to take back)\n")

    def _drop_answer(self) -> bool:
        if self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        return bool(self.turns)

    def _drop_question(self) -> None:
        """Takes back a question that got no answer, so that turns go on alternating."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def _do_save(self, rest: str) -> None:
        if not self.turns:
            self.write("(there is nothing to save)\n")
            return
        path = Path(rest).expanduser() if rest else self.save_path
        save(path, self.messages, append=not rest)
        self.write(f"(saved: {path})\n")

    def _do_load(self, rest: str) -> None:
        messages = last_conversation(Path(rest).expanduser() if rest else self.save_path)
        self.system = next((str(m["content"]) for m in messages if m["role"] == "system"), None)
        self.turns = [message for message in messages if message["role"] != "system"]
        while self.turns and self.turns[-1]["role"] != "assistant":
            self.turns.pop()
        self.write(f"(loaded {len(self.turns)} turns)\n")

    def _do_compare(self, rest: str) -> None:
        messages = self.messages
        if rest:
            messages = [*messages, {"role": "user", "content": rest}]
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if self.base is None or self.side_by_side is None or not messages:
            self.write("(there is no adapter to compare with its base)\n" if messages else "(nothing was asked yet)\n")
            return
        found = []
        for answer in (self.base, self.answer):
            said: list[str] = []
            note = self._stream(answer, messages, said, lambda piece: None)
            found.append(harmless("".join(said)).strip() + note)
        self.side_by_side(found[0], found[1])

    def _do_tokens(self, rest: str) -> None:
        if self.count_tokens is None or not self.turns:
            self.write("(nothing was said yet)\n")
        else:
            self.write(f"{self.count_tokens(self.messages)} tokens in {len(self.turns)} turns\n")


def harmless(text: str) -> str:
    """The text without control characters, which could steer a terminal; line breaks and tabs stay."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")
