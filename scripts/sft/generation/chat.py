"""A chat with a model: the conversation, its commands, reading lines from a terminal or a pipe, saved conversations."""

from __future__ import annotations

import json
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sft import files
from sft.config.reference import table
from sft.config.schema import GenerationSection
from sft.errors import DataError, SftError

Message = dict[str, Any]
Answerer = Callable[[list[Message], GenerationSection, int], Iterator[str]]  # messages, settings, attempt
PROMPT, STOPPED = "you> ", " [stopped]"
LONG_PROMPT = 1000  # tokens from which a prompt is announced before it is read
SLOW_PROMPT = 5.0  # seconds, the same once the speed of reading is known
MEASURED_PROMPT = 100  # tokens, the shortest prompt that shows this speed
HELP = """\
/help or /?           this list
/reset                clear the conversation (the system text stays)
/system [TEXT|none]   show the system text and what the template adds, or set it
/set [KEY VALUE]      show or change how it answers: /set temperature 0.7
/retry                answer the last question again
/undo                 remove the last question and its answer
/save [FILE]          write the conversation (default: outputs/chat.jsonl)
/load [FILE]          continue the last conversation saved in a file
/tokens               number of tokens in the conversation
/compare [QUESTION]   answers of base and tuned model, not kept
/markdown             show finished answers as Markdown, or raw text again
/exit or /bye         leave (also exit, quit, Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ continues on the next one
(so does Alt-Enter)."""


@dataclass
class ChatSession:
    """A conversation and its commands.

    answer, base: stream the tuned model's and the base's answers. write: shows text. count_tokens: of the prompt of a
    conversation. render: the prompt as the model reads it. side_by_side: shows a base and a tuned answer. markdown:
    renders a finished answer. status: shows a text until the next one, "" for none. None: not available.
    """

    answer: Answerer
    write: Callable[[str], None]
    settings: GenerationSection
    system: str | None = None
    save_path: Path = Path("outputs/chat.jsonl")
    count_tokens: Callable[[list[Message]], int] | None = None
    render: Callable[[list[Message]], str] | None = None
    base: Answerer | None = None
    side_by_side: Callable[[str, str], None] | None = None
    markdown: Callable[[str], None] | None = None
    status: Callable[[str], None] = lambda _: None
    turns: list[Message] = field(default_factory=list)
    attempt: int = 0
    as_markdown: bool = False
    reading_speed: float = 0.0  # prompt tokens a second of the last answer; 0: not known

    @property
    def messages(self) -> list[Message]:
        """The whole conversation, its system text first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def run(self, read: Callable[[], str]) -> None:
        """Reads and answers until /exit or the end of the input."""
        while True:
            try:
                line = read_input(read)
            except EOFError:
                return
            except KeyboardInterrupt:
                self.write("\n(/exit or Ctrl-D leaves)\n")
                continue
            try:
                with _keys_wait():
                    if not self.handle(line):
                        return
            except SftError as error:
                self.write(f"error: {error}\n")
            except KeyboardInterrupt:  # outside of an answer's own handling
                self._drop_last("user")
                self.write("\n[stopped]\n")

    def handle(self, line: str) -> bool:
        """Answers a question or runs a command; false for /exit."""
        text = line.strip()
        if text.lower() in ("exit", "quit", "bye", "/exit", "/quit", "/bye"):
            return False
        if not text.startswith("/"):
            if text:
                self.turns.append({"role": "user", "content": line.strip("\n")})
                self.attempt = 0
                self._answer()
            return True
        name, _, argument = text[1:].partition(" ")
        name = "help" if name == "?" else name
        command = getattr(self, f"_do_{name}", None) if name.isalpha() else None
        if command is None:
            self.write(f"there is no command /{name}: /help lists them\n")
        else:
            command(argument.strip())
        return True

    def _answer(self) -> None:
        """Shows the answer to the last question; one that is stopped stays as far as it came."""
        pieces: list[str] = []
        show = None if self.as_markdown else self.write
        try:
            note = self._collect(self.answer, self.messages, pieces, show)
            if show is None and self.markdown is not None:
                self.markdown(printable("".join(pieces)))
            if note == STOPPED and not pieces:
                self._drop_last("user")
                note += " The question is removed."
            else:
                self.turns.append({"role": "assistant", "content": "".join(pieces)})
            self.write(note)
        except SftError:
            self._drop_last("user")
            raise
        finally:
            self.write("\n")

    def _collect(
        self, answer: Answerer, messages: list[Message], pieces: list[str], show: Callable[[str], None] | None
    ) -> str:
        """Appends the answer's pieces to `pieces`, each shown at once; returns its speed, or that it was stopped."""
        tokens = self.count_tokens(messages) if self.count_tokens else 0
        expected = tokens / self.reading_speed if self.reading_speed else 0.0
        if expected > SLOW_PROMPT or (not expected and tokens > LONG_PROMPT):
            about = f", which takes about {expected:.0f} s" if expected else ""
            self.write(f"(the model reads {tokens:,} tokens first{about}; Ctrl-C stops it)\n")
        started, stream = time.monotonic(), answer(messages, self.settings, self.attempt)
        self.status(f"reading {tokens:,} tokens ..." if tokens else "reading ...")
        try:
            while True:
                pieces.append(next(stream))
                if len(pieces) == 1:
                    self.status("")
                    if tokens >= MEASURED_PROMPT:
                        self.reading_speed = tokens / max(time.monotonic() - started, 1e-9)
                if show is not None:
                    show(printable(pieces[-1]))
                elif len(pieces) % 8 == 0:
                    self.status(f"answering: {len(''.join(pieces).split())} words so far ...")
        except StopIteration as end:
            tokens = getattr(end.value, "tokens", 0)
            seconds = max(time.monotonic() - started, 1e-9)
            cut = tokens >= self.settings.max_new_tokens and not end.value.stopped
            more = f"; cut at max_new_tokens, for more: /set max_new_tokens {tokens * 4}" if cut else ""
            return f"\n({tokens} tokens, {tokens / seconds:.1f} tokens/s{more})" if tokens else ""
        except KeyboardInterrupt:
            return STOPPED
        finally:
            if show is None or not pieces:
                self.status("")
            if close := getattr(stream, "close", None):
                close()

    def _do_help(self, _: str) -> None:
        self.write(HELP + "\n")

    def _do_reset(self, _: str) -> None:
        self.turns = []
        self.write("(conversation cleared)\n")

    def _do_system(self, text: str) -> None:
        if text:
            self.system, self.turns = None if text == "none" else text, []
            self.write("(system text set; the conversation starts over)\n")
        else:
            self.write(f"system: {self.system or '(none)'}\n")
            if self.render is not None:
                question = {"role": "user", "content": "(your question)"}
                prompt = self.render([*self.messages[: bool(self.system)], question])
                self.write(f"with the template, the model reads:\n{printable(prompt)}\n")

    def _do_set(self, argument: str) -> None:
        key, _, value = argument.partition(" ")
        current = self.settings.model_dump()
        if not key:
            self.write("".join(f"{name} = {json.dumps(setting)}\n" for name, setting in current.items()))
            return
        if key not in current or not value:
            self.write(f"/set takes one of {', '.join(current)} and a value\n")
            return
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        sampling = {"do_sample": True} if key in ("temperature", "top_p", "top_k") else {}
        try:
            self.settings = GenerationSection.model_validate({**current, **sampling, key: parsed})
        except ValidationError:
            self.write(f"{key}: expected {table()[f'generation.{key}'].expected}, not {value}\n")
            return
        self.write(f"{key} = {json.dumps(parsed)}{' (answers are sampled now)' if sampling else ''}\n")

    def _do_retry(self, _: str) -> None:
        if not self._drop_last("assistant"):
            self.write("(there is no question to answer again)\n")
            return
        self.attempt += 1
        if not self.settings.do_sample:
            self.write("(greedy: the answer will be the same; /set temperature 0.7 samples another)\n")
        self._answer()

    def _do_undo(self, _: str) -> None:
        has_question = self._drop_last("assistant")
        self._drop_last("user")
        self.write("(removed)\n" if has_question else "(there is nothing to remove)\n")

    def _drop_last(self, role: str) -> bool:
        """Removes the last turn if it has the role, such as a question without an answer; false for no turns left."""
        if self.turns and self.turns[-1]["role"] == role:
            self.turns.pop()
        return bool(self.turns)

    def _do_save(self, file: str) -> None:
        path = Path(file).expanduser() if file else self.save_path
        if self.turns:
            save(path, self.messages, append=not file)
        self.write(f"(saved: {path})\n" if self.turns else "(there is nothing to save)\n")

    def _do_load(self, file: str) -> None:
        messages = last_conversation(Path(file).expanduser() if file else self.save_path)
        self.system = next((str(m["content"]) for m in messages if m["role"] == "system"), None)
        self.turns = [message for message in messages if message["role"] != "system"]
        while self.turns and self.turns[-1]["role"] != "assistant":
            self.turns.pop()
        self.write(f"(loaded {len(self.turns)} turns)\n")

    def _do_tokens(self, _: str) -> None:
        tokens = self.count_tokens(self.messages) if self.count_tokens and self.turns else 0
        self.write(f"{tokens} tokens in {len(self.turns)} turns\n" if tokens else "(the conversation is empty)\n")

    def _do_markdown(self, _: str) -> None:
        self.as_markdown = self.markdown is not None and not self.as_markdown
        state = "answers appear as Markdown once they are complete" if self.as_markdown else "answers are raw text"
        self.write(f"({state if self.markdown else 'Markdown needs a terminal'})\n")

    def _do_compare(self, question: str) -> None:
        messages = [*self.messages, *([{"role": "user", "content": question}] if question else [])]
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if self.base is None or self.side_by_side is None or not messages:
            self.write("(there is no adapter to compare with its base)\n" if messages else "(there is no question)\n")
            return
        answers = []
        for answer in (self.base, self.answer):
            pieces: list[str] = []
            note = self._collect(answer, messages, pieces, None)
            answers.append(printable("".join(pieces)).strip() + note)
        self.side_by_side(answers[0], answers[1])


def printable(text: str) -> str:
    """The text without control characters, which could steer a terminal; line breaks and tabs stay."""
    return "".join(character for character in text if character in "\n\t" or unicodedata.category(character) != "Cc")


def on_terminal() -> bool:
    """Whether input and output are a terminal."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


@contextmanager
def _keys_wait() -> Iterator[None]:
    """On a terminal, keys typed within the block are not shown: they wait for the next prompt. Ctrl-C still stops."""
    if not on_terminal():
        yield
        return
    import termios

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before[:3], before[3] & ~(termios.ECHO | termios.ICANON), *before[4:]]
    termios.tcsetattr(terminal, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def line_reader(history: Path) -> Callable[[], str]:
    """Returns the next line, EOFError at the end: prompt_toolkit on a terminal (with a history file), else stdin."""
    if not on_terminal():
        return _read_stdin
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    history.parent.mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(history=FileHistory(str(history)), key_bindings=keys)
    return lambda: session.prompt(PROMPT)


def _read_stdin() -> str:
    line = sys.stdin.readline() if sys.stdin is not None else ""  # None: closed
    if not line:
        raise EOFError
    return line.rstrip("\n")


def read_input(read: Callable[[], str]) -> str:
    """One input: a line that ends in a backslash continues; bytes that are not UTF-8 become U+FFFD."""
    lines = [read()]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read())
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", "\n".join(lines))


def save(path: Path, messages: list[Message], *, append: bool) -> None:
    """Writes the conversation as the file's last line, or as its only one. Raises DataError."""
    try:
        previous = path.read_text(encoding="utf-8") if append and path.is_file() else ""
        files.write_text(path, previous + json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(f"the conversation cannot be written: {error}", where=str(path)) from None


def last_conversation(path: Path) -> list[Message]:
    """The messages in the last line of a file that /save wrote. Raises DataError."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        messages: list[Message] = json.loads(lines[-1])["messages"]
        assert all(isinstance(m["content"], str) and m["role"] in ("system", "user", "assistant") for m in messages)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AssertionError, RecursionError):
        raise DataError("no saved conversation in this file", where=str(path), fix="/load a file of /save") from None
    return messages
