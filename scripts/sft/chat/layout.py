"""A rendered conversation with the places of the model's own words in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from sft.data.conversation import Message


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
