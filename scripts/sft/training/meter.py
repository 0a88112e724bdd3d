"""How fast a run is: its tokens, its labelled tokens, the seconds of its steps and those spent waiting for input."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class Meter:
    """Counts since the run's first start, over all ranks. waited: seconds between steps until the input was there."""

    tokens: int = 0
    labelled: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    _asked: float = 0.0
    _began: float | None = None
    _read: tuple[int, float, float] = (0, 0.0, 0.0)

    def ask(self) -> None:
        """The next window is asked for."""
        self._asked, self._began = time.monotonic(), None

    def begin(self) -> None:
        """The window is there, its step begins."""
        self._began = time.monotonic()

    def arrived(self) -> None:
        """Books the wait for the window."""
        self.waited += (self._began or time.monotonic()) - self._asked

    def end(self) -> None:
        """The step has ended."""
        if self._began is not None:
            self.seconds += time.monotonic() - self._began
            self._began = None

    def since_last(self) -> dict[str, float]:
        """Tokens a second, and the share of the time that went into waiting, since this was last asked."""
        now = (self.tokens, self.seconds, self.waited)
        tokens, seconds, waited = (new - old for new, old in zip(now, self._read, strict=True))
        self._read = now
        return {
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "input_wait": waited / max(seconds + waited, 1e-9),
        }

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {"tokens": self.tokens, "labelled": self.labelled, "seconds": self.seconds}

    def restore(self, state: dict[str, float]) -> None:
        """Goes on from what `state` gave."""
        self.tokens, self.labelled, self.seconds = int(state["tokens"]), int(state["labelled"]), state["seconds"]
        self._read = (self.tokens, self.seconds, self.waited)
