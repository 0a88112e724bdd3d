"""What a template does with a plain turn, learnt once from probes: its prompt, its ends, its stops, its shape.

A template that cannot show an answer, or whose turn has no provable end, fails here, before any row is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jinja2 import nodes

from sft.chat.marks import EDGES, Read, mark, read
from sft.chat.spans import Spans
from sft.chat.template import ChatTemplate, Message, Refused
from sft.chat.turns import Turn, agreement, shared_end
from sft.chat.vocabulary import Vocabulary
from sft.errors import TemplateError

_SYSTEM: Message = {"role": "system", "content": "Wfgh"}
_USER: Message = {"role": "user", "content": "Kquv"}
_ANSWER: Message = {"role": "assistant", "content": "Zbmt"}
_MEND = "take another template: --set data.template_path=chatml"


@dataclass(frozen=True)
class Facts:
    """turn: see Turn. ends: every text that can end an assistant's turn. header: what opens the next user turn.

    system: whether the template takes a system message of its own.
    """

    turn: Turn
    ends: tuple[str, ...]
    header: str
    system: bool


def learn(template: ChatTemplate, vocabulary: Vocabulary) -> Facts:
    """Probes the template. Sets `template.parts` where contents must be lists of parts, and the vocabulary's turns.

    Raises TemplateError where no answer is shown or where its place cannot be proven.
    """
    before = _shown(template, vocabulary)
    first = _seen(template, vocabulary, before).opened.get(0)
    vocabulary.learn_opener(template.render(before)[: first[0]] if first else "")
    spans = Spans(template, vocabulary)
    prompt = _prompt(template, vocabulary, before)
    always = "" if prompt else _always(template, vocabulary, before)
    prompt = prompt or always
    turn = Turn(prompt=prompt, space=_space(template, prompt), always=bool(always))
    spans.turn = turn
    once = [*before, _ANSWER]
    try:
        region = spans.layout(once).regions[0]
        text = template.render(once)
        close = _close(template, vocabulary, once, len(before))
    except Refused as refused:
        raise TemplateError(f"labels cannot be proven: {refused}", where=template.name, mend=_MEND) from None
    turn = replace(turn, tail=text[close:], end=text[close : region.end])
    header, middle = _onward(template, vocabulary, spans, once)
    turn = replace(turn, middle_end=turn.end if middle is None else middle)
    turn = replace(turn, borrows=not turn.end.strip() and bool(turn.middle_end.strip()))
    tool_ends = _tool_ends(template, vocabulary, turn, before)
    if turn.borrows and len(tool_ends) > 1:
        turn = replace(turn, tool_end=tool_ends[1])
    ends = {turn.end, turn.middle_end, *(tool_ends[1:] if turn.borrows else tool_ends)}
    control = {*vocabulary.found(text[: region.start]), *vocabulary.found(header), *vocabulary.found(turn.prompt)}
    control |= {token for end in (turn.end, turn.middle_end) for token in vocabulary.found(end)}
    vocabulary.set_turns(control, template.source)
    return Facts(turn, tuple(sorted(end for end in ends if end.strip())), header, _takes_system(template))


def _shown(template: ChatTemplate, vocabulary: Vocabulary) -> list[Message]:
    """The shortest beginning of a conversation after which the template shows an answer."""
    reasons: list[str] = []
    unseen = False
    for parts in (False, True) if template.style == "messages" else (False,):
        template.parts = parts
        for before in ([_USER], [_SYSTEM, _USER]):
            try:
                if _close(template, vocabulary, [*before, _ANSWER], len(before)) >= 0:
                    return before
                unseen = True
            except Refused as refused:
                reasons.append(str(refused))
    template.parts = False
    if reasons and not unseen:
        said = f"the template renders no plain conversation: {reasons[0]}"
        raise TemplateError(said, where=template.name, mend=_MEND)
    raise TemplateError(
        "the template never shows the answer: a training row would have nothing to learn",
        where=template.name,
        mend="write the content of assistant messages, or " + _MEND,
    )


def _close(template: ChatTemplate, vocabulary: Vocabulary, messages: list[Message], index: int) -> int:
    """Where message `index` ends in the text, -1 where it is not shown exactly once."""
    at = _seen(template, vocabulary, messages).close(index)
    return -1 if at is None else at


def _seen(template: ChatTemplate, vocabulary: Vocabulary, messages: list[Message]) -> Read:
    return read(template.tracked(mark(messages, [EDGES] * len(messages), vocabulary.controls), None, False))


def _prompt(template: ChatTemplate, vocabulary: Vocabulary, before: list[Message]) -> str:
    """What `add_generation_prompt` adds to a conversation that ends with a user's message."""
    try:
        asked = template.render(before, add_generation_prompt=True)
        plain = template.render(before)
    except Refused:
        return ""
    agree = agreement(asked, plain)
    if agree < len(plain):
        agree = vocabulary.edge(asked, plain, agree)
    return asked[agree:]


def _always(template: ChatTemplate, vocabulary: Vocabulary, before: list[Message]) -> str:
    """The prompt of a template that writes it behind every conversation, even one that ends with an answer."""
    once = [*before, _ANSWER]
    try:
        onward = _seen(template, vocabulary, [*once, _USER])
        close, gone = _close(template, vocabulary, once, len(before)), onward.close(len(before))
        tail, asked = template.render(once)[close:], template.render(before)
    except Refused:
        return ""
    if gone is None or onward.text[gone:].startswith(tail):
        return ""
    prompt = tail[len(shared_end(vocabulary, tail, onward.text[gone:])) :]
    return prompt if prompt.strip() and asked.endswith(prompt) else ""


def _space(template: ChatTemplate, prompt: str) -> str:
    """The white space that ends the prompt, if an output of the template begins with it and goes on with the words."""
    space = prompt[len(prompt.rstrip()) :]
    tree = template.syntax()
    for output in tree.find_all(nodes.Output) if space else ():
        for node in output.nodes:
            left: nodes.Node = node
            following: nodes.Node | None = None
            while isinstance(left, nodes.BinExpr) and left.operator == "+":
                joined: Any = left
                left, following = joined.left, joined.right
            words = isinstance(following, nodes.Getattr) and following.attr == "content"
            if words and isinstance(left, nodes.Const) and left.value == space:
                return space
    return ""


def _onward(
    template: ChatTemplate, vocabulary: Vocabulary, spans: Spans, once: list[Message]
) -> tuple[str, str | None]:
    """What opens the next user's turn, and the end of a turn in the middle; ("", None) for one-turn templates."""
    try:
        onward = [*once, _USER]
        region = spans.layout(onward).regions[0]
        seen = _seen(template, vocabulary, onward)
    except Refused:
        return "", None
    close, following = seen.close(len(once) - 1), seen.open(len(once))
    if close is None or following is None:
        return "", None
    return seen.text[region.end : following], seen.text[close : region.end]


def _tool_ends(template: ChatTemplate, vocabulary: Vocabulary, turn: Turn, before: list[Message]) -> list[str]:
    """The control tokens that end a turn which calls a tool: at the end of a conversation, and before the result."""
    if template.style == "turn":
        return []
    for arguments in ({"a": "b"}, '{"a": "b"}'):
        call: dict[str, Any] = {
            "type": "function",
            "id": "call00001",
            "function": {"name": "f", "arguments": arguments},
        }
        asked: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        ends: list[str] = []
        told: Message = {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": "Rdxy"}
        for messages in ([*before, asked], [*before, asked, told, _ANSWER]):
            try:
                spans = Spans(template, vocabulary, turn)
                layout = spans.layout(messages)
            except Refused:
                continue
            region = layout.regions[0]
            ends.append(_last_control(vocabulary, layout.text[region.start : region.end]))
        if ends:
            return ends
    return []


def _last_control(vocabulary: Vocabulary, text: str) -> str:
    """The control token that a text ends with, or nothing."""
    found = vocabulary.found(text)
    return found[-1] if found and text.endswith(found[-1]) else ""


def _takes_system(template: ChatTemplate) -> bool:
    try:
        return "Wfgh" in template.render([_SYSTEM, _USER, _ANSWER])
    except Refused:
        return False
