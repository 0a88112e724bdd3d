"""How a turn begins and ends: what two renders of the same words have in common around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sft.chat import sentinels
from sft.chat.sentinels import REASONING, Layout, Read, Region, Tools, read
from sft.chat.template import ChatTemplate, Message, Refused
from sft.chat.tokenize import Vocabulary


@dataclass
class Turn:
    """What a template does with a plain turn; learnt from probes by `facts.learn`, so that rows need fewer renders.

    prompt: the generation prompt. tail: all that follows an answer at the end of a conversation. end: the end of the
    turn there. middle_end: the end of the turn where the conversation goes on. borrows: a turn has no end of its own,
    the next turn's control token ends it (GLM). tool_end: the token that ends a tool call, where it is borrowed too.
    space: the white space that ends the prompt, where the template writes it together with the answer's words.
    always: the template writes the prompt behind every conversation, asked or not (Llama 3 as first released).
    """

    prompt: str = ""
    tail: str = ""
    end: str = ""
    middle_end: str = ""
    borrows: bool = False
    tool_end: str = ""
    space: str = ""
    always: bool = False

    @property
    def known(self) -> bool:
        """Whether the template was probed."""
        return bool(self.tail or self.end or self.middle_end or self.prompt)


def parting(vocabulary: Vocabulary, tail: str, gap: str, *, whole: bool) -> int:
    """How many characters the prompt and the text before the answer share, down to a control token or a line.

    tail: what the prompt has after the last fixed point; gap: what the text has between it and the answer's first word,
    where that is known (`whole`). 0 where they share nothing.
    """
    agree = agreement(tail, gap)
    if whole and agree == len(gap):
        return agree  # the prompt goes on where the text has the answer already
    if not tail[agree:].strip():
        return agree  # only white space of the prompt is missing
    if whole and not gap[agree:].strip():
        return len(gap)
    return vocabulary.edge(tail, gap, agree)


def last_end(vocabulary: Vocabulary, tail: str, others: list[str]) -> str:
    """The end of the last turn: what `tail` shares with the same turn in conversations that go on (`others`)."""
    for other in others:
        shared = shared_end(vocabulary, tail, other)
        if shared.strip():
            return shared
    return tail.rstrip()


def middle_end(vocabulary: Vocabulary, turn: Turn, gap: str, alone: str | None, asked: str | None) -> str | None:
    """The end of a turn that is followed by others; "" where the template writes none, None where it is unclear.

    gap: what stands between its last word and the next turn's first. alone: what follows it where the conversation
    stops there; asked: the same with the generation prompt.
    """
    shared = "" if alone is None else shared_end(vocabulary, gap, alone)
    prompt = turn.prompt
    if alone is not None and gap.startswith(alone) and (turn.borrows or not alone.strip()):
        borrowed = vocabulary.opening(gap[len(alone) :], but=prompt)
        if borrowed:
            return alone + borrowed
    if shared.strip():
        return shared
    if asked is not None and prompt and asked.endswith(prompt):
        between = asked[: -len(prompt)]
        if gap.startswith(between) and between.strip():
            return between.rstrip()
        if not between.strip():
            return ""
    return "" if alone is not None and not alone.strip() else None


def shared_end(vocabulary: Vocabulary, one: str, other: str) -> str:
    """The common beginning of two texts, down to a control token or a line, trailing white space left out.

    A token that opens turns is not part of it, nor what follows.
    """
    agree = agreement(one, other)
    if agree < min(len(one), len(other)):
        agree = vocabulary.edge(one, other, agree)
    opening = one.find(vocabulary.opener, 1, agree) if vocabulary.opener else -1
    return one[: agree if opening < 0 else opening].rstrip()


def agreement(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters two texts (or tokens two rows) have in common at their begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # halving: slices compare fast
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


_FOLLOW_UP = {"role": "user", "content": "Kquv"}


def ending(seen: Read, k: int, message: Message) -> int | None:
    """Where the last mark of message k stands, if that is known."""
    return seen.first_close(k) if message.get("tool_calls") else seen.close(k)


def missing(turn: Turn, end: str, message: Message, *, on: bool) -> str | None:
    """The end token to put behind a turn, see Region; `end` is what follows the last word in it."""
    wanted = turn.tool_end if message.get("tool_calls") and turn.tool_end else turn.middle_end.strip()
    wanted = wanted or turn.end.strip()
    if turn.end.strip() or (on and wanted):  # the template ends turns, this one too as a rule
        return None if end.strip() else wanted
    return None if wanted and end.endswith(wanted) else wanted


class Endings:
    """Finds the ends of turns for one template and one vocabulary. turn: what is known of a plain turn."""

    def __init__(self, template: ChatTemplate, vocabulary: Vocabulary, turn: Turn) -> None:
        self.template, self.vocabulary, self.turn = template, vocabulary, turn

    def find(self, k: int, close: int, marked: list[Message], tools: Tools, seen: Read, *, on: bool) -> str:
        """What follows the mark of message k up to the end of its turn, trailing white space left out.

        Raises Refused where the two comparisons do not tell.
        """
        turn, here = self.turn, seen.text[close:]
        if not on and turn.known and here == turn.tail:
            return turn.end
        if on and turn.middle_end and here.startswith(turn.middle_end):
            return turn.middle_end
        if turn.known and ending(seen, k, marked[k]) is None:  # no word to hold on to: an empty answer
            space = here[: len(here) - len(here.lstrip())]
            usual = turn.middle_end if on else turn.end
            return space + usual if usual.strip() and here.startswith(space + usual) else usual
        return self._middle(k, close, marked, tools, seen) if on else self._last(k, here, marked, tools)

    def _last(self, k: int, here: str, marked: list[Message], tools: Tools) -> str:
        onward = self._after(k, [*marked, _FOLLOW_UP], tools, prompt=False)
        asked = self._after(k, marked, tools, prompt=True)
        others = [other for other in (onward, asked) if other is not None]
        end = last_end(self.vocabulary, self._unasked(here), others)
        checked = self._checked(end, here, self.turn.end) if marked[k].get("tool_calls") else end
        if checked is None:
            raise _unproven(k)
        return checked

    def _middle(self, k: int, close: int, marked: list[Message], tools: Tools, seen: Read) -> str:
        following = (at for j, places in seen.opened.items() if j > k for at in places if at >= close)
        gap = seen.text[close : min(following, default=len(seen.text))]
        alone = self._after(k, marked[: k + 1], tools, prompt=False)
        asked = self._after(k, marked[: k + 1], tools, prompt=True)
        end = middle_end(self.vocabulary, self.turn, gap, None if alone is None else self._unasked(alone), asked)
        end = self._checked(end, gap, self.turn.middle_end) if marked[k].get("tool_calls") else end
        if end is None:
            raise _unproven(k)
        return end

    def _checked(self, end: str | None, after: str, usual: str) -> str | None:
        """The end of a turn that calls a tool. The call may be written otherwise where it is the last word, so that
        the comparison stops inside it: then the one usual end in what follows is taken, if no other turn lies between.
        """
        controls = self.vocabulary.found(end or "")
        if end is not None and not (self.vocabulary.holds_control(usual) and not end.endswith(tuple(controls) or "\0")):
            return end
        usual = usual.strip()
        if not usual or after.count(usual) != 1:
            return None
        until = after[: after.index(usual)]
        return None if self.vocabulary.turns_in(until) else until + usual

    def _unasked(self, after: str) -> str:
        """What follows a last turn, without the prompt that some templates write there unasked."""
        return after.removesuffix(self.turn.prompt) if self.turn.always else after

    def _after(self, k: int, marked: list[Message], tools: Tools, *, prompt: bool) -> str | None:
        """What follows message k in this conversation; None where the template refuses it or does not show its mark."""
        try:
            seen = read(self.template.tracked(marked, tools, prompt))
        except Refused:
            return None
        close = ending(seen, k, marked[k])
        return None if close is None else seen.text[close:]


def _unproven(k: int) -> Refused:
    return Refused(f"where the turn of message {k + 1} ends cannot be proven")


class OddCall(Refused):
    """The template leaves out the tool call of message `index`, or writes its words apart from it: no region fits."""

    def __init__(self, index: int, *, left_out: bool) -> None:
        apart = f"writes the words of message {index + 1} apart from its tool call"
        super().__init__("the template " + (f"leaves out the tool call in message {index + 1}" if left_out else apart))
        self.index, self.left_out = index, left_out


class Spans:
    """Finds the regions of conversations for one template and one vocabulary of control tokens."""

    def __init__(self, template: ChatTemplate, vocabulary: Vocabulary, turn: Turn | None = None) -> None:
        self.template, self.vocabulary, self.turn = template, vocabulary, turn or Turn()
        self.endings = Endings(template, vocabulary, self.turn)
        self._starts: dict[tuple[str, str], int] = {}

    def layout(self, messages: list[Message], tools: Tools = None, *, prompt: bool = False) -> Layout:
        """The text of a conversation and its regions; with `prompt`, up to where the model begins to write.

        Raises Refused with the reason where the template refuses the row or the proof fails.
        """
        text = self.template.render(messages, tools=tools, add_generation_prompt=prompt)
        try:
            return self._layout(text, messages, tools, prompt)
        except OddCall as odd:
            return self._otherwise(odd, text, messages, tools, prompt)

    def _layout(self, text: str, messages: list[Message], tools: Tools, prompt: bool) -> Layout:
        marked, seen = sentinels.fit(self.template, messages, tools, text, self.vocabulary.controls, prompt=prompt)
        answers = [k for k, message in enumerate(messages) if message.get("role") == "assistant"]
        made = Layout(text, fakes=self.vocabulary.spans(text, seen.broken))
        for k in answers:
            try:
                region, exact = self._region(k, messages, marked, tools, seen, on=prompt or k < len(messages) - 1)
            except OddCall:
                raise
            except Refused as refused:
                if not sentinels.says_something(messages[k]):
                    continue  # nothing of it is shown, and there was nothing to show
                region, exact = self._marked_by_author(k, seen, refused), False
            if made.regions and region.start < made.regions[-1].end:
                raise Refused(f"the regions of messages {made.regions[-1].message + 1} and {k + 1} overlap")
            made.regions.append(region)
            made.prompt_ends = region.cut if exact else None
        return made

    def _otherwise(self, odd: OddCall, text: str, messages: list[Message], tools: Tools, prompt: bool) -> Layout:
        """The layout of another conversation that the template writes as the very same text.

        A call that is left out is taken away; without words beside it, that is an empty answer, and a row that has no
        other has no regions. Words that stand behind the results of their call are an answer of their own. The refusal
        stands where the text differs.
        """
        k, message = odd.index, messages[odd.index]
        silent = odd.left_out and not sentinels.words(message)
        if odd.left_out:
            unsaid = ("tool_calls", *REASONING) if silent else ("tool_calls",)
            same = [*messages[:k], {key: message[key] for key in message if key not in unsaid}, *messages[k + 1 :]]
            origin = list(range(len(same)))
        else:
            after = next((j for j in range(k + 1, len(messages)) if messages[j].get("role") != "tool"), len(messages))
            words = {"role": "assistant", "content": message["content"]}
            same = [*messages[:k], {**message, "content": ""}, *messages[k + 1 : after], words, *messages[after:]]
            origin = [*range(after), k, *range(after, len(messages))]
        if not (silent or sentinels.says_something({**message, "tool_calls": None})):
            raise odd
        try:
            if self.template.render(same, tools=tools, add_generation_prompt=prompt) != text:
                raise odd
            made = self.layout(same, tools, prompt=prompt)
        except Refused:
            raise odd from None
        made.regions = [replace(region, message=origin[region.message]) for region in made.regions]
        made.left_out = made.left_out or odd.left_out
        answered = any(one["role"] == "assistant" and sentinels.says_something(one) for one in same)
        if silent and not prompt and not answered:
            made.regions = []
        return made

    def _region(
        self, k: int, messages: list[Message], marked: list[Message], tools: Tools, seen: Read, *, on: bool
    ) -> tuple[Region, bool]:
        """Region k, and whether the text up to it is the serving prompt. `on`: something follows message k."""
        close = ending(seen, k, messages[k])
        if close is None and (seen.closed.get(k) or sentinels.says_something(messages[k])):
            times = len(seen.closed.get(k, []))
            if not times and messages[k].get("tool_calls"):
                raise OddCall(k, left_out=True)
            if not times:
                raise Refused(f"the template does not show the answer in message {k + 1}")
            raise Refused(f"the template shows the answer in message {k + 1} {times} times: its place cannot be proven")
        start, exact = self._start(k, messages, marked, tools, seen, on)
        close = start if close is None else close
        if start > close:
            raise Refused(f"the prompt of message {k + 1} reaches into its answer")
        end = close + len(self.endings.find(k, close, marked, tools, seen, on=on))
        words = seen.open(k)
        if words is not None and words > end:
            raise OddCall(k, left_out=False)
        header = self.turn.prompt
        limit = close if words is None else words
        at = seen.text.rfind(header, max(0, start - len(header)), start + len(header)) if header.strip() else -1
        if at >= 0 and start < at + len(header) <= limit:
            start, exact = at + len(header), False  # a header is never the model's to write, nor a part of it
        lacks = missing(self.turn, seen.text[close:end], messages[k], on=on)
        return Region(k, self._learnt_from(start, close, k, seen), end, lacks, asked=start), exact

    def _learnt_from(self, start: int, close: int, k: int, seen: Read) -> int:
        """Where learning starts: where the author's {% generation %} block does, else where the model begins to write.

        A template that writes the white space at the end of its prompt together with the answer's words (Qwen2.5) means
        it as the answer's; learning it does no harm.
        """
        block = self._block(k, close, seen)
        space = self.turn.space
        if block is not None:
            return block[0]
        return start - len(space) if space and seen.text.endswith(space, 0, start) else start

    def _block(self, k: int, close: int, seen: Read) -> tuple[int, int] | None:
        """The {% generation %} block around the end of message k's words, blocks that touch it taken in."""
        block = next(((start, end) for start, end in seen.generation if start <= close <= end), None)
        if block is None:
            return None
        for start, end in sorted(seen.generation):
            if end == block[0] or start == block[1]:
                block = min(start, block[0]), max(end, block[1])
        others = (at for j, places in seen.closed.items() if j != k for at in places)
        return None if any(block[0] < at < block[1] for at in others) else block

    # --- where it begins

    def _start(
        self, k: int, messages: list[Message], marked: list[Message], tools: Tools, seen: Read, on: bool
    ) -> tuple[int, bool]:
        """The start of region k, and whether the text up to there is exactly the serving prompt."""
        text, close, opened = seen.text, ending(seen, k, messages[k]), seen.open(k)
        limit = opened if opened is not None else len(text) if close is None else close
        before = seen.close(k - 1) if k else None
        known = (str(messages[k - 1].get("role")), text[before:limit]) if before is not None and opened else None
        if on and known is not None and before is not None and known in self._starts:
            return before + self._starts[known], False
        try:
            asked = read(self.template.tracked(marked[:k], tools, True))
        except Refused:
            return self._start_by_prompt(k, seen, limit), False
        anchor = next((j for j in range(k - 1, -1, -1) if _both(seen, asked, j, limit)), None)
        if anchor is None:
            at, asked_at = 0, 0
        else:
            at, asked_at = seen.closed[anchor][0], asked.closed[anchor][0]
        tail, gap = asked.text[asked_at:], text[at : max(limit, at)]
        within = text[at : len(text) if close is None else close]
        offset = len(tail)
        if not within.startswith(tail):
            offset = parting(self.vocabulary, tail, gap, whole=opened is not None)
        header = self.turn.prompt
        if not offset and tail and header.strip() and tail.endswith(header) and gap.startswith(header):
            offset = len(header)  # the end of the turn before it is written in the prompt alone
        if not within.startswith(tail) and offset == 0:
            if not k:
                return self._start_by_prompt(k, seen, limit), False  # nothing to ask about stands before it
            raise Refused(f"the generation prompt and the text before message {k + 1} have nothing in common")
        if known is not None and anchor == k - 1 and offset <= len(gap):
            self._starts[known] = offset
        return at + offset, asked.text == text[: at + offset]

    def _start_by_prompt(self, k: int, seen: Read, limit: int) -> int:
        """Where the conversation before k cannot stand alone: right after the generation prompt known from a probe."""
        prompt = self.turn.prompt
        floor = max((at for j, places in seen.closed.items() for at in places if j < k and at <= limit), default=0)
        found = seen.text.rfind(prompt, floor, limit) if prompt else -1
        if found < 0:
            raise Refused(f"where the answer of message {k + 1} begins cannot be proven: the text before it")
        return found + len(prompt)

    def _marked_by_author(self, k: int, seen: Read, refused: Refused) -> Region:
        """The {% generation %} block around message k, lengthened to the end of the turn; else the refusal stands."""
        close = seen.first_close(k)
        block = None if close is None else self._block(k, close, seen)
        if block is None:
            raise refused
        region = seen.text[slice(*block)].rstrip()
        finish = self.turn.middle_end
        if finish and not region.endswith(finish) and seen.text.startswith(finish, block[1]):
            return Region(k, block[0], block[1] + len(finish))
        return Region(k, block[0], block[0] + len(region), None if not finish or region.endswith(finish) else finish)


def _both(seen: Read, asked: Read, j: int, limit: int) -> bool:
    at = seen.close(j)
    return at is not None and at <= limit and asked.close(j) is not None
