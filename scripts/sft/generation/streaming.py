"""An answer piece by piece, for a chat: no half characters, no beginnings of stop strings, and it can be broken off."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from torch import nn
from transformers.generation.streamers import BaseStreamer

from sft.config.schema import GenerationSection
from sft.generation import engine
from sft.generation.engine import Answer, Kind
from sft.generation.stopping import Ends, cut, held_back


class _Tokens(BaseStreamer):  # type: ignore[misc]
    """Hands each new token to a queue; the prompt, which comes first, is left out."""

    def __init__(self, queue: SimpleQueue[int | BaseException | None]) -> None:
        self.queue, self.prompt_seen = queue, False

    def put(self, value: Any) -> None:
        if self.prompt_seen:
            self.queue.put(int(value.reshape(-1)[0]))
        self.prompt_seen = True

    def end(self) -> None:
        """The worker says when it is done."""


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt: Sequence[int],
    settings: GenerationSection,
    stops: Ends,
    *,
    kind: Kind = "causal",
    max_len: int | None = None,
) -> Generator[str, None, Answer]:
    """Yields the answer's text as it is made, and returns the whole `Answer`; the text is that of `engine.generate`.

    Closing the generator, or an exception thrown into it (Ctrl-C), ends the model's work at its next token.
    """
    ends = engine.all_ends(stops, settings)
    queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
    cancelled = Event()
    ids, truncated = engine.fit(model, prompt, settings, kind, max_len)

    def work() -> None:
        try:
            engine.run(
                model, tokenizer, [ids], settings, ends,
                kind=kind, streamer=_Tokens(queue), cancelled=cancelled,
            )  # fmt: skip
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    worker = Thread(target=work, daemon=True)
    with engine.undisturbed(model):
        worker.start()
        try:
            made = yield from _pieces(queue, tokenizer, ends)
        finally:
            cancelled.set()
            worker.join()
    return engine.finish(tokenizer, made, ends, truncated)


def _pieces(
    queue: SimpleQueue[int | BaseException | None], tokenizer: Any, ends: Ends
) -> Generator[str, None, list[int]]:
    made: list[int] = []
    shown = 0
    while True:
        token = queue.get()
        if isinstance(token, BaseException):
            raise token
        if token is not None:
            made.append(token)
        found = cut(tokenizer, made, ends)
        over = token is None or found.stopped
        safe = len(found.text) - (0 if over else held_back(found.text, ends.strings))
        if safe > shown:
            yield found.text[shown:safe]
            shown = safe
        if over:
            return made
