"""Tables in text: CSV and TSV, cells of any size, line ends inside quotes. Bad quotes cost their own row only."""

from __future__ import annotations

import csv
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from sft.data.lines import LONGEST, Progress, open_text
from sft.data.raw import Raw
from sft.data.sniff import Found
from sft.errors import DataError

MOST_LINES = 100_000  # of one row; less after many faults, since each open quote is looked for that far


class _Feed:
    """Lines for csv.reader, of which those of the row in hand can be given back."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self.lines, self.back = lines, deque[tuple[int, str]]()
        self.taken: list[tuple[int, str]] = []
        self.most, self.characters = MOST_LINES, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.back.popleft() if self.back else next(self.lines)
        self.taken.append(line)
        self.characters += len(line[1])
        if len(self.taken) > self.most or self.characters > LONGEST:
            raise csv.Error("a quote is opened and never closed")
        if "\0" in line[1]:
            raise csv.Error("a NUL byte")
        return line[1]

    def give_back(self) -> None:
        """All lines of the row but its first: that one is the fault, the others may be rows."""
        self.back.extendleft(reversed(self.taken[1:]))
        self.most = max(1_000, self.most - self.most // 50)

    def clear(self) -> None:
        self.taken, self.characters = [], 0


def read_csv(path: Path, name: str, found: Found, on_progress: Progress | None) -> Iterator[Raw]:
    """One row a record, keyed by the header; a row whose quotes or number of cells are wrong is a fault."""
    csv.field_size_limit(sys.maxsize)
    with open_text(path, found, on_progress) as text:
        feed = _Feed(text.lines())
        header: list[str] | None = None
        reader = csv.reader(feed, delimiter=found.delimiter, strict=True)
        while True:
            feed.clear()
            try:
                cells, why = next(reader), None
            except StopIteration:
                return
            except csv.Error as error:
                cells, why = [], str(error)
                reader = csv.reader(feed, delimiter=found.delimiter, strict=True)
            if why is None and not cells:
                continue
            if header is None:
                header = _header(path, cells, why)
                continue
            yield _row(name, header, cells, why, feed, found)


def _row(name: str, header: list[str], cells: list[str], why: str | None, feed: _Feed, found: Found) -> Raw:
    number, line = feed.taken[0]
    if why is None and len(cells) != len(header):
        why = f"{len(cells)} cells where the header has {len(header)}"
    if why is None and found.suspect and any("\udc80" <= c <= "\udfff" for _, part in feed.taken for c in part):
        return Raw(f"{name}:{number}", None, f"not {found.encoding.upper()}", "".join(part for _, part in feed.taken))
    if why is not None:
        feed.give_back()
        return Raw(f"{name}:{number}", None, f"bad CSV: {why}", line.strip("\r\n"))
    return Raw(f"{name}:{number}", dict(zip(header, cells, strict=True)))


def _header(path: Path, cells: list[str], why: str | None) -> list[str]:
    names = [cell.strip() or f"column {index}" for index, cell in enumerate(cells, 1)]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if why is None and twice is not None:
        why = f"two columns are called {twice!r}"
    if why is not None:
        mend = "the first line must name the columns, each once"
        raise DataError(f"the header cannot be read: {why}", where=f"{path}:1", mend=mend)
    return names
