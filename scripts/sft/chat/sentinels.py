"""A rendered conversation with the places of the model's own words in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from sft.chat.template import GENERATION, ChatTemplate, Refused
from sft.chat.template import Message as template_Message
from sft.data.rows import Message


@dataclass(frozen=True)
class Region:
    """Characters [start, end) of the text, which the model writes as message `message` (an index).

    missing: None where the template ends the turn itself; else the end token that encoding puts there, "" for the
    tokenizer's own. asked: where the serving prompt ends, if that is not where learning starts.
    """

    message: int
    start: int
    end: int
    missing: str | None = None
    asked: int | None = None

    @property
    def cut(self) -> int:
        """Where the model begins to write, so that a token must begin there."""
        return self.start if self.asked is None else self.asked


@dataclass
class Layout:
    """A rendered conversation: its text, the regions of its assistant messages, control tokens to be read as text.

    prompt_ends: where the last region starts if the serving prompt is this text up to there, else None. left_out: the
    template does not show a tool call.
    """

    text: str
    regions: list[Region] = field(default_factory=list)
    fakes: list[tuple[int, int]] = field(default_factory=list)
    prompt_ends: int | None = None
    left_out: bool = False


@dataclass
class Plan:
    """A row on its way: what to tokenise, and where the model's words are in it."""

    id: str
    layout: Layout
    messages: list[Message]


Controls = Callable[[str], re.Pattern[str] | None]  # role -> what finds the control tokens to break in its words
Tools = list[dict[str, Any]] | None
Placement = float | Literal["edges", "none"]  # at both ends of the words, or one mark after this share of them
EDGES: Placement = "edges"
NONE: Placement = "none"
PLACEMENTS: tuple[Placement, ...] = (EDGES, 0.5, 0.25, 0.75, 0.0)
_FIRST, _BREAK = 0x100000, "\U0010fffd"
_RESERVED = re.compile("[\U000ffff0-\U000fffff\U00100000-\U0010ffff]")
_MOST_MESSAGES = 30_000
REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass
class Read:
    """A rendered text without its marks, and where they stood in it (characters).

    opened / closed: message index -> positions. generation: spans of {% generation %} blocks. broken: positions inside
    control tokens that were written in a message.
    """

    text: str
    opened: dict[int, list[int]] = field(default_factory=dict)
    closed: dict[int, list[int]] = field(default_factory=dict)
    generation: list[tuple[int, int]] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)

    def close(self, index: int) -> int | None:
        """Where message `index` ends, if it is shown exactly once."""
        at = self.closed.get(index, [])
        return at[0] if len(at) == 1 else None

    def first_close(self, index: int) -> int | None:
        """Like `close`, the first of several places: a called tool's name may stand again beside its result."""
        return next(iter(self.closed.get(index, [])), None)

    def open(self, index: int) -> int | None:
        """Where the words of message `index` begin, if known."""
        at = self.opened.get(index, [])
        return at[0] if len(at) == 1 else None


def mark(messages: list[template_Message], placements: list[Placement], controls: Controls) -> list[template_Message]:
    """A copy of the messages with marks, one placement a message.

    Raises Refused where a message holds characters that are used as marks.
    """
    if len(messages) > _MOST_MESSAGES:
        raise Refused(f"{len(messages):,} messages in one conversation")
    pairs = enumerate(zip(messages, placements, strict=True))
    return [_marked(message, index, placement, controls) for index, (message, placement) in pairs]


def _marked(message: template_Message, index: int, placement: Placement, controls: Controls) -> template_Message:
    pattern = controls(str(message.get("role")))
    made = {key: value if key == "role" else _broken(value, pattern) for key, value in message.items()}
    opening, closing = chr(_FIRST + 2 * index), chr(_FIRST + 2 * index + 1)
    if placement == NONE:
        return made
    if placement != EDGES:
        opening = ""
    if calls := made.get("tool_calls"):
        made["tool_calls"] = _name_marked(calls, closing)
        closing = ""
    content = made.get("content")
    if isinstance(content, str) and content.strip():
        made["content"] = _around(content, opening, closing, placement)
    elif isinstance(content, list) and (texts := [p for p, part in enumerate(content) if _is_text(part)]):
        parts = [dict(part) if isinstance(part, dict) else part for part in content]
        parts[texts[-1]]["text"] = _around(parts[texts[-1]]["text"], "", closing, placement)
        parts[texts[0]]["text"] = _around(parts[texts[0]]["text"], opening, "", EDGES)
        made["content"] = parts
    elif closing:
        for key in REASONING:
            if isinstance(made.get(key), str) and made[key].strip():
                made[key] = _around(made[key], "", closing, placement)
                break
    return made


def _around(text: str, opening: str, closing: str, placement: Placement) -> str:
    core = text.strip()
    start = text.index(core)
    end = start + (int(len(core) * placement) or 1 if isinstance(placement, float) else len(core))
    return text[:start] + opening + text[start:end] + closing + text[end:]


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str) and bool(part["text"].strip())


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
    """The value with a mark inside every control token that stands in its texts, keys of mappings left alone."""
    if isinstance(value, str):
        if not value.isascii() and _RESERVED.search(value):
            raise Refused("a message holds private-use characters of planes 15 and 16, which labels are found with")
        if pattern is None or not pattern.search(value):
            return value
        return pattern.sub(lambda found: found[0][:1] + _BREAK + found[0][1:], value)
    if isinstance(value, list):
        return [_broken(item, pattern) for item in value]
    if isinstance(value, dict):
        return {key: _broken(item, pattern) for key, item in value.items()}
    return value


def read(rendered: str) -> Read:
    """Takes the marks out of a rendered text."""
    pieces: list[str] = []
    made = Read("")
    length = last = 0
    generation: list[int] = []
    for found in _RESERVED.finditer(rendered):
        at = found.start()
        pieces.append(rendered[last:at])
        length += at - last
        last = at + 1
        character = rendered[at]
        if character == _BREAK:
            made.broken.append(length)
        elif character == GENERATION[0]:
            generation.append(length)
        elif character == GENERATION[1]:
            made.generation.append((generation.pop() if generation else length, length))
        elif (code := ord(character) - _FIRST) >= 0:
            (made.closed if code % 2 else made.opened).setdefault(code // 2, []).append(length)
    made.text = "".join([*pieces, rendered[last:]])
    return made


def fit(
    template: ChatTemplate,
    messages: list[template_Message],
    tools: Tools,
    text: str,
    controls: Controls,
    *,
    prompt: bool,
) -> tuple[list[template_Message], Read]:
    """Marked messages that render to the very text, and what the marks tell.

    As a rule marks stand at both ends of every message's words. Where the template looks at those ends, each message is
    tried by itself. Raises Refused where an answer can take no mark.
    """

    def tried(placements: list[Placement]) -> tuple[list[template_Message], Read | None]:
        marked = mark(messages, placements, controls)
        try:
            seen = read(template.tracked(marked, tools, prompt))
        except Refused:
            return marked, None
        return marked, seen if seen.text == text else None

    def placement(k: int) -> Placement:
        """How message k can be marked so that the text stays the same and shows the mark."""
        for one in PLACEMENTS:
            _, seen = tried([one if index == k else NONE for index in range(len(messages))])
            if seen is not None and seen.closed:
                return one
        return NONE

    marked, seen = tried([EDGES] * len(messages))
    if seen is not None:
        return marked, seen
    chosen = [placement(k) for k in range(len(messages))]
    for k, message in enumerate(messages):
        if message.get("role") == "assistant" and chosen[k] == NONE and says_something(message):
            raise Refused(f"the template changes with the words of message {k + 1}: its place cannot be proven")
    marked, seen = tried(chosen)
    if seen is None:
        raise Refused("the template changes with the words of the messages, so their places cannot be proven")
    return marked, seen


def says_something(message: template_Message) -> bool:
    """Whether a message has words, a tool call or reasoning."""
    return bool(words(message) or message.get("tool_calls") or message.get("reasoning_content"))


def words(message: template_Message) -> Any:
    """A message's content, white space around it left out; false where there is none."""
    content = message.get("content")
    return content.strip() if isinstance(content, str) else content
