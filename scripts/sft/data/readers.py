"""Readers: the rows of a file (JSON lines, JSON, CSV, Parquet, compressed or not) or of a hub data set, one at a time.

`open_source` detects from its bytes what a file is, `Source.rows` streams it. A row that cannot be read comes with its
fault; a file that cannot be read is a DataError.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from sft.config.load import display_path
from sft.config.schema import DataSection, ReplaySection, SourceSection
from sft.data.rows import MAX_DEPTH, RowFault, is_encodable, parse_json
from sft.data.store import BROKEN, open_bytes
from sft.errors import DataError, nearest

Kind = Literal["jsonl", "json", "csv", "parquet"]
Progress = Callable[[int, int], None]  # bytes read, bytes in total
Section = DataSection | SourceSection | ReplaySection
# The one list of file names that hold rows: folders and the quick start go by it too.
SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
COMPRESSED = (".gz", ".zst")
KIND_NAMES = {"jsonl": "JSON lines", "json": "JSON", "csv": "a table in text (CSV)", "parquet": "Parquet"}
READABLE = "rows are read from JSON, JSONL, CSV, TSV and Parquet"
MAX_ROW = 64 << 20  # characters
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
HEAD = 1 << 18  # bytes from which the kind of a file is detected
BLOCK = 1 << 20  # bytes or characters read at a time
PARQUET_BATCH = 512  # rows in memory at a time


class RawRow(NamedTuple):
    """One row of a source. origin: "file:line" or "file[index]". value: the decoded row, None if it has a fault.

    text: of a row with a fault. copies: how often it is written if it is a training row, from its source's weight.
    """

    origin: str
    value: Any
    fault: str | None = None
    text: str | None = None
    copies: int = 1


LENIENT_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)  # finds where a value ends, whatever its faults
CONTROL = re.compile("[\0-\x08\x0e-\x1f\ufffe\uffff]")
BYTE_ORDER_MARKS = {"utf-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "utf-16": (b"\xff\xfe", b"\xfe\xff")}
BELOW_UTF8_LEAD = bytes(range(0xC0))  # bytes that begin no UTF-8 character beyond ASCII
UNUSED_IN_CP1252 = {0x81, 0x8D, 0x8F, 0x90, 0x9D, 0xFE, 0xFF}  # or hardly ever written
SURROGATE = re.compile("[\ud800-\udfff]")
SPACE = re.compile(r"[ \t\r\n]*")
LIST_START = re.compile(r"\[[ \t\r\n]*([^ \t\r\n])")
SPLITS = ("train", "val", "valid", "validation", "dev", "eval", "test")
WRAPPERS = ("data", "rows", "train", "examples", "instances", "items", "records", "samples")
OTHER_FILES: tuple[tuple[bytes, str, str], ...] = (  # first bytes, what the file is, what to do
    (b"\x89PNG", "a PNG picture", ""),
    (b"\xff\xd8\xff", "a JPEG picture", ""),
    (b"GIF8", "a GIF picture", ""),
    (b"%PDF", "a PDF document", "extract its text first"),
    (b"PK\x03\x04", "a zip archive (or an .xlsx or .docx)", "unpack it, or save the sheet as CSV"),
    (b"BZh", "compressed with bzip2", "unpack it first: bunzip2 FILE"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it first: unxz FILE"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"ARROW1", "an Arrow file", "save it as Parquet"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it: git lfs pull"),
    (b"\x80\x04", "a Python pickle", "pickles can run code and are not read: save the rows as JSON lines"),
)


@dataclass(frozen=True)
class FileType:
    """What a file holds. errors: how bytes that are no text are decoded; then `invalid_bytes` is set and each row is
    checked for them. warnings: for the user.
    """

    kind: Kind
    encoding: str = "utf-8"
    errors: str = "surrogateescape"
    invalid_bytes: bool = False
    delimiter: str = ","
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """One file or hub data set. name: begins the origins of its rows. path, type: None for a hub data set."""

    name: str
    path: Path | None
    type: FileType | None
    hub_config: str | None = None
    hub_split: str = "train"

    @property
    def kind(self) -> str:
        """For the user: "JSON lines"."""
        return f"hub data set, split {self.hub_split}" if self.type is None else KIND_NAMES[self.type.kind]

    def rows(self, on_progress: Progress | None = None) -> Iterator[RawRow]:
        """Every row, in order. Raises DataError where the source cannot be read to its end."""
        if self.type is None:
            return _hub(self)
        return {"jsonl": _json_lines, "json": _json, "csv": _csv, "parquet": _parquet}[self.type.kind](
            self, on_progress
        )


def open_source(path: Path, root: Path, text: str = "", section: Section | None = None) -> Source:
    """The file at `path`; if there is none, the hub data set `text`, of which `section` names config and split.

    Raises DataError: no such file, not rows, empty.
    """
    named_as_file = is_data_file(path) or path.suffix.lower() in (".txt", *COMPRESSED)
    if section is not None and not path.exists() and HUB_NAME.match(text) and not named_as_file:
        return Source(text, None, None, section.hub_config, section.hub_split)
    return Source(display_path(path, root), path, detect_file_type(path))


def plain_name(path: Path) -> Path:
    """`rows.jsonl.gz` -> `rows.jsonl`."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def kind_by_name(path: Path) -> Kind | None:
    """The kind that the name of `path` claims."""
    return SUFFIXES.get(plain_name(path).suffix.lower())


def is_data_file(path: Path) -> bool:
    """Whether `path` has the name of a file of rows, compressed or not, in capitals or not; hidden files do not."""
    plain = plain_name(path)
    return not path.name.startswith(".") and (kind_by_name(path) is not None or (plain != path and not plain.suffix))


def detect_file_type(path: Path) -> FileType:
    """The type of `path`, from its bytes. Raises DataError: missing, empty, or not rows (a picture, a web page)."""
    try:
        if path.is_dir():
            raise DataError("this is a folder, not a file", where=str(path), fix="name one file in it")
        with open_bytes(path) as (stream, _):
            head = stream.read(HEAD)
            for opening, what, fix in OTHER_FILES:
                if head.startswith(opening):
                    raise _not_rows(path, what, fix)
            if head.startswith(b"PAR1"):
                return FileType("parquet", warnings=_name_warning(path, "parquet"))
            encoding, errors, invalid_bytes, warnings = _encoding(path, head, stream)
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), fix=_similar_file(path)) from None
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None
        raise DataError(f"the compressed file is broken: {error}", where=str(path), fix="fetch it again") from None
    text = head.decode(encoding, "replace").lstrip("\ufeff")
    if not text.strip():
        raise DataError("the file is empty", where=str(path), fix="put rows into it, see docs/DATA.md")
    if len(CONTROL.findall(text)) * 50 > len(text):
        raise _not_rows(path, "binary, of an unknown kind", "")
    if re.match(r"\s*<(!doctype|html|\?xml|head|!--)", text, re.IGNORECASE):
        raise _not_rows(path, "a web page or XML (did a download or a login fail?)", "download it again")
    kind, delimiter = _kind(path, text)
    if kind != "json" and "\n" not in text and "\r" in text.strip():
        fix = f"convert it: tr '\\r' '\\n' < {path.name} > converted-{path.name}"
        raise DataError("its lines end in carriage returns alone, as on old Macs", where=str(path), fix=fix)
    return FileType(kind, encoding, errors, invalid_bytes, delimiter, (*warnings, *_name_warning(path, kind)))


def _similar_file(path: Path) -> str:
    if (raw := Path("data/raw") / path.name).is_file():
        return f"did you mean {raw}?"
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, names)
    return f"did you mean {path.parent / close}?" if close else "name a file that exists, see docs/DATA.md"


def _not_rows(path: Path, what: str, fix: str) -> DataError:
    claim = f"{path.suffix[1:].upper()} by its name, but " if path.suffix else ""
    return DataError(f"the file is {claim}{what}", where=str(path), fix="; ".join(filter(None, [fix, READABLE])))


def _name_warning(path: Path, kind: Kind) -> tuple[str, ...]:
    if kind_by_name(path) in (None, kind):
        return ()
    return (f"{path.name} is {KIND_NAMES[kind]} in spite of its name, and is read as that",)


def _encoding(path: Path, head: bytes, stream: BinaryIO) -> tuple[str, str, bool, tuple[str, ...]]:
    """Encoding, error handler, whether bytes are invalid, and warnings; `stream` continues where `head` ends.

    A file with more invalid UTF-8 bytes than UTF-8 characters is Windows text; else the rows that hold them are faulty.
    """
    for name, marks in BYTE_ORDER_MARKS.items():
        if head.startswith(marks):
            return name, "surrogatepass", True, (f"{path.name} is {name.upper()}, not UTF-8: read as that",)
    sample = head[:4096]
    zeros = (sample[0::2].count(0), sample[1::2].count(0))
    if max(zeros) > max(7, len(sample) // 50) and min(zeros) * 8 < max(zeros):  # all on one side, in Chinese too
        name = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
        return name, "surrogatepass", True, (f"{path.name} is {name.upper()} without a mark: read as that",)
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    block, leading, invalid = head, 0, b""
    while block:
        following = stream.read(BLOCK)
        if not block.isascii() or decoder.getstate()[0]:
            text = decoder.decode(block, not following)
            leading += len(block.translate(None, BELOW_UTF8_LEAD))
            if not is_encodable(text):
                invalid += "".join(SURROGATE.findall(text)).encode("utf-8", "surrogateescape")
        block = following
    if not invalid:
        return "utf-8", "surrogateescape", False, ()
    characters = leading - sum(byte >= 0xC0 for byte in invalid)
    if len(invalid) > characters and not set(invalid) & UNUSED_IN_CP1252:
        return "cp1252", "strict", False, (f"{path.name} is not UTF-8 but Windows text (cp1252): read as that",)
    return "utf-8", "surrogateescape", True, ()


def _kind(path: Path, text: str) -> tuple[Kind, str]:
    """Kind and delimiter, from the head of the file; the name counts only where the text leaves it open."""
    cut = len(text) >= HEAD // 4
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and cut:
        lines.pop()  # most likely incomplete
    first, rest, named = lines[0].strip(), lines[1:], kind_by_name(path)
    if first[0] in "[{":
        return ("jsonl" if _is_json_lines(lines, may_be_one_line=named == "jsonl" and not cut) else "json"), ","
    header = re.sub(r'"[^"]*"', "", lines[0])
    marks = [mark for mark in ",\t;|" if mark in header and (cut or not rest or any(mark in row for row in rest))]
    delimiter = max(marks, key=header.count, default="")
    objects = sum(line.lstrip().startswith("{") for line in lines[:50])
    if objects * 2 > min(len(lines), 50) or (named == "jsonl" and (objects or not delimiter)):
        return "jsonl", ","
    if delimiter or (named == "csv" and rest and re.fullmatch(r'"?\w+"?', first)):
        return "csv", delimiter or ","  # without a delimiter: a table of one column
    what = f"neither JSON nor a table: the file begins {first[:60]!r}"
    raise DataError(what, where=str(path), fix=f"{READABLE}: see docs/DATA.md")


def _is_json_lines(lines: list[str], *, may_be_one_line: bool) -> bool:
    """Whether text that begins with a bracket has a row on each line, and is not printed over many lines."""
    first, second = lines[0].strip(), lines[1].strip() if len(lines) > 1 else ""
    try:
        value = json.loads(first)
    except (ValueError, RecursionError) as error:
        # A broken first line among lines of objects, or one value that runs over many lines, or several on one.
        broken = second.startswith("{") and first.startswith("{") and first[-1] not in "{[,"
        return broken or (not second and may_be_one_line and not str(error).startswith("Extra data"))
    if not second:
        wrapped = (value[key] for key in WRAPPERS if key in value)
        return isinstance(value, dict) and not any(
            isinstance(rows, list) and (not rows or isinstance(rows[0], dict)) for rows in wrapped
        )
    if second == "{" and len(lines) > 2 and lines[2].lstrip().startswith('"'):
        return False  # objects printed over many lines
    return isinstance(value, dict) or second.startswith(("[", "{"))


def _pieces(
    source: Source, read: Callable[[io.TextIOWrapper], str], every: int, on_progress: Progress | None
) -> Iterator[str]:
    """What `read` returns of the source's text, to its end; the progress is reported every so many pieces.

    Raises DataError where the encoding or the compression breaks.
    """
    assert source.path is not None and source.type is not None
    encoding = "utf-8-sig" if source.type.encoding == "utf-8" else source.type.encoding
    with (
        open_bytes(source.path) as (stream, raw),
        io.TextIOWrapper(stream, encoding, source.type.errors, newline="\n") as text,
    ):
        total, count = os.fstat(raw.fileno()).st_size, 0
        try:
            while piece := read(text):
                count += 1
                if on_progress and count % every == 0:
                    on_progress(min(raw.tell(), total), total)
                yield piece
        except UnicodeDecodeError as error:
            what = f"the text breaks off: not {encoding} after {error.start:,} bytes of a block"
            raise DataError(what, where=str(source.path), fix="save it as UTF-8") from None
        except BROKEN as error:
            raise DataError(f"the file breaks off: {error}", where=str(source.path), fix="fetch it again") from None
        if on_progress:
            on_progress(total, total)


def _lines(source: Source, on_progress: Progress | None) -> Iterator[tuple[int, str]]:
    """Line number from 1 and the line with its end."""
    return enumerate(_pieces(source, io.TextIOWrapper.readline, 1_000, on_progress), 1)


def _json_lines(source: Source, on_progress: Progress | None) -> Iterator[RawRow]:
    """One row a line; blank lines are no rows."""
    for number, line in _lines(source, on_progress):
        if line.strip(" \t\r\n"):
            yield _json_row(source, f"{source.name}:{number}", line.strip("\n\r"))


def _json_row(source: Source, origin: str, text: str) -> RawRow:
    fault = f"longer than {MAX_ROW >> 20} million characters" if len(text) > MAX_ROW else _invalid_text(source, text)
    if fault is None:
        try:
            return RawRow(origin, parse_json(text))
        except RowFault as error:
            fault = error.detail
    return RawRow(origin, None, fault, text)


def _invalid_text(source: Source, text: str) -> str | None:
    """Where `text` holds a byte that is no text in the encoding of its file."""
    if source.type and source.type.invalid_bytes and (match := SURROGATE.search(text)):
        return f"not {source.type.encoding.upper()} at column {match.start() + 1}"
    return None


def _json(source: Source, on_progress: Progress | None) -> Iterator[RawRow]:
    """The rows of an array, of an object around an array, or of objects one after the other, a few blocks in memory.

    Origins are lines where each row begins on its own, else indexes. Raises DataError with the line where the text is
    no JSON: the next row could begin anywhere.
    """
    text = _JsonText(source, _pieces(source, lambda text: text.read(BLOCK), 1, on_progress))
    while start := text.peek():
        line = text.line()
        if start == "[" or (start == "{" and text.enter_wrapper()):
            index, last_line = 0, text.line()
            text.accept("[")
            while text.peek() != "]":
                line = text.line()
                yield _json_row(
                    source, f"{source.name}{f'[{index}]' if line == last_line else f':{line}'}", text.value()
                )
                index, last_line = index + 1, line
                if not text.accept(",") and text.peek() != "]":
                    raise text.broken("',' or ']' is missing")
            text.accept("]")
            if start == "{":
                text.leave_wrapper()
        elif start == "{":
            yield _json_row(source, f"{source.name}:{line}", text.value())
            text.accept(",")
        else:
            raise text.broken(f"expected a row or a list of rows, not {start!r}")


class _JsonText:
    """A cursor over JSON text that arrives in blocks: `buffer[at:]` is not read yet; `start`: lines counted so far."""

    def __init__(self, source: Source, blocks: Iterator[str]) -> None:
        self.source, self.blocks = source, blocks
        self.buffer, self.at, self.start, self._line = "", 0, 0, 1

    def line(self) -> int:
        """The line at the cursor. The text before it may be dropped from now on."""
        self._line += self.buffer.count("\n", self.start, self.at)
        self.start = self.at
        return self._line

    def peek(self) -> str:
        """The character after white space, "" at the end."""
        while True:
            space = SPACE.match(self.buffer, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self.buffer) or not self._more():
                return self.buffer[self.at : self.at + 1]

    def accept(self, character: str) -> bool:
        """Moves over `character` if it is next."""
        accepted = self.peek() == character
        self.at += accepted
        return accepted

    def value(self) -> str:
        """The text of the value at the cursor, moved over. Raises DataError where it is no JSON."""
        self.peek()
        while True:
            try:
                end = LENIENT_DECODER.raw_decode(self.buffer, self.at)[1]
                if end < len(self.buffer) or not self._more():
                    break
            except json.JSONDecodeError as error:
                if not self._more():
                    self.at = min(error.pos, len(self.buffer))
                    raise self.broken(error.msg) from None
            except RecursionError:
                raise self.broken(f"nested deeper than {MAX_DEPTH} levels") from None
        text, self.at = self.buffer[self.at : end], end
        return text

    def enter_wrapper(self) -> bool:
        """Moves to the list inside {"version": 1, "data": [...]}; False, and not moved, if this object is a row."""
        self.accept("{")
        while self.peek() == '"':
            if self._enter_list():
                return True
            self.accept(",")
        self.at = self.start
        return False

    def leave_wrapper(self) -> None:
        """Moves over the keys after the list, to the end of the object around it."""
        while self.accept(",") and self.peek() == '"':
            self._enter_list(wrappers=())
        if not self.accept("}"):
            raise self.broken("the object around the list of rows is not closed")

    def broken(self, problem: str) -> DataError:
        where = f"{self.source.path}:{self.line()}"
        return DataError(f"broken JSON: {problem}", where=where, fix="correct the file at that line")

    def _enter_list(self, wrappers: tuple[str, ...] = WRAPPERS) -> bool:
        """Moves over a key, then to its value if this is a list of rows under one of `wrappers`, else over it too."""
        key = json.loads(self.value())
        if not self.accept(":"):
            raise self.broken("':' is missing after a key")
        if self.peek() == "[":
            while (start := LIST_START.match(self.buffer, self.at)) is None and self._more():
                pass
            if key in wrappers and start and start.group(1) in "{]":
                return True
            if key in SPLITS:  # its rows would be lost without notice
                what = f"the file holds more than one list of rows: {key!r} too"
                where = f"{self.source.path}:{self.line()}"
                raise DataError(what, where=where, fix="put each list of rows into a file of its own")
        self.value()
        return False

    def _more(self) -> bool:
        """Drops what was read and doubles the rest of the buffer, so that a long row is decoded a few times only."""
        pieces = [self.buffer[self.start :]]
        missing = max(1, len(pieces[0]))
        while 0 < missing <= MAX_ROW and (block := next(self.blocks, "")):
            pieces.append(block)
            missing -= len(block)
        if len(pieces) > 1:
            self.buffer, self.at, self.start = "".join(pieces), self.at - self.start, 0
        return len(pieces) > 1


class _CsvLines:
    """Lines for csv.reader. After a faulty row all its lines but the first are read again: they may be rows."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self.lines, self.again = lines, deque[tuple[int, str]]()
        self.row: list[tuple[int, str]] = []  # number and text of each line of the current row
        self.characters = 0
        self.max_lines = 100_000  # of one row; less after each fault, since every open quote is searched that far

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.row.append(self.again.popleft() if self.again else next(self.lines))
        line = self.row[-1][1]
        self.characters += len(line)
        if len(self.row) > self.max_lines or self.characters > MAX_ROW:
            raise csv.Error("a quote is opened and never closed")
        if "\0" in line:
            raise csv.Error("a NUL byte")
        return line

    def start_row(self, *, again: bool = False) -> None:
        if again:
            self.again.extendleft(reversed(self.row[1:]))
            self.max_lines = max(1_000, self.max_lines - self.max_lines // 50)
        self.row, self.characters = [], 0


def _csv(source: Source, on_progress: Progress | None) -> Iterator[RawRow]:
    """One row a record, keyed by the header; a row with wrong quotes or a wrong number of cells is a fault."""
    assert source.type is not None
    csv.field_size_limit(sys.maxsize)
    lines, header = _CsvLines(_lines(source, on_progress)), list[str]()
    reader = csv.reader(lines, delimiter=source.type.delimiter, strict=True)
    while True:
        cells, fault = [], None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = str(error)
            reader = csv.reader(lines, delimiter=source.type.delimiter, strict=True)
        if not header and (cells or fault):
            header = _csv_header(source, cells, fault)
        elif cells or fault:
            if not fault and len(cells) != len(header):
                fault = f"{len(cells)} cells where the header has {len(header)}"
            number, text = lines.row[0]
            if fault:
                fault, text = f"bad CSV: {fault}", text.strip("\r\n")
                yield RawRow(f"{source.name}:{number}", None, fault, text)
            elif invalid := _invalid_text(source, text := "".join(line for _, line in lines.row)):
                yield RawRow(f"{source.name}:{number}", None, invalid, text)
            else:
                yield RawRow(f"{source.name}:{number}", dict(zip(header, cells, strict=True)))
        lines.start_row(again=bool(fault))


def _csv_header(source: Source, cells: list[str], fault: str | None) -> list[str]:
    names = [cell.strip() or f"column {index}" for index, cell in enumerate(cells, 1)]
    repeated = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if fault or repeated:
        what = f"the header cannot be read: {fault or f'two columns are called {repeated!r}'}"
        raise DataError(what, where=f"{source.path}:1", fix="the first line must name the columns, each once")
    return names


def _parquet(source: Source, on_progress: Progress | None) -> Iterator[RawRow]:
    """One row a record, in order. Raises DataError for a file that is not Parquet inside."""
    import pyarrow
    from pyarrow import parquet

    index = 0
    try:
        with parquet.ParquetFile(source.path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                for value in batch.to_pylist():
                    yield RawRow(f"{source.name}[{index}]", value)
                    index += 1
                if on_progress and source.path:
                    size = source.path.stat().st_size
                    on_progress(size * index // max(1, file.metadata.num_rows), size)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"the Parquet file is broken: {_first_line(error)}"
        raise DataError(what, where=str(source.path), fix="fetch it again") from None


def _hub(source: Source) -> Iterator[RawRow]:
    """The rows of a data set of the Hugging Face hub, from its cache if possible. Any failure is a DataError."""
    import datasets
    import huggingface_hub

    name, config, split = source.name, source.hub_config, source.hub_split
    where = f"hub data set {name}" + (f", config {config}" if config else "") + f", split {split}"
    try:
        datasets.disable_progress_bars()
        data_set = datasets.load_dataset(name, config, split=split)
    except huggingface_hub.errors.GatedRepoError:
        fix = f"request access on https://huggingface.co/datasets/{name}, then: hf auth login"
        raise DataError("the data set is gated", where=where, fix=fix) from None
    except Exception as error:  # the library raises a dozen kinds for a wrong name, config, split or file
        fix = (
            "check the name (no file has it here either), or name config and split: --set data.hub_config=... --set"
            " data.hub_split=train; without a network, or with HF_HUB_OFFLINE, give a file with --raw_path"
        )
        raise DataError(f"the data set cannot be loaded: {_first_line(error)}", where=where, fix=fix) from None
    for index, value in enumerate(data_set):
        yield RawRow(f"{name}[{index}]", value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
