"""What a template does with a plain turn, learnt once from probes: its prompt, its ends, its stops, its shape.

A template that cannot show an answer, or whose turn has no provable end, fails here, before any row is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jinja2 import nodes

from sft.chat.assistant_spans import Spans, Turn, agreement, shared_end
from sft.chat.sentinels import EDGES, Layout, Read, mark, read
from sft.chat.template import ChatTemplate, Message, Refused
from sft.chat.tokenize import Tokens, Vocabulary
from sft.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_SYSTEM: Message = {"role": "system", "content": "Wfgh"}
_USER: Message = {"role": "user", "content": "Kquv"}
_ANSWER: Message = {"role": "assistant", "content": "Zbmt"}
_NAMED: dict[str, Any] = {"type": "string", "description": "d"}
_TAKES: dict[str, Any] = {"type": "object", "properties": {"a": _NAMED}, "required": ["a"]}
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": _TAKES}}
_FIX = "take another template: --set data.template_path=chatml"


@dataclass(frozen=True)
class Facts:
    """turn: see Turn. ends: every text that can end an assistant's turn. header: what opens the next user turn.

    system: whether the template takes a system message of its own.
    """

    turn: Turn
    ends: tuple[str, ...]
    header: str
    system: bool


class Probe:
    """Plain conversations put to a template: `before` asks, `once` is answered; with tools where it wants some."""

    def __init__(self, template: ChatTemplate, vocabulary: Vocabulary) -> None:
        self.template, self.vocabulary = template, vocabulary
        self.tools: list[dict[str, Any]] | None = None
        self.before = [_USER]

    @property
    def once(self) -> list[Message]:
        return [*self.before, _ANSWER]

    def render(self, messages: list[Message], *, prompt: bool = False) -> str:
        return self.template.render(messages, tools=self.tools, add_generation_prompt=prompt)

    def seen(self, messages: list[Message]) -> Read:
        marked = mark(messages, [EDGES] * len(messages), self.vocabulary.controls)
        return read(self.template.tracked(marked, self.tools, False))

    def layout(self, messages: list[Message], turn: Turn | None) -> Layout:
        return Spans(self.template, self.vocabulary, turn).layout(messages, self.tools)

    def settle(self) -> None:
        """Finds the shortest beginning of a conversation after which the template shows an answer.

        Sets `template.parts` where contents must be lists of parts. Raises TemplateError where there is none.
        """
        reasons: list[str] = []
        unseen = False
        messages = self.template.style == "messages"
        for tools in (None, [_TOOL]) if messages else (None,):
            for parts in (False, True) if messages else (False,):
                for before in ([_USER], [_SYSTEM, _USER]):
                    self.template.parts, self.tools, self.before = parts, tools, before
                    try:
                        if self.seen(self.once).close(len(before)) is not None:
                            return
                        unseen = True
                    except Refused as refused:
                        reasons.append(str(refused))
        self.template.parts = False
        if reasons and not unseen:
            said = f"the template renders no plain conversation: {reasons[0]}"
            raise TemplateError(said, where=self.template.name, fix=_FIX)
        raise TemplateError(
            "the template never shows the answer: a training row would have nothing to learn",
            where=self.template.name,
            fix="write the content of assistant messages, or " + _FIX,
        )


def learn(template: ChatTemplate, vocabulary: Vocabulary) -> Facts:
    """Probes the template. Sets `template.parts` where contents must be lists of parts, and the vocabulary's turns.

    Raises TemplateError where no answer is shown or where its place cannot be proven.
    """
    probe = Probe(template, vocabulary)
    probe.settle()
    first = probe.seen(probe.before).opened.get(0)
    vocabulary.learn_opener(probe.render(probe.before)[: first[0]] if first else "")
    prompt = _prompt(probe)
    always = "" if prompt else _always(probe)
    turn = Turn(prompt=prompt or always, space=_space(template, prompt), always=bool(always))
    try:
        region = probe.layout(probe.once, turn).regions[0]
        text, close = probe.render(probe.once), probe.seen(probe.once).closed[len(probe.before)][0]
    except Refused as refused:
        raise TemplateError(f"labels cannot be proven: {refused}", where=template.name, fix=_FIX) from None
    turn = replace(turn, tail=text[close:], end=text[close : region.end])
    header, middle = _onward(probe, turn)
    turn = replace(turn, middle_end=turn.end if middle is None else middle)
    turn = replace(turn, borrows=not turn.end.strip() and bool(turn.middle_end.strip()))
    tool_ends = _tool_ends(probe, turn)
    if turn.borrows and len(tool_ends) > 1:
        turn = replace(turn, tool_end=tool_ends[1])
    ends = {turn.end, turn.middle_end, *(tool_ends[1:] if turn.borrows else tool_ends)}
    control = {*vocabulary.found(text[: region.start]), *vocabulary.found(header), *vocabulary.found(turn.prompt)}
    control |= {token for end in (turn.end, turn.middle_end) for token in vocabulary.found(end)}
    vocabulary.set_turns(control, template.source)
    return Facts(turn, tuple(sorted(end for end in ends if end.strip())), header, _takes_system(probe))


def _prompt(probe: Probe) -> str:
    """What `add_generation_prompt` adds to a conversation that ends with a user's message."""
    try:
        asked, plain = probe.render(probe.before, prompt=True), probe.render(probe.before)
    except Refused:
        return ""
    agree = agreement(asked, plain)
    if agree < len(plain):
        agree = probe.vocabulary.edge(asked, plain, agree)
    return asked[agree:]


def _always(probe: Probe) -> str:
    """The prompt of a template that writes it behind every conversation, even one that ends with an answer."""
    index = len(probe.before)
    try:
        here, onward = probe.seen(probe.once), probe.seen([*probe.once, _USER])
        asked = probe.render(probe.before)
    except Refused:
        return ""
    close, gone = here.close(index), onward.close(index)
    if close is None or gone is None or onward.text[gone:].startswith(here.text[close:]):
        return ""
    tail = here.text[close:]
    prompt = tail[len(shared_end(probe.vocabulary, tail, onward.text[gone:])) :]
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


def _onward(probe: Probe, turn: Turn) -> tuple[str, str | None]:
    """What opens the next user's turn, and the end of a turn in the middle; ("", None) for one-turn templates."""
    try:
        onward = [*probe.once, _USER]
        region = probe.layout(onward, turn).regions[0]
        seen = probe.seen(onward)
    except Refused:
        return "", None
    close, following = seen.close(len(onward) - 2), seen.open(len(onward) - 1)
    if close is None or following is None:
        return "", None
    return seen.text[region.end : following], seen.text[close : region.end]


def _tool_ends(probe: Probe, turn: Turn) -> list[str]:
    """The control tokens that end a turn which calls a tool: at the end of a conversation, and before the result."""
    if probe.template.style == "turn":
        return []
    for arguments in ({"a": "b"}, '{"a": "b"}'):
        call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": arguments}}
        asked: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        ends: list[str] = []
        told: Message = {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": "Rdxy"}
        for messages in ([*probe.before, asked], [*probe.before, asked, told, _ANSWER]):
            try:
                layout = probe.layout(messages, turn)
            except Refused:
                continue
            if not layout.left_out:
                region = layout.regions[0]
                ends.append(_last_control(probe.vocabulary, layout.text[region.start : region.end]))
        if ends:
            return ends
    return []


def _last_control(vocabulary: Vocabulary, text: str) -> str:
    """The control token that a text ends with, or nothing."""
    found = vocabulary.found(text)
    return found[-1] if found and text.endswith(found[-1]) else ""


def _takes_system(probe: Probe) -> bool:
    try:
        return "Wfgh" in probe.render([_SYSTEM, _USER, _ANSWER])
    except Refused:
        return False


@dataclass(frozen=True)
class Stops:
    """Generation stops at any of these token ids, or once the text holds any of these strings."""

    ids: frozenset[int]
    strings: tuple[str, ...]


def find(
    facts: Facts, tokens: Tokens, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, more: Iterable[int]
) -> Stops:
    """Stops of a template. more: the end tokens that the model's generation_config names."""
    ids = {int(token) for token in more}
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    strings: list[str] = []
    for end in facts.ends:
        token = tokens.ids(end.strip())[-1]
        if token in vocabulary.texts:
            ids.add(token)
        else:
            strings.append(end.strip())
    return Stops(frozenset(ids), tuple(dict.fromkeys([*strings, *_header(facts, vocabulary)])))


def _header(facts: Facts, vocabulary: Vocabulary) -> list[str]:
    """The plain text that opens the next user's turn, where no control token does.

    A line of its own or a piece of markup is a stop; a bare word (`USER:`) only where no token ends the turn, since it
    may stand in an answer.
    """
    header = facts.header.lstrip(" ").rstrip()
    words = header.strip()
    if not words or vocabulary.opening(words, but=""):
        return []
    marked = words[0] in "<[#|" or header.startswith("\n")
    ended = any(vocabulary.holds_control(end) for end in facts.ends)
    return [header if header.startswith("\n") and words[0] not in "<[" else words] if marked or not ended else []
