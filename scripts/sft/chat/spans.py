"""Where the model's own words stand in a rendered conversation, proven from the text and never guessed.

A region of one assistant message is what lies between the generation prompt and the end of its turn. It is found from
renders alone, with marks (`marks.py`) as fixed points:

- its start: the conversation before it is rendered with the generation prompt. What stands there after the last word
  of the message before must stand in the whole text too, after that same word; the region begins where it ends. Where
  the template asks one thing and shows another (a think block only in the prompt, or only in the text), the region
  begins where the two part, at a control token or a line.
- its end: what the template writes after the last word both where the conversation goes on and where it stops. That
  is the end of the turn; a newline, or an end-of-text token that stands at the very end only, is not part of it.

Everything is compared as text between fixed points, so a template may trim, move or rewrite other turns.
docs/decisions/0003-how-labels-are-found.md has the cases.
"""

from __future__ import annotations

from dataclasses import replace

from sft.chat import marks, turns
from sft.chat.endings import Endings, ending, missing
from sft.chat.layout import Layout, Region
from sft.chat.marks import REASONING, Read, Tools, read
from sft.chat.template import ChatTemplate, Message, Refused
from sft.chat.turns import Turn
from sft.chat.vocabulary import Vocabulary


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
        marked, seen = marks.fit(self.template, messages, tools, text, self.vocabulary.controls, prompt=prompt)
        answers = [k for k, message in enumerate(messages) if message.get("role") == "assistant"]
        made = Layout(text, fakes=self.vocabulary.spans(text, seen.broken))
        for k in answers:
            try:
                region, exact = self._region(k, messages, marked, tools, seen, on=prompt or k < len(messages) - 1)
            except OddCall:
                raise
            except Refused as refused:
                if not marks.says_something(messages[k]):
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
        silent = odd.left_out and not marks.words(message)
        if odd.left_out:
            unsaid = ("tool_calls", *REASONING) if silent else ("tool_calls",)
            same = [*messages[:k], {key: message[key] for key in message if key not in unsaid}, *messages[k + 1 :]]
            origin = list(range(len(same)))
        else:
            after = next((j for j in range(k + 1, len(messages)) if messages[j].get("role") != "tool"), len(messages))
            words = {"role": "assistant", "content": message["content"]}
            same = [*messages[:k], {**message, "content": ""}, *messages[k + 1 : after], words, *messages[after:]]
            origin = [*range(after), k, *range(after, len(messages))]
        if not (silent or marks.says_something({**message, "tool_calls": None})):
            raise odd
        try:
            if self.template.render(same, tools=tools, add_generation_prompt=prompt) != text:
                raise odd
            made = self.layout(same, tools, prompt=prompt)
        except Refused:
            raise odd from None
        made.regions = [replace(region, message=origin[region.message]) for region in made.regions]
        made.left_out = made.left_out or odd.left_out
        answered = any(one["role"] == "assistant" and marks.says_something(one) for one in same)
        if silent and not prompt and not answered:
            made.regions = []
        return made

    def _region(
        self, k: int, messages: list[Message], marked: list[Message], tools: Tools, seen: Read, *, on: bool
    ) -> tuple[Region, bool]:
        """Region k, and whether the text up to it is the serving prompt. `on`: something follows message k."""
        close = ending(seen, k, messages[k])
        if close is None and (seen.closed.get(k) or marks.says_something(messages[k])):
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
            offset = turns.parting(self.vocabulary, tail, gap, whole=opened is not None)
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
