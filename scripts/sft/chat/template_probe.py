"""What a template does with a plain turn, measured once on probe conversations: its prompt, its ends, its stops.

A template that does not show an answer, or whose turn has no provable end, fails here, before any row is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from jinja2 import nodes

from sft.chat.assistant_spans import AssistantSpans, TurnShape
from sft.chat.sentinels import Layout, Rendered, insert_sentinels, read_sentinels
from sft.chat.template import ChatTemplate, Message, Refused, Tools
from sft.chat.tokenize import Tokens, Vocabulary, common_prefix
from sft.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM: Message = {"role": "system", "content": "Wfgh"}
_USER: Message = {"role": "user", "content": "Kquv"}
_ANSWER: Message = {"role": "assistant", "content": "Zbmt"}
_TEXT: dict[str, Any] = {"type": "string", "description": "d"}
_PARAMETERS = {"type": "object", "properties": {"a": _TEXT}, "required": ["a"]}
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": _PARAMETERS}}
_FIX = "use another template: --set data.template_path=chatml"


@dataclass(frozen=True)
class TemplateTraits:
    """turn: see TurnShape. ends: every text that can end an assistant's turn. header: what opens the next user turn."""

    turn: TurnShape
    ends: tuple[str, ...]
    header: str


@dataclass(frozen=True)
class Stops:
    """Generation stops at any of these token ids, or once the text holds any of these strings."""

    ids: frozenset[int]
    strings: tuple[str, ...]


def probe_template(template: ChatTemplate, vocabulary: Vocabulary) -> TemplateTraits:
    """Probes the template. Sets `template.parts` where contents must be lists of parts, and the vocabulary's turns.

    Raises TemplateError if no answer is shown or if its position cannot be determined.
    """
    probe = _Probe(template, vocabulary)
    probe.find_opening()
    first = probe.tracked(probe.opening).opened.get(0)
    vocabulary.set_opener(probe.render(probe.opening)[: first[0]] if first else "")
    prompt = probe.generation_prompt()
    turn = TurnShape(prompt=prompt, space=_answer_space(template, prompt))
    try:
        region = probe.layout(probe.exchange, turn).regions[0]
        text, close = probe.render(probe.exchange), probe.tracked(probe.exchange).closed[len(probe.opening)][0]
    except Refused as refused:
        raise TemplateError(f"labels cannot be derived: {refused}", where=template.name, fix=_FIX) from None
    turn = replace(turn, tail=text[close:], end=text[close : region.end])
    header, middle_end = probe.next_turn(turn)
    turn = replace(turn, middle_end=turn.end if middle_end is None else middle_end)
    turn = replace(turn, shares_end=not turn.end.strip() and bool(turn.middle_end.strip()))
    tool_ends = probe.tool_ends(turn)
    if turn.shares_end and len(tool_ends) > 1:
        turn = replace(turn, tool_end=tool_ends[1])
    ends = {turn.end, turn.middle_end, *(tool_ends[1:] if turn.shares_end else tool_ends)}
    turn_texts = (text[: region.start], header, turn.prompt, turn.end, turn.middle_end)
    vocabulary.set_turn_tokens({token for one in turn_texts for token in vocabulary.tokens_in(one)}, template.source)
    return TemplateTraits(turn, tuple(sorted(end for end in ends if end.strip())), header)


class _Probe:
    """Plain conversations rendered by a template: `opening`, and `exchange`, which is the opening with an answer."""

    def __init__(self, template: ChatTemplate, vocabulary: Vocabulary) -> None:
        self.template, self.vocabulary = template, vocabulary
        self.tools: Tools = None
        self.opening = [_USER]

    @property
    def exchange(self) -> list[Message]:
        return [*self.opening, _ANSWER]

    def render(self, messages: list[Message], *, prompt: bool = False) -> str:
        return self.template.render(messages, tools=self.tools, add_generation_prompt=prompt)

    def tracked(self, messages: list[Message]) -> Rendered:
        marked = insert_sentinels(messages, ["edges"] * len(messages), self.vocabulary.controls)
        return read_sentinels(self.template.render(marked, tools=self.tools, tracked=True))

    def layout(self, messages: list[Message], turn: TurnShape) -> Layout:
        return AssistantSpans(self.template, self.vocabulary, turn).layout(messages, self.tools)

    def find_opening(self) -> None:
        """Finds the shortest beginning of a conversation after which the template shows an answer.

        Sets `template.parts` where contents must be lists of parts. Raises TemplateError if there is none.
        """
        refusals: list[str] = []
        turns_only = self.template.style == "turn"
        tools, parts = ((None,), (False,)) if turns_only else ((None, [_TOOL]), (False, True))
        openings = ([_USER], [_SYSTEM, _USER])
        for self.tools, self.template.parts, self.opening in product(tools, parts, openings):
            try:
                if self.tracked(self.exchange).close(len(self.opening)) is not None:
                    return
            except Refused as refused:
                refusals.append(str(refused))
        what = "the template never shows the answer: no token would be in the loss"
        if len(refusals) == len(tools) * len(parts) * len(openings):
            what = f"the template renders no plain conversation: {refusals[0]}"
        raise TemplateError(what, where=self.template.name, fix=_FIX)

    def generation_prompt(self) -> str:
        """What `add_generation_prompt` adds to a conversation that ends with a user's message."""
        try:
            prompted, plain = self.render(self.opening, prompt=True), self.render(self.opening)
        except Refused:
            return ""
        shared = common_prefix(prompted, plain)
        return prompted[shared if shared == len(plain) else self.vocabulary.token_edge(prompted, plain, shared) :]

    def next_turn(self, turn: TurnShape) -> tuple[str, str | None]:
        """What opens the next user turn, and the end of a turn before it; ("", None) for one-turn templates."""
        messages = [*self.exchange, _USER]
        try:
            region, rendered = self.layout(messages, turn).regions[0], self.tracked(messages)
        except Refused:
            return "", None
        close, following = rendered.close(len(messages) - 2), rendered.open(len(messages) - 1)
        if close is None or following is None:
            return "", None
        return rendered.text[region.end : following], rendered.text[close : region.end]

    def tool_ends(self, turn: TurnShape) -> list[str]:
        """The control tokens that end a turn which calls a tool: where it comes last, and before the result."""
        call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"a": "b"}}}
        caller: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        result: Message = {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": "Rdxy"}
        ends: list[str] = []
        for messages in ([*self.opening, caller], [*self.opening, caller, result, _ANSWER]):
            try:
                layout = self.layout(messages, turn)
            except Refused:
                continue
            text = layout.text[layout.regions[0].start : layout.regions[0].end]
            last = self.vocabulary.tokens_in(text)[-1:]
            ends.append(last[0] if last and text.endswith(last[0]) else "")
        return ends


def _answer_space(template: ChatTemplate, prompt: str) -> str:
    """The white space that ends the prompt, if the template writes it in one expression with the answer's words."""
    space = prompt[len(prompt.rstrip()) :]
    for output in template.syntax().find_all(nodes.Output) if space else ():
        for node in output.nodes:
            left: Any = node
            following: nodes.Node | None = None
            while isinstance(left, nodes.BinExpr) and left.operator == "+":
                left, following = left.left, left.right
            is_content = isinstance(following, nodes.Getattr) and following.attr == "content"
            if is_content and isinstance(left, nodes.Const) and left.value == space:
                return space
    return ""


def find_stops(
    traits: TemplateTraits,
    tokens: Tokens,
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Iterable[int],
) -> Stops:
    """What ends an answer. eos_ids: the end tokens that the model's generation_config names."""
    ids = {int(token) for token in eos_ids}
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    strings: list[str] = []
    for end in traits.ends:
        token = tokens.ids(end.strip())[-1]
        if token in vocabulary.texts:
            ids.add(token)
        else:
            strings.append(end.strip())
    header = traits.header.lstrip(" ").rstrip()
    words = header.strip()
    if words and not vocabulary.leading_token(words, unless=""):
        # Plain text opens the next user's turn. A whole line or a piece of markup is a stop; a bare word (`USER:`),
        # which may occur in an answer, only where no token ends the turn.
        distinct = words[0] in "<[#|" or header.startswith("\n")
        if distinct or not any(vocabulary.tokens_in(end) for end in traits.ends):
            strings.append(header if header.startswith("\n") and words[0] not in "<[" else words)
    return Stops(frozenset(ids), tuple(dict.fromkeys(strings)))
