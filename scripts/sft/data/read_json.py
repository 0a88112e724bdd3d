"""JSON lines, and JSON in one piece: an array of rows, {"data": [rows]}, or objects one after the other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.data import strict_json
from sft.data.faults import RowFault
from sft.data.lines import LONGEST, Progress, Text, open_text
from sft.data.raw import Raw
from sft.data.sniff import WRAPPERS, Found
from sft.errors import DataError

SPACE = re.compile(r"[ \t\r\n]*")
STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
SCALAR = re.compile(r"[^,\]}\n]*")
LIST_OF_ROWS = re.compile(r"\[[ \t\r\n]*([{\]]?)")
MARKS = re.compile(STRING.pattern + r'|[\[\]{}]|"', re.DOTALL)
SPLITS = ("train", "val", "valid", "validation", "dev", "eval", "test")
KEY = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*(" + STRING.pattern + r")[ \t\r\n]*:[ \t\r\n]*", re.DOTALL)


def read_lines(path: Path, name: str, found: Found, on_progress: Progress | None) -> Iterator[Raw]:
    """One row a line; blank lines are no rows."""
    with open_text(path, found, on_progress) as text:
        for number, line in text.lines():
            if line.strip(" \t\r\n"):
                yield _row(f"{name}:{number}", line.strip("\n\r"), found)


def _row(origin: str, text: str, found: Found) -> Raw:
    if len(text) > LONGEST:
        return Raw(origin, None, f"longer than {LONGEST >> 20} million characters", text)
    try:
        _readable(text, found)
        return Raw(origin, strict_json.parse(text))
    except RowFault as fault:
        return Raw(origin, None, fault.detail, text)


def _readable(text: str, found: Found) -> None:
    if found.suspect:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowFault("unreadable", f"not {found.encoding.upper()} at column {error.start + 1}") from None


def read_array(path: Path, name: str, found: Found, on_progress: Progress | None) -> Iterator[Raw]:
    """The rows of JSON in one piece, never more than a few blocks of it in memory."""
    with open_text(path, found, on_progress) as text:
        yield from _Scanner(path, name, found, text).rows()


class _Scanner:
    """Walks over JSON text that arrives in blocks: `buffer[at:]` is what has not been read yet."""

    def __init__(self, path: Path, name: str, found: Found, text: Text) -> None:
        self.path, self.name, self.found = path, name, found
        self.blocks = text.blocks()
        self.buffer, self.at, self.line, self.ended = "", 0, 1, False

    def rows(self) -> Iterator[Raw]:
        while self._skip() != "":
            if self._next() == "[":
                yield from self._elements()
            elif self._next() == "{" and self._enter_wrapper():
                yield from self._elements()
                self._leave_wrapper()
            elif self._next() == "{":
                yield self._element(f"{self.name}:{self.line}")
                self._skip()
                if self._next() == ",":
                    self._to(self.at + 1)
            else:
                raise self._broken(f"a row or a list of rows should stand here, not {self._next()!r}")

    def _elements(self) -> Iterator[Raw]:
        self._to(self.at + 1)
        index, last_line = 0, self.line if self.buffer[self.at : self.at + 1] not in ("\n", "\r") else 0
        if self._skip() == "]":
            self._to(self.at + 1)
            return
        while True:
            line = self.line
            yield self._element(f"{self.name}[{index}]" if line == last_line else f"{self.name}:{line}")
            index, last_line = index + 1, line
            mark = self._skip()
            if mark not in ("]", ","):
                raise self._broken("the list is not closed" if mark == "" else f"',' or ']' is missing before {mark!r}")
            self._to(self.at + 1)
            if mark == "]":
                return
            self._skip()

    def _element(self, origin: str) -> Raw:
        """The value at `at`. What does not parse is stepped over by its brackets and becomes a fault of its row."""
        while True:
            try:
                value, end = strict_json.DECODER.raw_decode(self.buffer, self.at)
            except (json.JSONDecodeError, RowFault, RecursionError):
                end = self._end(self.at)
                if end >= 0:
                    text = self._take(end)
                    return _row(origin, text, self.found)
            else:
                if end < len(self.buffer) or not self._more():
                    return self._checked(origin, value, end)
                continue
            if not self._more():
                raise self._broken("a row begins here and is never closed")

    def _checked(self, origin: str, value: Any, end: int) -> Raw:
        text = self._take(end)
        try:
            _readable(text, self.found)
            strict_json.check(value, text)
        except RowFault as fault:
            return Raw(origin, None, fault.detail, text)
        return Raw(origin, value)

    def _end(self, at: int) -> int:
        """Where the value at `at` ends by its brackets and quotes; -1 if that lies beyond the buffer."""
        first = self.buffer[at : at + 1]
        if first not in ("{", "["):
            stop = (STRING if first == '"' else SCALAR).match(self.buffer, at)
            return max(stop.end(), at + 1) if stop and stop.end() < len(self.buffer) else -1
        depth = 0
        for mark in MARKS.finditer(self.buffer, at):
            found = mark.group()
            if found == '"':
                return -1
            if found in ("{", "["):
                depth += 1
            elif found in ("}", "]"):
                depth -= 1
                if depth == 0:
                    return mark.end()
        return -1

    def _enter_wrapper(self) -> bool:
        """Steps to the list inside {"version": 1, "data": [...]}; False, and nothing moved, if this object is a row."""
        while (found := self._wrapped_list()) is None:
            if not self._more():
                return False
        self._to(found or self.at)
        return found > 0

    def _wrapped_list(self) -> int | None:
        """Where that list begins, 0 if there is none, None if the buffer ends before this can be told."""
        at = self.at + 1
        while key := KEY.match(self.buffer, at):
            opening = LIST_OF_ROWS.match(self.buffer, key.end())
            if key.end() == len(self.buffer) or (opening and opening.end() == len(self.buffer)):
                return None
            if opening and opening.group(1) and json.loads(key.group(1)) in WRAPPERS:
                return key.end()
            self._one_list(key, at)
            at = self._end(key.end())
            if at < 0:
                return None
        space = SPACE.match(self.buffer, at)
        return 0 if space and self.buffer[space.end() : space.end() + 1] == "}" else None

    def _leave_wrapper(self) -> None:
        """Over the keys that follow the list, to the end of the object around it."""
        while (mark := self._skip()) != "}":
            while (key := KEY.match(self.buffer, self.at)) is None and mark and self._more():
                pass
            if key is None:
                raise self._broken("the object around the list of rows is not closed")
            self._one_list(key, self.at)
            self._to(key.end())
            self._skip()
            self._element(self.name)
        self._to(self.at + 1)

    def _one_list(self, key: re.Match[str], at: int) -> None:
        """Refuses a split beside the rows that are read: its rows would be lost unseen."""
        if self.buffer[key.end() : key.end() + 1] == "[" and (name := json.loads(key.group(1))) in SPLITS:
            line = self.line + self.buffer.count("\n", self.at, max(at, self.at))
            mend = "put each list of rows into a file of its own"
            raise DataError(
                f"the file holds more than one list of rows: {name!r} too", where=f"{self.path}:{line}", mend=mend
            )

    def _skip(self) -> str:
        """Over white space; returns the character after it, "" at the end."""
        while True:
            space = SPACE.match(self.buffer, self.at)
            self._to(space.end() if space else self.at)
            if self.at < len(self.buffer) or not self._more():
                return self._next()

    def _next(self) -> str:
        return self.buffer[self.at : self.at + 1]

    def _take(self, end: int) -> str:
        text = self.buffer[self.at : end]
        self._to(end)
        return text

    def _to(self, at: int) -> None:
        self.line += self.buffer.count("\n", self.at, at)
        self.at = at

    def _more(self) -> bool:
        """Drops what was read and adds to the buffer, doubling it, so that a long row is not read again and again."""
        if self.ended or len(self.buffer) - self.at > LONGEST:
            return False
        pieces, wanted = [self.buffer[self.at :]], max(1, len(self.buffer) - self.at)
        while wanted > 0 and (block := next(self.blocks, "")):
            pieces.append(block)
            wanted -= len(block)
        self.ended = len(pieces) == 1
        self.buffer, self.at = "".join(pieces), 0
        return not self.ended

    def _broken(self, what: str) -> DataError:
        return DataError(f"broken JSON: {what}", where=f"{self.path}:{self.line}", mend="mend the file at that line")
