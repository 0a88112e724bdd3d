"""Finds a way to mark a conversation that leaves its text as it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sft.chat.marks import EDGES, NONE, PLACEMENTS, Placement, Read, mark, read
from sft.chat.template import ChatTemplate, Message, Refused

Controls = Callable[[str], re.Pattern[str] | None]
Tools = list[dict[str, Any]] | None


def fit(
    template: ChatTemplate, messages: list[Message], tools: Tools, text: str, controls: Controls, *, prompt: bool
) -> tuple[list[Message], Read]:
    """Marked messages that render to the very text, and what the marks tell.

    As a rule marks stand at both ends of every message's words. Where the template looks at those ends, each message is
    tried by itself. Raises Refused where an answer can take no mark.
    """
    marked, seen = _tried(template, messages, [EDGES] * len(messages), tools, controls, prompt)
    if seen is not None and seen.text == text:
        return marked, seen
    chosen = [_placement(template, k, messages, tools, text, controls, prompt) for k in range(len(messages))]
    for k, message in enumerate(messages):
        if message.get("role") == "assistant" and chosen[k] == NONE and says_something(message):
            raise Refused(f"the template changes with the words of message {k + 1}: its place cannot be proven")
    marked, seen = _tried(template, messages, chosen, tools, controls, prompt)
    if seen is None or seen.text != text:
        raise Refused("the template changes with the words of the messages, so their places cannot be proven")
    return marked, seen


def says_something(message: Message) -> bool:
    """Whether a message has words, a tool call or reasoning."""
    content = message.get("content")
    said = content.strip() if isinstance(content, str) else content
    return bool(said or message.get("tool_calls") or message.get("reasoning_content"))


def _placement(
    template: ChatTemplate, k: int, messages: list[Message], tools: Tools, text: str, controls: Controls, prompt: bool
) -> Placement:
    """How message k can be marked so that the text stays the same and shows the mark."""
    for placement in PLACEMENTS:
        alone = [placement if index == k else NONE for index in range(len(messages))]
        _, seen = _tried(template, messages, alone, tools, controls, prompt)
        if seen is not None and seen.text == text and seen.closed:
            return placement
    return NONE


def _tried(
    template: ChatTemplate,
    messages: list[Message],
    placements: list[Placement],
    tools: Tools,
    controls: Controls,
    prompt: bool,
) -> tuple[list[Message], Read | None]:
    marked = mark(messages, placements, controls)
    try:
        return marked, read(template.tracked(marked, tools, prompt))
    except Refused:
        return marked, None
