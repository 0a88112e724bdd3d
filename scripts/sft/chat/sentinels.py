"""Sentinels: private-use characters set into messages before rendering, which show where each message ends up."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from sft.chat.template import GENERATION, ChatTemplate, Message, Refused, Tools

Controls = Callable[[str], re.Pattern[str] | None]  # role -> what finds the control tokens to break in its words
Placement = Literal["edges", "inside", "none"]  # at both ends of the words, or one sentinel in the middle
REASONING = ("reasoning_content", "reasoning", "thinking")
MAX_MESSAGES = 30_000  # of one conversation: two sentinels each
_FIRST, _BREAK = 0x100000, "\U0010fffd"
_RESERVED = re.compile("[\U000ffff0-\U000fffff\U00100000-\U0010ffff]")


@dataclass(frozen=True)
class Region:
    """Characters [start, end) of the text that the model writes as message `message` (an index).

    missing_end: None if the template ends the turn itself, else the end token that encoding appends ("": the
    tokenizer's own). prompt_end: where the serving prompt ends, if the loss does not start there.
    """

    message: int
    start: int
    end: int
    missing_end: str | None = None
    prompt_end: int | None = None

    @property
    def boundary(self) -> int:
        """Where the model begins to write, so that a token must begin there."""
        return self.start if self.prompt_end is None else self.prompt_end


@dataclass
class Layout:
    """A rendered conversation: its text and the regions of its assistant messages.

    plain_spans: control tokens inside the words of messages, which are plain text. prompt_shown: whether the text up to
    the last region is exactly the serving prompt.
    """

    text: str
    regions: list[Region] = field(default_factory=list)
    plain_spans: list[tuple[int, int]] = field(default_factory=list)
    prompt_shown: bool = False


@dataclass
class Rendered:
    """A rendered text without its sentinels, and where they were (characters).

    opened / closed: message index -> positions. generation: spans of {% generation %} blocks. broken: positions inside
    control tokens that were written in a message.
    """

    text: str
    opened: dict[int, list[int]] = field(default_factory=dict)
    closed: dict[int, list[int]] = field(default_factory=dict)
    generation: list[tuple[int, int]] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)

    def open(self, index: int) -> int | None:
        """Where the words of message `index` begin, if they are shown exactly once."""
        return _only(self.opened.get(index))

    def close(self, index: int) -> int | None:
        """Where the words of message `index` end, if they are shown exactly once."""
        return _only(self.closed.get(index))

    def end_of(self, index: int, message: Message) -> int | None:
        """Like `close`; the first place of a message that calls a tool, whose name may be repeated with the result."""
        return next(iter(self.closed.get(index, [])), None) if message.get("tool_calls") else self.close(index)


def _only(positions: list[int] | None) -> int | None:
    return positions[0] if positions and len(positions) == 1 else None


def insert_sentinels(messages: list[Message], placements: list[Placement], controls: Controls) -> list[Message]:
    """A copy of the messages with sentinels, one placement a message, and every control token in their words broken.

    Raises Refused if a message holds characters that serve as sentinels.
    """
    if len(messages) > MAX_MESSAGES:
        raise Refused(f"{len(messages):,} messages in one conversation")
    pairs = enumerate(zip(messages, placements, strict=True))
    return [_with_sentinels(message, index, placement, controls) for index, (message, placement) in pairs]


def _with_sentinels(message: Message, index: int, placement: Placement, controls: Controls) -> Message:
    pattern = controls(str(message.get("role")))
    copy = {key: value if key == "role" else _broken(value, pattern) for key, value in message.items()}
    if placement == "none":
        return copy
    opening = chr(_FIRST + 2 * index) if placement == "edges" else ""
    closing = chr(_FIRST + 2 * index + 1)
    if calls := copy.get("tool_calls"):  # the last call's name closes the message
        copy["tool_calls"] = _name_marked(calls, closing)
        closing = ""
    content = copy.get("content")
    if isinstance(content, str) and content.strip():
        copy["content"] = _around(content, opening, closing, placement)
    elif closing:
        texts = [key for key in REASONING if isinstance(copy.get(key), str) and copy[key].strip()]
        copy |= {key: _around(copy[key], "", closing, placement) for key in texts[:1]}
    return copy


def _around(text: str, opening: str, closing: str, placement: Placement) -> str:
    words = text.strip()
    start = text.index(words)
    end = start + (len(words) if placement == "edges" else len(words) // 2 or 1)
    return text[:start] + opening + text[start:end] + closing + text[end:]


def _name_marked(calls: Any, closing: str) -> Any:
    if not isinstance(calls, list) or not isinstance(calls[-1], dict):
        return calls
    last = dict(calls[-1])
    if isinstance(last.get("function"), dict):
        last["function"] = {**last["function"], "name": f"{last['function'].get('name', '')}{closing}"}
    else:
        last["name"] = f"{last.get('name', '')}{closing}"
    return [*calls[:-1], last]


def _broken(value: Any, pattern: re.Pattern[str] | None) -> Any:
    """The value with a sentinel inside every control token in its texts; keys of mappings stay as they are."""
    if isinstance(value, str):
        if not value.isascii() and _RESERVED.search(value):
            raise Refused("a message holds private-use characters of planes 15 and 16, which mark labels")
        return pattern.sub(lambda hit: hit[0][:1] + _BREAK + hit[0][1:], value) if pattern else value
    if isinstance(value, list):
        return [_broken(item, pattern) for item in value]
    if isinstance(value, dict):
        return {key: _broken(item, pattern) for key, item in value.items()}
    return value


def read_sentinels(text: str) -> Rendered:
    """Takes the sentinels out of a rendered text."""
    result, pieces, generation = Rendered(""), [], []
    length = last = 0
    for hit in _RESERVED.finditer(text):
        pieces.append(text[last : hit.start()])
        length += hit.start() - last
        last = hit.end()
        if hit[0] == _BREAK:
            result.broken.append(length)
        elif hit[0] == GENERATION[0]:
            generation.append(length)
        elif hit[0] == GENERATION[1]:
            result.generation.append((generation.pop() if generation else length, length))
        elif (code := ord(hit[0]) - _FIRST) >= 0:
            (result.closed if code % 2 else result.opened).setdefault(code // 2, []).append(length)
    result.text = "".join([*pieces, text[last:]])
    return result


def render_with_sentinels(
    template: ChatTemplate, messages: list[Message], tools: Tools, text: str, controls: Controls, *, prompt: bool
) -> tuple[list[Message], Rendered]:
    """Messages with sentinels that render to exactly `text`, and what the sentinels show.

    Usually they are at both ends of every message's words. Where the template looks at those ends, each message is
    tried by itself. Raises Refused if an answer can take no sentinel.
    """

    def attempt(placements: list[Placement]) -> tuple[list[Message], Rendered | None]:
        marked = insert_sentinels(messages, placements, controls)
        try:
            rendered = read_sentinels(template.render(marked, tools=tools, add_generation_prompt=prompt, tracked=True))
        except Refused:
            return marked, None
        return marked, rendered if rendered.text == text else None

    def placement_of(k: int) -> Placement:
        """How message k can be marked so that the text stays the same and shows the sentinel."""
        options: tuple[Placement, ...] = ("edges", "inside")
        for placement in options:
            _, rendered = attempt([placement if index == k else "none" for index in range(len(messages))])
            if rendered is not None and rendered.closed:
                return placement
        return "none"

    marked, rendered = attempt(["edges"] * len(messages))
    if rendered is not None:
        return marked, rendered
    placements = [placement_of(k) for k in range(len(messages))]
    for k, message in enumerate(messages):
        if message.get("role") == "assistant" and placements[k] == "none" and has_content(message):
            raise Refused(f"the template changes with the words of message {k + 1}: its position cannot be determined")
    marked, rendered = attempt(placements)
    if rendered is None:
        raise Refused("the template changes with the words of the messages, so their positions cannot be determined")
    return marked, rendered


def has_content(message: Message) -> bool:
    """Whether a message has words, a tool call or reasoning."""
    words = str(message.get("content") or "").strip()
    return bool(words or message.get("tool_calls") or any(message.get(key) for key in REASONING))
