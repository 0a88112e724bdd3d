"""Where a turn ends: what follows its last word both where the conversation goes on and where it stops."""

from __future__ import annotations

from sft.chat import turns
from sft.chat.marks import Read, Tools, read
from sft.chat.template import ChatTemplate, Message, Refused
from sft.chat.turns import Turn
from sft.chat.vocabulary import Vocabulary

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
        end = turns.last_end(self.vocabulary, self._unasked(here), others)
        checked = self._checked(end, here, self.turn.end) if marked[k].get("tool_calls") else end
        if checked is None:
            raise _unproven(k)
        return checked

    def _middle(self, k: int, close: int, marked: list[Message], tools: Tools, seen: Read) -> str:
        following = (at for j, places in seen.opened.items() if j > k for at in places if at >= close)
        gap = seen.text[close : min(following, default=len(seen.text))]
        alone = self._after(k, marked[: k + 1], tools, prompt=False)
        asked = self._after(k, marked[: k + 1], tools, prompt=True)
        end = turns.middle_end(self.vocabulary, self.turn, gap, None if alone is None else self._unasked(alone), asked)
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
