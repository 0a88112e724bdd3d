"""What every reader yields: one row as it stands in the file, or why it cannot be read."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import math
import os
import re
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import orjson

from sft.config.load import display_path
from sft.config.schema import DataSection, ReplaySection, SourceSection
from sft.data.ledger import UNREADABLE, RowFault
from sft.errors import DataError


class Raw(NamedTuple):
    """origin: "file:line" or "file[index]". value: the row, None where it cannot be read: fault and text say why.

    copies: how often a training row stands in the mix, from its source's weight.
    """

    origin: str
    value: Any
    fault: str | None = None
    text: str | None = None
    copies: int = 1


MOST_DIGITS = 4_300  # what Python itself turns into an int, in every version
MOST_LEVELS = 128  # orjson writes 254; a row that needs 128 is not a row


def parse(text: str) -> Any:
    """The one JSON value in `text`. Raises RowFault with what is wrong and at which column."""
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RowFault(UNREADABLE, f"broken JSON: {error.msg} at column {error.pos + 1}") from None
    except RecursionError:
        raise _too_deep() from None
    check(value, text)
    return value


def check(value: Any, text: str) -> None:
    """Faults that parsing lets through; `text` is what `value` was read from, looked at first because it is cheap."""
    if "\\ud" in text or "\\uD" in text or "\\UD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            said = "half a surrogate pair (\\ud800-\\udfff): the text was cut inside a character"
            raise RowFault(UNREADABLE, said) from None
        except RecursionError:
            raise _too_deep() from None
    if text.count("{") + text.count("[") > MOST_LEVELS and _levels(value) > MOST_LEVELS:
        raise _too_deep()


def dumps(value: Any) -> bytes:
    """`value` as one line of UTF-8 JSON, keys in the order given."""
    try:
        return orjson.dumps(value)
    except TypeError:  # an integer over 64 bits: Python's own writer knows them all
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def sorted_dumps(value: Any) -> bytes:
    """The same with keys sorted, for hashing: equal values give equal bytes."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode("utf-8")


def _levels(value: Any) -> int:
    """How deep lists and objects nest, counted without recursion."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        item, level = waiting.pop()
        deepest = max(deepest, level)
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        waiting.extend((child, level + 1) for child in inner if isinstance(child, (dict, list)))
    return deepest


def _too_deep() -> RowFault:
    return RowFault(UNREADABLE, f"nested deeper than {MOST_LEVELS} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise RowFault(UNREADABLE, f"the key {twice[:80]!r} is given twice")
    return made


def _constant(name: str) -> Any:
    raise RowFault(UNREADABLE, f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise RowFault(UNREADABLE, f"an integer of {len(digits):,} digits")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RowFault(UNREADABLE, f"the number {text[:40]} is too large")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_number)


COMPRESSED = (".gz", ".zst")
BROKEN = (OSError, EOFError, zlib.error)  # what reading a compressed file that is cut or damaged raises
Kind = Literal["jsonl", "json", "csv", "parquet"]
HEAD = 1 << 18
CONTROL = re.compile("[\0-\x08\x0e-\x1f\ufffe\uffff]")  # what text does not hold
BLOCK = 1 << 20
ASCII_AND_TAILS = bytes(range(0xC0))  # what UTF-8 characters beyond ASCII do not begin with
WRAPPERS = ("data", "rows", "train", "examples", "instances", "items", "records", "samples")
SUFFIXES: dict[str, Kind] = {  # the one list of file names that hold rows: also of folders and the quick start
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
SAID = {"jsonl": "JSON lines", "json": "JSON", "csv": "a table in text (CSV)", "parquet": "Parquet"}
# Openings of files that people take for data: what they are, and what to do.
OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x89PNG", "a PNG picture", ""),
    (b"\xff\xd8\xff", "a JPEG picture", ""),
    (b"GIF8", "a GIF picture", ""),
    (b"%PDF", "a PDF document", "take the text out of it first"),
    (b"PK\x03\x04", "a zip archive (or an .xlsx or .docx)", "unpack it, or save the sheet as CSV"),
    (b"BZh", "compressed with bzip2", "unpack it first: bunzip2 FILE"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it first: unxz FILE"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"ARROW1", "an Arrow file", "save it as Parquet"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it: git lfs pull"),
    (b"\x80\x04", "a Python pickle", "pickles can run code and are not read: save the rows as JSON lines"),
)


@dataclass(frozen=True)
class Found:
    """kind and encoding of a file, and what a person should be told about it."""

    kind: Kind
    encoding: str = "utf-8"
    errors: str = "surrogateescape"
    suspect: bool = False  # some bytes are not text in this encoding: rows must be looked at
    delimiter: str = ","
    said: list[str] = field(default_factory=list)


def open_bytes(path: Path) -> tuple[BinaryIO, BinaryIO]:
    """The content of `path`, unpacked where it is packed, and the file under it, whose `tell` shows the progress."""
    raw = path.open("rb")
    head = raw.read(4)
    raw.seek(0)
    if head[:2] == b"\x1f\x8b":
        return io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=raw))), raw
    if head == b"\x28\xb5\x2f\xfd":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")), raw
    return raw, raw


def plain_name(path: Path) -> Path:
    """`rows.jsonl.gz` -> `rows.jsonl`."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def is_data_file(path: Path) -> bool:
    """Whether `path` has the name of a file of rows, compressed or not, in capitals or not; hidden files do not."""
    plain = plain_name(path)
    return not path.name.startswith(".") and (kind_by_name(path) is not None or (plain != path and not plain.suffix))


def kind_by_name(path: Path) -> Kind | None:
    """What the name says that `path` holds."""
    return SUFFIXES.get(plain_name(path).suffix.lower())


def sniff(path: Path) -> Found:
    """What `path` is. Raises DataError for what cannot be read: missing, empty, a picture, a web page, a database."""
    try:
        if path.is_dir():
            raise DataError("this is a folder, not a file", where=str(path), fix="name one file in it")
        stream, raw = open_bytes(path)
        with raw, stream:
            head = stream.read(HEAD)
            return _sniff(path, head, stream)
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), fix=_meant(path)) from None
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None
        raise DataError(f"the compressed file is broken: {error}", where=str(path), fix="fetch it again") from None


def _meant(path: Path) -> str:
    """Where the file may be: in data/raw, which people leave out, or under a name like it."""
    if (raw := Path("data/raw") / path.name).is_file():
        return f"did you mean {raw}?"
    beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, 1)
    return f"did you mean {path.parent / near[0]}?" if near else "name a file that is there, see docs/DATA.md"


def _sniff(path: Path, head: bytes, stream: BinaryIO) -> Found:
    if not head:
        raise _empty(path)
    if head[:4] == b"PAR1":
        return Found("parquet", said=_misnamed(path, "parquet"))
    for opening, what, fix in OTHERS:
        if head.startswith(opening):
            raise _refused(path, what, fix)
    encoding, errors, suspect, said = _encoding(path, head, stream)
    text = head.decode(encoding, "replace").lstrip("\ufeff")
    if not text.strip():
        raise _empty(path)
    if len(CONTROL.findall(text)) * 50 > len(text):
        raise _refused(path, "binary, of a kind that is not known here", "")
    if re.match(r"\s*<(!doctype|html|\?xml|head|!--)", text, re.IGNORECASE):
        raise _refused(path, "a web page or XML (did a download or a login go wrong?)", "download it again")
    kind, delimiter = _kind(path, text)
    if kind != "json" and "\n" not in text and "\r" in text.strip():
        fix = f"convert it: tr '\\r' '\\n' < {path.name} > converted-{path.name}"
        raise DataError("its lines end in carriage returns alone, as on old Macs", where=str(path), fix=fix)
    return Found(kind, encoding, errors, suspect, delimiter, said + _misnamed(path, kind))


def _empty(path: Path) -> DataError:
    return DataError("the file is empty", where=str(path), fix="put rows into it, see docs/DATA.md")


def _refused(path: Path, what: str, fix: str) -> DataError:
    named = f"{path.suffix[1:].upper()} by its name, but " if path.suffix else ""
    readable = "rows are read from JSON, JSONL, CSV, TSV and Parquet"
    return DataError(f"the file is {named}{what}", where=str(path), fix="; ".join(filter(None, [fix, readable])))


def _misnamed(path: Path, kind: Kind) -> list[str]:
    if kind_by_name(path) not in (None, kind):
        return [f"{path.name} is {SAID[kind]} in spite of its name, and is read as that"]
    return []


def _encoding(path: Path, head: bytes, stream: BinaryIO) -> tuple[str, str, bool, list[str]]:
    marks = {"utf-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "utf-16": (b"\xff\xfe", b"\xfe\xff")}
    for name, openings in marks.items():
        if head.startswith(openings):
            return name, "surrogatepass", True, [f"{path.name} is {name.upper()}, not UTF-8: read as that"]
    sample = head[:4096]
    zeros = (sample[0::2].count(0), sample[1::2].count(0))
    if max(zeros) > max(7, len(sample) // 50) and min(zeros) * 8 < max(zeros):  # few in Chinese, but all on one side
        name = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
        return name, "surrogatepass", True, [f"{path.name} is {name.upper()} without a mark: read as that"]
    characters, strange, high = _utf8(head, stream)
    if not strange:
        return "utf-8", "surrogateescape", False, []
    if strange > characters and not high & {0x81, 0x8D, 0x8F, 0x90, 0x9D, 0xFE, 0xFF}:
        return "cp1252", "strict", False, [f"{path.name} is not UTF-8 but Windows text (cp1252): read as that"]
    return "utf-8", "surrogateescape", True, []


def _utf8(head: bytes, stream: BinaryIO) -> tuple[int, int, set[int]]:
    """Over the whole file: how many characters beyond ASCII are UTF-8, how many bytes are not, and which bytes."""
    characters, strange, high = 0, 0, set[int]()
    block, rest = head, b""
    while block:
        data, rest = rest + block, b""
        if not data.isascii():
            whole = len(data) - _cut(data)
            data, rest = data[:whole], data[whole:]
            bad = _not_utf8(data)
            strange, high = strange + len(bad), high | set(bad)
            characters += len(data.translate(None, ASCII_AND_TAILS)) - sum(byte >= 0xC0 for byte in bad)
        block = stream.read(BLOCK)
    return characters, strange + len(rest), high | set(rest)


def _not_utf8(data: bytes) -> bytes:
    """The bytes of `data` that are no UTF-8, in order."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "surrogateescape")
        return "".join(re.findall("[\udc80-\udcff]", text)).encode("utf-8", "surrogateescape")
    return b""


def _cut(data: bytes) -> int:
    """How many bytes at the end begin a character that the next block finishes."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            return back if back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) else 0
        if byte < 0x80:
            return 0
    return 0


def _kind(path: Path, text: str) -> tuple[Kind, str]:
    """JSON, JSON lines or a table; the name is asked only where the bytes leave it open."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and len(text) >= HEAD // 4:
        lines.pop()  # most likely cut in the middle
    first = lines[0].strip()
    objects = sum(line.lstrip().startswith("{") for line in lines[:50])
    if first[0] in "[{":
        return _json_kind(path, first, lines), ","
    delimiter = _delimiter(lines, cut=len(text) >= HEAD // 4)
    if objects * 2 > min(len(lines), 50) or (kind_by_name(path) == "jsonl" and (objects or not delimiter)):
        return "jsonl", ","
    named_csv = kind_by_name(path) == "csv"
    if delimiter is None and named_csv and len(lines) > 1 and re.fullmatch(r'"?\w+"?', first):
        return "csv", ","  # a table of one column
    if delimiter is None:
        fix = "rows are read from JSON, JSONL, CSV, TSV and Parquet: see docs/DATA.md"
        raise DataError(f"neither JSON nor a table: the file begins {first[:60]!r}", where=str(path), fix=fix)
    return "csv", delimiter


def _json_kind(path: Path, first: str, lines: list[str]) -> Kind:
    second = lines[1].strip() if len(lines) > 1 else ""
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        # A broken first line among lines of objects, or one value that runs over many lines.
        broken = second.startswith("{") and first.startswith("{") and first[-1] not in "{[,"
        alone = not second and len(first) < HEAD // 4 and kind_by_name(path) == "jsonl"
        return "jsonl" if broken or alone else "json"
    if second == "{" and len(lines) > 2 and lines[2].lstrip().startswith('"'):
        return "json"  # printed over many lines, one object after the other
    if isinstance(value, dict):
        return "jsonl" if second or not any(is_wrapper(key, item) for key, item in value.items()) else "json"
    return "jsonl" if second and second[0] in "[{" else "json"


def is_wrapper(key: str, value: object) -> bool:
    """Whether `{key: value}` is not a row but holds the list of rows, as in {"data": [{...}, ...]}."""
    return key in WRAPPERS and isinstance(value, list) and (not value or isinstance(value[0], dict))


def _delimiter(lines: list[str], *, cut: bool) -> str | None:
    """What parts the cells of the header, and of a line after it, unless one cell may fill all that was looked at."""
    best, most = None, 0
    for delimiter in (",", "\t", ";", "|"):
        count = re.sub(r'"[^"]*"', "", lines[0]).count(delimiter)
        if count > most and (cut or len(lines) == 1 or any(delimiter in line for line in lines[1:])):
            best, most = delimiter, count
    return best


Progress = Callable[[int, int], None]  # bytes done, bytes in all
LONGEST = 64 << 20  # characters of one row
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
            raise DataError(what, where=str(path), fix="save it as UTF-8") from None
        except BROKEN as error:
            what = f"the file breaks off: {error}"
            raise DataError(what, where=str(path), fix="fetch it again") from None


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
        fix = "the first line must name the columns, each once"
        raise DataError(f"the header cannot be read: {why}", where=f"{path}:1", fix=fix)
    return names


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
                yield _json_row(f"{name}:{number}", line.strip("\n\r"), found)


def _json_row(origin: str, text: str, found: Found) -> Raw:
    if len(text) > LONGEST:
        return Raw(origin, None, f"longer than {LONGEST >> 20} million characters", text)
    try:
        _readable(text, found)
        return Raw(origin, parse(text))
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
                value, end = DECODER.raw_decode(self.buffer, self.at)
            except (json.JSONDecodeError, RowFault, RecursionError):
                end = self._end(self.at)
                if end >= 0:
                    text = self._take(end)
                    return _json_row(origin, text, self.found)
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
            check(value, text)
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
            fix = "put each list of rows into a file of its own"
            raise DataError(
                f"the file holds more than one list of rows: {name!r} too", where=f"{self.path}:{line}", fix=fix
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
        return DataError(f"broken JSON: {what}", where=f"{self.path}:{self.line}", fix="fix the file at that line")


BATCH = 512  # rows in memory at a time


def read_parquet(path: Path, name: str, on_progress: Progress | None) -> Iterator[Raw]:
    """One row a record, in order; a file that is not Parquet inside is a DataError."""
    import pyarrow
    from pyarrow import parquet

    size, done = path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path) as file:
            rows = max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=BATCH):
                for value in batch.to_pylist():
                    yield Raw(f"{name}[{done}]", value)
                    done += 1
                if on_progress:
                    on_progress(size * done // rows, size)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"the Parquet file is broken: {said}", where=str(path), fix="fetch it again") from None


def read_hub(name: str, config: str | None, split: str) -> Iterator[Raw]:
    """The rows of a hub data set, from the cache where it is there. Anything that goes wrong is a DataError."""
    for index, value in enumerate(_load(name, config, split)):
        yield Raw(f"{name}[{index}]", value)


def _load(name: str, config: str | None, split: str) -> Any:
    import datasets
    import huggingface_hub

    where = f"hub data set {name}" + (f", config {config}" if config else "") + f", split {split}"
    offline = "there is no network, or HF_HUB_OFFLINE is set: fetch it once online, or give a file with --raw_path"
    try:
        datasets.disable_progress_bars()
        return datasets.load_dataset(name, config, split=split)
    except huggingface_hub.errors.GatedRepoError:
        fix = f"ask for access on https://huggingface.co/datasets/{name}, then: hf auth login"
        raise DataError("the data set is gated", where=where, fix=fix) from None
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
        fix = f"look at the name (no file of that name is here either); {offline}"
        raise DataError(f"the data set cannot be had: {_first_line(error)}", where=where, fix=fix) from None
    except Exception as error:  # the library raises a dozen kinds for a wrong config, split or file
        fix = "name config and split: --set data.hub_config=... --set data.hub_split=train"
        raise DataError(f"the data set cannot be read: {_first_line(error)}", where=where, fix=fix) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


Section = DataSection | SourceSection | ReplaySection
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True)
class Source:
    """One source of rows. name: how its rows' origins begin. found: None for a hub data set."""

    name: str
    path: Path | None
    found: Found | None
    hub_config: str | None = None
    hub_split: str = "train"

    @property
    def kind(self) -> str:
        return f"hub data set, split {self.hub_split}" if self.found is None else SAID[self.found.kind]

    def rows(self, on_progress: Progress | None = None) -> Iterator[Raw]:
        """Every row of the source, in its order."""
        if self.path is None or self.found is None:
            return read_hub(self.name, self.hub_config, self.hub_split)
        if self.found.kind == "parquet":
            return read_parquet(self.path, self.name, on_progress)
        read = {"jsonl": read_lines, "json": read_array, "csv": read_csv}[self.found.kind]
        return read(self.path, self.name, self.found, on_progress)


def named(text: str, path: Path, root: Path, section: Section) -> Source:
    """The source at `path`, else the hub data set called `text`, if it can be a name of one.

    section: says which part of a data set. Raises DataError: nothing there, not a data file, empty.
    """
    a_file = is_data_file(path) or path.suffix.lower() in (".txt", *COMPRESSED)
    if not path.exists() and HUB_NAME.match(text) and not a_file:
        return Source(text, None, None, section.hub_config, section.hub_split)
    return local(path, root)


def local(path: Path, root: Path) -> Source:
    """The source in this file. Raises DataError as `sniff` does."""
    return Source(display_path(path, root), path, sniff(path))
