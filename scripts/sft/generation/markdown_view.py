"""An answer as Markdown while it streams to a terminal: finished blocks are printed for good, the last is redrawn."""

from __future__ import annotations

from typing import Any

LINES = 12  # of the block under way that are redrawn; the whole of it is printed when it ends


class MarkdownView:
    """A context in which `write` takes pieces of Markdown. console: rich's, on a terminal."""

    def __init__(self, console: Any) -> None:
        self.console, self.block = console, ""

    def __enter__(self) -> MarkdownView:
        from rich.live import Live

        self.live = Live(
            console=self.console,
            transient=True,
            auto_refresh=False,
            vertical_overflow="crop",
            get_renderable=self._last,
        )
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()
        self._print(self.block)
        self.block = ""

    def write(self, piece: str) -> None:
        """More of the answer."""
        self.block += piece
        done, rest = finished(self.block)
        if done:
            self.block = rest
            self._print(done)  # above the block that is redrawn
        self.live.refresh()

    def _print(self, text: str) -> None:
        from rich.markdown import Markdown

        if text.strip():
            self.console.print(Markdown(text), soft_wrap=False)

    def _last(self) -> Any:
        from rich.markdown import Markdown

        return Markdown("\n".join(self.block.split("\n")[-LINES:]))


def finished(text: str) -> tuple[str, str]:
    """The blocks that are whole, and the rest: a blank line ends a block, but not within a code fence."""
    at, start, fenced = 0, 0, False
    for line in text.splitlines(keepends=True)[:-1]:
        start += len(line)
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced and not line.strip():
            at = start
    return text[:at], text[at:]
