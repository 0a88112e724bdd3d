"""Where the answers are in a rendered conversation: the regions that the model writes, derived from sentinels.

A region starts where the serving prompt for it ends and ends behind the template's own end of turn. Both come from
comparing renders of the same words: with and without the generation prompt, with and without what follows.
docs/decisions/0003-labels-from-templates.md has the reasoning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sft.chat.sentinels import Layout, Region, Rendered, has_content, read_sentinels, render_with_sentinels
from sft.chat.template import ChatTemplate, Message, Refused, Tools
from sft.chat.tokenize import Vocabulary, common_prefix

_FOLLOW_UP = {"role": "user", "content": "Kquv"}


@dataclass(frozen=True)
class TurnShape:
    """What a template writes around a plain answer, as `template_probe` measured it.

    tail: all that follows an answer at the end of a conversation. end: the end of the turn there. middle_end: the end
    of the turn where the conversation goes on. shares_end: the template writes no end, the next turn's control token
    ends it (GLM). tool_end: the token that ends a tool call, where that is shared too. space: the white space that ends
    the prompt, where the template writes it together with the answer's words.
    """

    prompt: str = ""
    tail: str = ""
    end: str = ""
    middle_end: str = ""
    shares_end: bool = False
    tool_end: str = ""
    space: str = ""

    def missing_end(self, end: str, message: Message, *, continues: bool) -> str | None:
        """The end token to append to a turn (see `Region`); `end` is what follows its last word."""
        tool_end = self.tool_end if message.get("tool_calls") else ""
        expected = tool_end or self.middle_end.strip() or self.end.strip()
        if self.end.strip() or (continues and expected):  # the template ends turns, this one too as a rule
            return None if end.strip() else expected
        return None if expected and end.endswith(expected) else expected


class _WordsBehindCall(Refused):
    """The template writes the words of message `index` behind the result of its tool call: no region fits."""

    def __init__(self, index: int) -> None:
        super().__init__(f"the template separates tool call and words of message {index + 1}")
        self.index = index


def shared_end(vocabulary: Vocabulary, text: str, other: str) -> str:
    """The common beginning of two texts that follow an answer, trailing white space left out: the end of its turn.

    It stops before a token that opens turns, and after a whole line or token.
    """
    shared = common_prefix(text, other)
    if shared < min(len(text), len(other)):
        shared = vocabulary.token_edge(text, other, shared)
    opening = text.find(vocabulary.opener, 1, shared) if vocabulary.opener else -1
    return text[: shared if opening < 0 else opening].rstrip()


class AssistantSpans:
    """Finds the regions of conversations for one template."""

    def __init__(self, template: ChatTemplate, vocabulary: Vocabulary, turn: TurnShape | None = None) -> None:
        self.template, self.vocabulary, self.turn = template, vocabulary, turn or TurnShape()
        self._starts: dict[tuple[str, str], int] = {}  # role before, text between -> offset of the region's start

    def layout(self, messages: list[Message], tools: Tools = None, *, prompt: bool = False) -> Layout:
        """The text of a conversation and its regions; with `prompt`, up to where the model begins to write.

        Raises Refused with the reason if the template refuses the row or the proof fails.
        """
        text = self.template.render(messages, tools=tools, add_generation_prompt=prompt)
        try:
            return self._layout(text, messages, tools, prompt)
        except _WordsBehindCall as refusal:
            k = refusal.index
        # the same text with these words as an answer of their own
        after = next((j for j in range(k + 1, len(messages)) if messages[j].get("role") != "tool"), len(messages))
        words = {"role": "assistant", "content": messages[k]["content"]}
        same = [*messages[:k], {**messages[k], "content": ""}, *messages[k + 1 : after], words, *messages[after:]]
        if self.template.render(same, tools=tools, add_generation_prompt=prompt) != text:
            raise _WordsBehindCall(k)
        layout = self.layout(same, tools, prompt=prompt)
        origin = [*range(after), k, *range(after, len(messages))]
        layout.regions = [replace(region, message=origin[region.message]) for region in layout.regions]
        return layout

    def _layout(self, text: str, messages: list[Message], tools: Tools, prompt: bool) -> Layout:
        marked, rendered = render_with_sentinels(
            self.template, messages, tools, text, self.vocabulary.controls, prompt=prompt
        )
        conversation = _Conversation(messages, marked, tools, rendered, prompt)
        layout = Layout(text, plain_spans=self.vocabulary.plain_spans(text, rendered.broken))
        for k, message in enumerate(messages):
            if message.get("role") != "assistant" or not has_content(message):
                continue  # an empty answer is not trained on
            region, exact = self._region(k, conversation)
            if layout.regions and region.start < layout.regions[-1].end:
                raise Refused(f"the regions of messages {layout.regions[-1].message + 1} and {k + 1} overlap")
            layout.regions.append(region)
            layout.prompt_shown = exact
        return layout

    def _region(self, k: int, talk: _Conversation) -> tuple[Region, bool]:
        """Region k, and whether the text up to it is exactly the serving prompt."""
        rendered, message = talk.rendered, talk.messages[k]
        close, times = rendered.end_of(k, message), len(rendered.closed.get(k, []))
        if close is None and times:
            raise Refused(f"the template shows the answer in message {k + 1} {times} times, so its place is unclear")
        if close is None and message.get("tool_calls"):
            raise Refused("the template leaves out tool calls: name one that writes them in data.template_path")
        if close is None:
            raise Refused(f"the template does not show the answer in message {k + 1}")
        start, exact = self._start(k, close, talk)
        if start > close:
            raise Refused(f"the prompt of message {k + 1} reaches into its answer")
        end = close + len(self._end(k, close, talk))
        words = rendered.open(k)
        if words is not None and words > end:
            raise _WordsBehindCall(k)
        header, limit = self.turn.prompt, close if words is None else words
        at = rendered.text.rfind(header, max(0, start - len(header)), start + len(header)) if header.strip() else -1
        if at >= 0 and start < at + len(header) <= limit:
            start, exact = at + len(header), False  # the model never writes a header, nor a part of one
        missing = self.turn.missing_end(rendered.text[close:end], message, continues=talk.continues(k))
        block, space = self._generation_block(k, close, rendered), self.turn.space
        if block is not None:
            loss_start = block[0]  # the author's {% generation %} block says where the loss starts
        else:  # Qwen2.5 writes the white space that ends its prompt together with the answer's words
            loss_start = start - len(space) if space and rendered.text.endswith(space, 0, start) else start
        return Region(k, loss_start, end, missing, prompt_end=start), exact

    def _generation_block(self, k: int, close: int, rendered: Rendered) -> tuple[int, int] | None:
        """The {% generation %} block around the end of message k's words, joined with blocks that touch it."""
        block = next(((start, end) for start, end in rendered.generation if start <= close <= end), None)
        if block is None:
            return None
        for start, end in sorted(rendered.generation):
            if end == block[0] or start == block[1]:
                block = min(start, block[0]), max(end, block[1])
        others = (at for j, places in rendered.closed.items() if j != k for at in places)
        return None if any(block[0] < at < block[1] for at in others) else block

    # --- where a region starts

    def _start(self, k: int, close: int, talk: _Conversation) -> tuple[int, bool]:
        """The start of region k, and whether the text up to there is exactly the serving prompt."""
        rendered, text, opened = talk.rendered, talk.rendered.text, talk.rendered.open(k)
        limit = close if opened is None else opened
        before = rendered.close(k - 1) if k else None
        known = (str(talk.messages[k - 1].get("role")), text[before:limit]) if before is not None and opened else None
        if talk.continues(k) and known in self._starts and known is not None and before is not None:
            return before + self._starts[known], False
        prompt = self._read(talk.marked[:k], talk.tools, prompt=True)
        if prompt is None:
            return self._start_behind_prompt(k, rendered, limit), False
        shown = (j for j in range(k - 1, -1, -1) if prompt.close(j) is not None and rendered.close(j) is not None)
        anchor = next((j for j in shown if rendered.closed[j][0] <= limit), None)  # the last that both show once
        at = rendered.closed[anchor][0] if anchor is not None else 0
        tail = prompt.text[prompt.closed[anchor][0] if anchor is not None else 0 :]
        gap, offset = text[at : max(limit, at)], len(tail)
        if not text[at:close].startswith(tail):
            offset = self._shared_prompt(tail, gap, whole=opened is not None)
            if not offset:
                return self._start_behind_prompt(k, rendered, limit), False
        if known is not None and anchor == k - 1 and offset <= len(gap):
            self._starts[known] = offset
        return at + offset, prompt.text == text[: at + offset]

    def _shared_prompt(self, tail: str, gap: str, *, whole: bool) -> int:
        """How many characters the prompt's `tail` and the text's `gap` share, both after the anchor, down to a control
        token or a line. whole: the gap ends at the answer's first word.
        """
        shared = common_prefix(tail, gap)
        if not tail[shared:].strip():
            return shared  # only white space of the prompt is missing
        if whole and not gap[shared:].strip():
            return len(gap)
        return self.vocabulary.token_edge(tail, gap, shared)

    def _start_behind_prompt(self, k: int, rendered: Rendered, limit: int) -> int:
        """The start where no prompt for k can be rendered, or none like this text: behind the probed prompt."""
        prompt = self.turn.prompt
        floor = max((at for j, places in rendered.closed.items() for at in places if j < k and at <= limit), default=0)
        at = rendered.text.rfind(prompt, floor, limit) if prompt else -1
        if at < 0:
            raise Refused(f"where the answer of message {k + 1} begins cannot be determined: the text before it")
        return at + len(prompt)

    # --- where a region ends

    def _end(self, k: int, close: int, talk: _Conversation) -> str:
        """What follows the words of message k up to the end of its turn, trailing white space left out.

        Raises Refused if the comparisons do not show it.
        """
        turn, after, continues = self.turn, talk.rendered.text[close:], talk.continues(k)
        if not continues and after == turn.tail:
            return turn.end
        if continues and turn.middle_end and after.startswith(turn.middle_end):
            return turn.middle_end
        if continues:
            next_words = (at for j, places in talk.rendered.opened.items() if j > k for at in places if at >= close)
            after = talk.rendered.text[close : min(next_words, default=len(talk.rendered.text))]
            end = self._middle_end(k, after, talk)
        else:
            end = self._last_end(k, after, talk)
        tokens = self.vocabulary.tokens_in(end or "")
        ended = not self.vocabulary.tokens_in(turn.middle_end if continues else turn.end) or bool(
            tokens and end and end.endswith(tokens[-1])
        )
        if end is None or (talk.messages[k].get("tool_calls") and not ended):  # the last call is written differently
            raise Refused(f"where the turn of message {k + 1} ends cannot be determined")
        return end

    def _last_end(self, k: int, after: str, talk: _Conversation) -> str:
        """The end of the last turn: what it shares with the same turn in conversations that go on."""
        for marked, prompt in (([*talk.marked, _FOLLOW_UP], False), (talk.marked, True)):
            other = self._after(k, marked, talk.tools, prompt=prompt)
            if other is not None and (shared := shared_end(self.vocabulary, after, other)).strip():
                return shared
        return after.rstrip()

    def _middle_end(self, k: int, gap: str, talk: _Conversation) -> str | None:
        """The end of a turn that others follow; "" if the template writes none, None if it is unclear.

        gap: the text between its last word and the next turn's first.
        """
        alone = self._after(k, talk.marked[: k + 1], talk.tools, prompt=False)
        prompted = self._after(k, talk.marked[: k + 1], talk.tools, prompt=True)
        prompt = self.turn.prompt
        if alone is not None and gap.startswith(alone) and (self.turn.shares_end or not alone.strip()):
            header = self.vocabulary.leading_token(gap[len(alone) :], unless=prompt)
            if header:
                return alone + header
        shared = "" if alone is None else shared_end(self.vocabulary, gap, alone)
        if shared.strip():
            return shared
        if prompted is not None and prompt and prompted.endswith(prompt):
            between = prompted[: -len(prompt)]
            if gap.startswith(between) or not between.strip():
                return between.rstrip()
        return "" if alone is not None and not alone.strip() else None

    def _after(self, k: int, marked: list[Message], tools: Tools, *, prompt: bool) -> str | None:
        """What follows message k in this conversation; None if the template refuses it or hides the sentinel."""
        rendered = self._read(marked, tools, prompt=prompt)
        close = rendered.end_of(k, marked[k]) if rendered else None
        return rendered.text[close:] if rendered and close is not None else None

    def _read(self, marked: list[Message], tools: Tools, *, prompt: bool) -> Rendered | None:
        """What the sentinels of these messages show; None if the template refuses them."""
        try:
            text = self.template.render(marked, tools=tools, add_generation_prompt=prompt, tracked=True)
        except Refused:
            return None
        return read_sentinels(text)


@dataclass(frozen=True)
class _Conversation:
    """One conversation: its messages without and with sentinels, and what the sentinels show."""

    messages: list[Message]
    marked: list[Message]
    tools: Tools
    rendered: Rendered
    prompt: bool

    def continues(self, k: int) -> bool:
        """Whether anything follows message k."""
        return self.prompt or k < len(self.messages) - 1
