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
from typing import Any, Literal, NamedTuple

from sft.config.load import display_path
from sft.config.schema import DataSection, ReplaySection, SourceSection
from sft.data.rows import MAX_DEPTH, RowFault, parse_json
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
READABLE = "rows are read from JSON, JSONL, CSV, TSV and Parquet: see docs/DATA.md"
OTHER_FILES = {  # first bytes -> what the file is
    b"\x89PNG": "a PNG picture",
    b"%PDF": "a PDF document: extract its text first",
    b"PK\x03\x04": "a zip archive (or an .xlsx or .docx): unpack it, or save the sheet as CSV",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: git lfs pull",
    b"\x80\x04": "a Python pickle, which can run code: save the rows as JSON lines",
}
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
CONTROL = re.compile("[\0-\x08\x0e-\x1f\ufffe\uffff]")
INVALID = re.compile("[\ud800-\udfff]")  # bytes that are invalid in the encoding are decoded to these
BYTE_ORDER_MARKS = {"utf-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "utf-16": (b"\xff\xfe", b"\xfe\xff")}
UNUSED_IN_CP1252 = set("\udc81\udc8d\udc8f\udc90\udc9d\udcfe\udcff")  # or hardly ever written
WRAPPERS = ("data", "rows", "train", "examples", "instances", "items", "records", "samples")
SPLITS = ("train", "val", "valid", "validation", "dev", "eval", "test")
LENIENT_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)  # finds where a value ends, whatever its faults
HEAD = 1 << 18  # bytes from which kind and encoding are detected
BLOCK = 1 << 20  # characters of JSON read at a time
PARQUET_BATCH = 512  # rows in memory at a time
MAX_CSV_LINES = 10_000  # of one row


class RawRow(NamedTuple):
    """One row of a source. origin: "file:line" or "file[index]". value: the decoded row, None if it has a fault.

    text: of a row with a fault. copies: how often it is written if it is a training row, from its source's weight.
    """

    origin: str
    value: Any
    fault: str | None = None
    text: str | None = None
    copies: int = 1


@dataclass(frozen=True)
class Source:
    """One file or hub data set. name: begins the origins of its rows. path: None for a hub data set."""

    name: str
    path: Path | None = None
    format: Kind | None = None
    encoding: str = "utf-8"
    delimiter: str = ","
    warnings: tuple[str, ...] = ()
    hub_config: str | None = None
    hub_split: str = "train"

    @property
    def kind(self) -> str:
        """For the user: "JSON lines"."""
        return KIND_NAMES[self.format] if self.format else f"hub data set, split {self.hub_split}"

    def rows(self, on_progress: Progress | None = None) -> Iterator[RawRow]:
        """Every row, in order. Raises DataError if the source cannot be read to its end."""
        if self.format is None:
            return _hub(self)
        return {"jsonl": _json_lines, "json": _json, "csv": _csv, "parquet": _parquet}[self.format](self, on_progress)


def plain_name(path: Path) -> Path:
    """`rows.jsonl.gz` -> `rows.jsonl`."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def is_data_file(path: Path) -> bool:
    """Whether `path` has the name of a file of rows, compressed or not, in capitals or not; hidden files do not."""
    plain = plain_name(path)
    return not path.name.startswith(".") and (plain.suffix.lower() in SUFFIXES or (plain != path and not plain.suffix))


def open_source(path: Path, root: Path, text: str = "", section: Section | None = None) -> Source:
    """The file at `path`; if there is none, the hub data set `text`, of which `section` names config and split.

    Raises DataError: no such file, empty, or not rows (a picture, a web page).
    """
    named_as_file = is_data_file(path) or path.suffix.lower() in (".txt", *COMPRESSED)
    if section is not None and not path.exists() and HUB_NAME.match(text) and not named_as_file:
        return Source(text, hub_config=section.hub_config, hub_split=section.hub_split)
    try:
        with open_bytes(path) as (stream, _):
            head = stream.read(HEAD)
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), fix=_similar_file(path)) from None
    except BROKEN as error:
        raise DataError(f"the file cannot be read: {error}", where=str(path), fix="fetch it again") from None
    encoding = _encoding(head)
    content = head.decode(encoding, "replace").lstrip("\ufeff")
    if not content.strip():
        raise DataError("the file is empty", where=str(path), fix="put rows into it, see docs/DATA.md")
    other = next((what for opening, what in OTHER_FILES.items() if head.startswith(opening)), None)
    if re.match(r"\s*<(!doctype|html|\?xml|head|!--)", content, re.IGNORECASE):
        other = "a web page or XML (did a download or a login fail?)"
    if head.startswith(b"PAR1"):
        return Source(display_path(path, root), path, "parquet")
    if other or len(CONTROL.findall(content)) * 50 > len(content):
        claim = f"{path.suffix[1:].upper()} by its name, but " if path.suffix else ""
        raise DataError(f"the file is {claim}{other or 'binary'}", where=str(path), fix=READABLE)
    named = SUFFIXES.get(plain_name(path).suffix.lower())
    kind, delimiter = _kind(path, content, named, cut=len(head) == HEAD)
    warnings = []
    if encoding != "utf-8":
        warnings.append(f"{path.name} is not UTF-8: it is read as {encoding.upper()}")
    if named not in (None, kind):
        warnings.append(f"{path.name} is {KIND_NAMES[kind]} despite its name, and is read as such")
    return Source(display_path(path, root), path, kind, encoding, delimiter, tuple(warnings))


def _similar_file(path: Path) -> str:
    if (raw := Path("data/raw") / path.name).is_file():
        return f"did you mean {raw}?"
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, names)
    return f"did you mean {path.parent / close}?" if close else "name a file that exists, see docs/DATA.md"


def _encoding(head: bytes) -> str:
    """By the byte order mark; with more invalid UTF-8 bytes than UTF-8 characters it is Windows text."""
    for name, marks in BYTE_ORDER_MARKS.items():
        if head.startswith(marks):
            return name
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head)
    invalid = INVALID.findall(text)
    characters = len(re.findall(r"[^\0-\x7f]", text)) - len(invalid)
    return "cp1252" if len(invalid) > characters and not UNUSED_IN_CP1252.intersection(invalid) else "utf-8"


def _kind(path: Path, head: str, named: Kind | None, *, cut: bool) -> tuple[Kind, str]:
    """Kind and delimiter, from the head of the file; the name counts only where the text leaves it open."""
    lines = [line.strip() for line in head.split("\n") if line.strip()]
    if len(lines) > 1 and cut:
        lines.pop()  # most likely incomplete
    first, some = lines[0], lines[:50]
    values = [value for value in map(_object_or_list, some) if value is not None]
    lists = _lists_of_rows(values[0]) if values and isinstance(values[0], dict) else values
    if len(values) * 2 > len(some) and not (len(lines) == 1 and lists):  # one value may hold all rows
        return "jsonl", ","
    if first[0] in "[{":
        return ("jsonl" if named == "jsonl" and len(lines) == 1 and not values and not cut else "json"), ","
    header = re.sub(r'"[^"]*"', "", first)
    marks = [
        mark for mark in ",\t;|" if mark in header and (cut or lines[1:] == [] or any(mark in row for row in lines[1:]))
    ]
    delimiter = max(marks, key=header.count, default="")
    if named == "jsonl" and (values or not delimiter):
        return "jsonl", ","
    if delimiter or (named == "csv" and lines[1:] and re.fullmatch(r'"?\w+"?', first)):
        return "csv", delimiter or ","  # without a delimiter: a table of one column
    raise DataError(f"neither JSON nor a table: the file begins {first[:60]!r}", where=str(path), fix=READABLE)


def _object_or_list(line: str) -> Any:
    """The JSON object or list that a line is; None if it is none."""
    try:
        return json.loads(line) if line[0] in "[{" else None
    except (ValueError, RecursionError):
        return None


def _lists_of_rows(value: dict[str, Any]) -> list[str]:
    """The keys of an object around lists of rows, as in {"data": [{...}]}; [] for a row."""
    lists = [key for key in value if key in (*WRAPPERS, *SPLITS) and isinstance(value[key], list)]
    lists = [key for key in lists if not value[key] or isinstance(value[key][0], dict)]
    return lists if any(key in WRAPPERS for key in lists) else []


def _pieces(
    source: Source, read: Callable[[io.TextIOWrapper], str], every: int, on_progress: Progress | None
) -> Iterator[str]:
    """What `read` returns of the source's text, to its end; the progress is reported every so many pieces.

    Raises DataError if the encoding or the compression breaks.
    """
    path, encoding = source.path or Path(), "utf-8-sig" if source.encoding == "utf-8" else source.encoding
    with open_bytes(path) as (stream, raw), io.TextIOWrapper(stream, encoding, "surrogateescape", newline="\n") as text:
        total, count = os.fstat(raw.fileno()).st_size, 0
        try:
            while piece := read(text):
                count += 1
                if on_progress and count % every == 0:
                    on_progress(min(raw.tell(), total), total)
                yield piece
        except (UnicodeDecodeError, *BROKEN) as error:
            raise DataError(
                f"the file is truncated: {error}", where=str(path), fix="save or download it again"
            ) from None


def _lines(source: Source, on_progress: Progress | None) -> Iterator[tuple[int, str]]:
    """Line number from 1 and the line with its end."""
    return enumerate(_pieces(source, io.TextIOWrapper.readline, 1_000, on_progress), 1)


def _json_lines(source: Source, on_progress: Progress | None) -> Iterator[RawRow]:
    """One row a line; blank lines are skipped."""
    for number, line in _lines(source, on_progress):
        if line.strip(" \t\r\n"):
            yield _json_row(source, f"{source.name}:{number}", line.strip("\n\r"))


def _json_row(source: Source, origin: str, text: str) -> RawRow:
    if fault := _invalid_text(source, text):
        return RawRow(origin, None, fault, text)
    try:
        return RawRow(origin, parse_json(text))
    except RowFault as error:
        return RawRow(origin, None, error.detail, text)


def _invalid_text(source: Source, text: str) -> str | None:
    """Where `text` has a byte that is invalid in the encoding of its file."""
    invalid = None if text.isascii() else INVALID.search(text)
    return f"not {source.encoding.upper()} at column {invalid.start() + 1}" if invalid else None


def _json(source: Source, on_progress: Progress | None) -> Iterator[RawRow]:
    """The rows of an array, of an object around an array, or of objects one after the other.

    Origins are lines where each row begins on its own, else indexes. The text is in memory as a whole, but not its
    rows. Raises DataError with the line if the text is not JSON: the next row could begin anywhere.
    """
    text = _JsonText(source, "".join(_pieces(source, lambda file: file.read(BLOCK), 1, on_progress)))
    while start := text.peek():
        index, last_line = 0, text.line()
        if start == "{":
            row = _json_row(source, f"{source.name}:{last_line}", text.value())
            lists = _lists_of_rows(row.value) if row.fault is None else []
            if len(lists) > 1:
                what = f"the file holds more than one list of rows: {', '.join(lists)}"
                raise DataError(what, where=f"{source.path}:{last_line}", fix="put each into its own file")
            values = row.value[lists[0]] if lists else []
            yield from (RawRow(f"{source.name}[{index}]", value) for index, value in enumerate(values))
            if not lists:
                yield row
            text.accept(",")
            continue
        if not text.accept("["):
            raise text.broken(f"expected a row or a list of rows, not {start!r}")
        while text.peek() != "]":
            line = text.line()
            place = f"[{index}]" if line == last_line else f":{line}"
            yield _json_row(source, source.name + place, text.value())
            index, last_line = index + 1, line
            if not text.accept(",") and text.peek() != "]":
                raise text.broken("',' or ']' is missing")
        text.accept("]")


class _JsonText:
    """A cursor over JSON text."""

    def __init__(self, source: Source, text: str) -> None:
        self.source, self.text, self.at = source, text, 0
        self._line, self._counted = 1, 0  # the line at a position up to which line ends are counted

    def line(self) -> int:
        """The line at the cursor."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def peek(self) -> str:
        """The character after white space, "" at the end."""
        while self.text[self.at : self.at + 1] in (" ", "\n", "\t", "\r"):
            self.at += 1
        return self.text[self.at : self.at + 1]

    def accept(self, character: str) -> bool:
        """Moves over `character` if it is next."""
        accepted = self.peek() == character
        self.at += accepted
        return accepted

    def value(self) -> str:
        """The text of the value at the cursor, moved over. Raises DataError if it is not JSON."""
        start = self.at
        try:
            self.at = LENIENT_DECODER.raw_decode(self.text, start)[1]
        except json.JSONDecodeError as error:
            self.at = min(error.pos, len(self.text))
            raise self.broken(error.msg) from None
        except RecursionError:
            raise self.broken(f"nested deeper than {MAX_DEPTH} levels") from None
        return self.text[start : self.at]

    def broken(self, problem: str) -> DataError:
        where = f"{self.source.path}:{self.line()}"
        return DataError(f"broken JSON: {problem}", where=where, fix="correct the file at that line")


def _csv(source: Source, on_progress: Progress | None) -> Iterator[RawRow]:
    """One row a record, keyed by the header; a row with wrong quotes or a wrong number of cells is a fault.

    Of a faulty row only the first line is used up: the others may be rows.
    """
    csv.field_size_limit(sys.maxsize)
    lines, again, header = _lines(source, on_progress), deque[tuple[int, str]](), list[str]()
    while first := again.popleft() if again else next(lines, None):
        record, fault, cells = [first], None, list[str]()

        def text_of(record: list[tuple[int, str]]) -> Iterator[str]:
            yield record[0][1]
            while len(record) < MAX_CSV_LINES and (line := again.popleft() if again else next(lines, None)):
                record.append(line)
                yield line[1]

        try:
            cells = next(csv.reader(text_of(record), delimiter=source.delimiter, strict=True))
        except csv.Error as error:
            fault = "a quote is opened and never closed" if "unexpected end" in str(error) else str(error)
        origin = f"{source.name}:{first[0]}"
        if not header and (cells or fault):
            header = _csv_header(source, cells, fault)
        elif cells and len(cells) != len(header):
            fault = f"{len(cells)} cells where the header has {len(header)}"
        elif cells:
            text = "".join(line for _, line in record)
            invalid = _invalid_text(source, text)
            value = None if invalid else dict(zip(header, cells, strict=True))
            yield RawRow(origin, value, invalid, text if invalid else None)
        if fault:
            yield RawRow(origin, None, f"bad CSV: {fault}", first[1].strip("\r\n"))
            again.extendleft(reversed(record[1:]))


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
                if on_progress:
                    on_progress(index, file.metadata.num_rows)
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
