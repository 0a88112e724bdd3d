"""A text file as lines or blocks, in bounded memory, with its progress told. Lines end at `\n` and nowhere else."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sft.data.sniff import BROKEN, Found, open_bytes
from sft.errors import DataError

Progress = Callable[[int, int], None]  # bytes done, bytes in all
LONGEST = 64 << 20  # characters of one row
BLOCK = 1 << 20
TELL_EVERY = 1_000


class Text:
    """An open text file: `lines()` or `blocks()`, once."""

    def __init__(self, stream: io.TextIOWrapper, tell: Callable[[], None]) -> None:
        self._stream, self._tell = stream, tell

    def lines(self) -> Iterator[tuple[int, str]]:
        """Line number from 1 and the line with its end; a line over LONGEST comes cut to LONGEST + 1 characters."""
        readline = self._stream.readline
        number = 0
        while line := readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST and not line.endswith("\n"):
                while (rest := readline(BLOCK)) and not rest.endswith("\n"):
                    pass
            if number % TELL_EVERY == 0:
                self._tell()
            yield number, line
        self._tell()

    def blocks(self) -> Iterator[str]:
        """The text in pieces of about a megabyte."""
        while block := self._stream.read(BLOCK):
            self._tell()
            yield block
        self._tell()


@contextmanager
def open_text(path: Path, found: Found, on_progress: Progress | None) -> Iterator[Text]:
    """Opens `path` as what it was found to be, without its byte order mark. A broken encoding is a DataError."""
    stream, raw = open_bytes(path)
    total = os.fstat(raw.fileno()).st_size
    report = on_progress or (lambda _done, _total: None)
    encoding = "utf-8-sig" if found.encoding == "utf-8" else found.encoding
    with raw, stream, io.TextIOWrapper(stream, encoding, found.errors, newline="\n") as text:
        try:
            yield Text(text, lambda: report(min(raw.tell(), total), total))
        except UnicodeDecodeError as error:
            what = f"the text breaks off: not {found.encoding} after {error.start:,} bytes of a block"
            raise DataError(what, where=str(path), mend="save it as UTF-8") from None
        except BROKEN as error:
            what = f"the file breaks off: {error}"
            raise DataError(what, where=str(path), mend="fetch it again") from None
