"""An answer piece by piece, for a chat: no half characters, no beginnings of stop strings, and it can be broken off."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from torch import nn

from sft.config.schema import GenerationSection
from sft.generation import engine
from sft.generation.engine import Answer, Kind
from sft.generation.stopping import Ends, Watcher, cut, held_back

_Tokens = SimpleQueue[int | BaseException | None]


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt: Sequence[int],
    settings: GenerationSection,
    stops: Ends,
    *,
    kind: Kind = "causal",
) -> Generator[str, None, Answer]:
    """Yields the answer's text as it is made, and returns the whole `Answer`, both by the loop of `engine.generate`.

    Closing the generator, or an exception thrown into it (Ctrl-C), ends the model's work at its next token.
    """
    ends = engine.all_ends(stops, settings)
    queue: _Tokens = SimpleQueue()
    cancelled = Event()
    asks, truncated = engine.asked(model, tokenizer, [prompt], settings, ends, kind)

    def heard(tokens: list[int]) -> bool:
        queue.put(tokens[0])
        return not cancelled.is_set()

    def work() -> None:
        try:
            watcher = Watcher(tokenizer, ends)
            engine.answer(model, tokenizer, asks, settings, watcher, kind, 1, lambda ask: None, heard)
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
    return engine.finish(tokenizer, made, ends, truncated[0])


def _pieces(queue: _Tokens, tokenizer: Any, ends: Ends) -> Generator[str, None, list[int]]:
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
