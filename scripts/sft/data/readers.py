"""Readers: the rows of a file (JSON lines, JSON, CSV, Parquet, Excel, Q:/A: text) or of a hub data set, one at a time.

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
import shlex
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sft.config.load import display_path
from sft.config.schema import DataSection, ReplaySection, SourceSection
from sft.data import shards
from sft.data.rows import MAX_DEPTH, RowFault, parse_json
from sft.data.store import BROKEN, open_bytes
from sft.errors import DataError, nearest, one_line

Kind = Literal["jsonl", "json", "csv", "parquet", "arrow", "xlsx", "qa"]
Progress = Callable[[int, int], None]  # bytes read, bytes in total
Section = DataSection | SourceSection | ReplaySection
# The one list of file names that hold rows: folders and the quick start go by it too.
SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".xlsx": "xlsx",
}  # fmt: skip
COMPRESSED = (".gz", ".zst")
KIND_NAMES = {
    "jsonl": "JSON lines", "json": "JSON", "csv": "a table in text (CSV)", "parquet": "Parquet", "arrow": "Arrow",
    "xlsx": "Excel", "qa": "text with Q: and A: lines",
}  # fmt: skip
READABLE = "give rows as JSON, JSONL, CSV, TSV, Parquet, Arrow, .xlsx, or text with Q: and A: lines: docs/DATA.md"
OTHER_FILES = {  # first bytes -> what the file is, and what to do
    b"\x89PNG": ("a PNG picture", READABLE),
    b"%PDF": ("a PDF document", "extract its text, and write rows of questions and answers: docs/DATA.md"),
    b"PK\x03\x04": ("a zip archive (or a .docx or .ods)", "unpack it, or save it as CSV"),
    b"\xd0\xcf\x11\xe0": ("an old Excel or Word file", "save it as .xlsx or CSV"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "git lfs pull"),
    b"\x80\x04": ("a Python pickle, which can run code", "save the rows as JSON lines"),
    b"BZh": ("compressed with bzip2", "bunzip2 --keep {path}"),
    b"\xfd7zXZ": ("compressed with xz", "unxz --keep {path}"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it"),
    b"Rar!": ("a rar archive", "unpack it"),
    b"SQLite format 3": ("an SQLite data base", "sqlite3 -header -csv {path} 'select * from TABLE' > rows.csv"),
}
BINARY: dict[bytes, Kind] = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}  # by first bytes
CONTROL = re.compile("[\0-\x08\x0e-\x1f\ufffe\uffff]")
INVALID = re.compile("[\ud800-\udfff]")  # bytes that are invalid in the encoding are decoded to these
BYTE_ORDER_MARKS = {"utf-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "utf-16": (b"\xff\xfe", b"\xfe\xff")}
UNUSED_IN_CP1252 = set("\udc81\udc8d\udc8f\udc90\udc9d\udcfe\udcff")  # or hardly ever written
WRAPPERS = ("data", "rows", "train", "examples", "instances", "items", "records", "samples")
DOCUMENTS = {  # what files with other names hold, unless it is JSON
    ".log": "a log", **dict.fromkeys((".md", ".rst"), "a README or notes"),
    **dict.fromkeys((".py", ".sh", ".js", ".c", ".cpp", ".java"), "program code"),
}  # fmt: skip
# How a row of a question-and-answer text begins: "Q:", "3. Question :", "q:"
QA_MARK = re.compile(r"[ \t]*(?P<number>\d+[.)][ \t]*)?(?P<word>[Qq](?:uestion)?|QUESTION)(?P<colon>[ \t]*:)")
QA_ANSWERS = {"Q": "A", "Question": "Answer", "QUESTION": "ANSWER", "q": "a", "question": "answer"}
SEPARATOR = re.compile("sep=.")  # what Excel writes above a table
MAX_TITLE = 3  # lines before the first question
SPLITS = ("train", "val", "valid", "validation", "dev", "eval", "test")
LENIENT_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)  # finds where a value ends, whatever its faults
HEAD = 1 << 18  # bytes from which kind and encoding are detected
BLOCK = 1 << 20  # characters of JSON read at a time
MAX_CSV_LINES = 10_000  # of one row
MAX_PROBLEMS = 10  # of broken JSON in one message
JSON_PROBLEMS = {  # how Python's message begins -> ours
    "Expecting ',' delimiter": "a comma or a closing bracket is missing, or a quote inside a text lacks its backslash",
    "Expecting property name": "a key in double quotes is missing (JSON has no single quotes)",
    "Expecting value": "a value is missing (texts need double quotes)",
    "Invalid control character": "a line break or tab inside a text (write \\n or \\t)",
    "Unterminated string": "a text is not closed with a quote (is the file cut off?)",
}


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
            values = shards.load_hub(self.name, self.hub_config, self.hub_split)
            return (RawRow(f"{self.name}[{index}]", value) for index, value in enumerate(values))
        read = {
            "jsonl": _json_lines, "json": _json, "csv": _csv, "parquet": _arrow, "arrow": _arrow, "xlsx": _excel,
            "qa": _qa_text,
        }  # fmt: skip
        return read[self.format](self, on_progress)


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
    if section is not None and not path.exists() and shards.HUB_NAME.match(text) and not named_as_file:
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
    other, fix = next((entry for opening, entry in OTHER_FILES.items() if head.startswith(opening)), ("", READABLE))
    if re.match(r"\s*<(!doctype|html|\?xml|head|!--)", content, re.IGNORECASE):
        other = "a web page or XML (did a download or a login fail?)"
    if head[257:262] == b"ustar":
        other, fix = "a tar archive", "tar -xf {path}"
    binary: Kind | None = next((kind for opening, kind in BINARY.items() if head.startswith(opening)), None)
    if other and zipfile.is_zipfile(path) and "xl/workbook.xml" in zipfile.ZipFile(path).namelist():
        binary = "xlsx"
    if binary:
        return Source(display_path(path, root), path, binary)
    if other or len(CONTROL.findall(content)) * 50 > len(content):
        fix = fix.replace("{path}", shlex.quote(str(path)))
        raise DataError(f"the file is {other or 'binary'}", where=str(path), fix=fix)
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
    first_value = values[0] if values else None
    lists = _lists_of_rows(first_value) or _table(first_value) if isinstance(first_value, dict) else values
    if len(values) * 2 > len(some) and not (len(lines) == 1 and lists):  # one value may hold all rows
        return "jsonl", ","
    if first[0] in "[{" and (named or re.match(r"""[\[{]\s*(["'\[{\]}]|$)""", first)):
        return ("jsonl" if named == "jsonl" and len(lines) == 1 and not values and not cut else "json"), ","
    if SEPARATOR.fullmatch(first):
        return "csv", first[-1]
    header = re.sub(r'"[^"]*"', "", first)
    rest = "\n".join(lines[1:])
    marks = [mark for mark in ",\t;|" if mark in header and (cut or not rest or mark in rest)]
    delimiter = max(marks, key=header.count, default="")
    if named == "jsonl" and (values or not delimiter):
        return "jsonl", ","
    qa_marks = _qa_marks(lines[: MAX_TITLE + 1]) if named is None else None
    if qa_marks and sum(map(bool, map(qa_marks.match, lines))) > 1:
        return "qa", ","
    if named == "csv" and (delimiter or (lines[1:] and re.fullmatch(r'"?\w+"?', first))):
        return "csv", delimiter or ","  # without a delimiter: a table of one column
    document = DOCUMENTS.get(path.suffix.lower()) or ("a README" if path.stem.upper() == "README" else None)
    if delimiter and not document and (named or _is_table(some, delimiter)):
        return "csv", delimiter
    what = f"not data: {document or 'neither JSON, nor a table, nor Q: and A: lines'}; it begins {first[:60]!r}"
    raise DataError(what, where=str(path), fix=READABLE)


def _is_table(lines: list[str], delimiter: str) -> bool:
    """Whether the lines of a file whose name promises no table have names in the first, and as many cells in others."""
    header, *rows = csv.reader(lines, delimiter=delimiter)
    names = all(re.fullmatch(r"[^\W\d][\w .()/?-]*", cell.strip()) for cell in header)
    return names and sum(len(row) == len(header) for row in rows) * 5 >= len(rows) * 4


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
            what = f"the file is truncated: {error}"
            raise DataError(what, where=str(path), fix="save or download it again") from None


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
        value = parse_json(text)
        if isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "from"} & value[0].keys():
            value = {"messages": value}  # the turns alone
        return RawRow(origin, value)
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
        if start == "[":
            yield from _array(source, text)
            continue
        if start != "{":
            raise text.error([(text.line(), f"expected a row or a list of rows, not {start!r}")])
        line = text.line()
        try:
            row = _json_row(source, f"{source.name}:{line}", text.value())
        except _BrokenValue as broken:
            raise text.error([broken.args]) from None
        lists = _lists_of_rows(row.value) if row.fault is None else []
        if len(lists) > 1:
            what = f"the file holds more than one list of rows: {', '.join(lists)}"
            raise DataError(what, where=f"{source.path}:{line}", fix="put each into its own file")
        table = _table(row.value) if row.fault is None and not lists else []
        values = row.value[lists[0]] if lists else table
        if lists and all(isinstance(value, dict) and value.keys() >= {"row_idx", "row"} for value in values):
            values = [value["row"] for value in values]  # of the hub's data set viewer
        yield from (RawRow(f"{source.name}[{index}]", value) for index, value in enumerate(values))
        if not lists and not table:
            yield row
        text.accept(",")


def _table(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table as pandas writes it: by columns (lists, or objects by row number), rows or split."""
    if "columns" in value and value.keys() <= {"columns", "index", "data"}:  # orient="split"
        return [dict(zip(value["columns"], cells, strict=True)) for cells in value["data"]]
    parts = list(value.values())
    if len(parts) > 1 and all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts):
        plain = not any(isinstance(cell, dict | list) for part in parts for cell in part)
        return [dict(zip(value, cells, strict=True)) for cells in zip(*parts, strict=True)] if plain else []
    if not parts or not all(isinstance(part, dict) and part for part in parts):
        return []
    if all(key.isdigit() for key in value):
        return parts
    numbers = list(parts[0])
    if not all(number.isdigit() for number in numbers) or any(list(part) != numbers for part in parts):
        return []
    return [{name: column[number] for name, column in value.items()} for number in numbers]


def _array(source: Source, text: _JsonText) -> Iterator[RawRow]:
    """The rows of the array at the cursor, up to the first problem. All problems are in one DataError at the end."""
    index, last_line, problems = 0, text.line(), list[tuple[int, str]]()
    text.accept("[")
    while text.peek() not in ("]", ""):
        line, begin = text.line(), text.at
        place = f"[{index}]" if line == last_line else f":{line}"
        index, last_line = index + 1, line
        try:
            row = _json_row(source, source.name + place, text.value())
            if not problems:
                yield row
            if not text.accept(",") and text.peek() not in ("]", ""):
                problems.append((text.line(), "a comma is missing before this row"))
        except _BrokenValue as broken:
            problems.append(broken.args)
            if not text.skip_to_row(begin):
                raise text.error(problems) from None
    if not text.accept("]"):
        problems.append((text.line(), "the list is not closed: ] is missing"))
    if problems:
        raise text.error(problems)


class _BrokenValue(Exception):
    """A value of a JSON text is broken: line, problem."""


class _JsonText:
    """A cursor over JSON text."""

    def __init__(self, source: Source, text: str) -> None:
        self.source, self.text, self.at = source, text, 0
        self._line, self._counted = 1, 0  # the line at a position up to which line ends are counted

    def line(self) -> int:
        """The line at the cursor."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = max(self.at, self._counted)
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
        """The text of the value at the cursor, moved over. Raises _BrokenValue if it is not JSON."""
        start = self.at
        try:
            self.at = LENIENT_DECODER.raw_decode(self.text, start)[1]
        except json.JSONDecodeError as error:
            self.at = min(error.pos, len(self.text))
            problem = next((ours for start, ours in JSON_PROBLEMS.items() if error.msg.startswith(start)), error.msg)
            closing = re.match(r"[,\s]*([]}])", self.text[self.at : self.at + 1_000])
            if self.text.startswith(("//", "/*", "#"), self.at):
                problem = "a comment: JSON has none"
            if closing and self.text[: self.at + 1].rstrip("]} \t\r\n").endswith(","):
                problem = f"a comma too many before {closing[1]}"
        except RecursionError:
            problem = f"nested deeper than {MAX_DEPTH} levels"
        else:
            return self.text[start : self.at]
        raise _BrokenValue(self.line(), problem)

    def skip_to_row(self, begin: int) -> bool:
        """Moves from a problem to the next line that begins as the row at `begin` does; False if there is none."""
        indent = self.text[self.text.rfind("\n", 0, begin) + 1 : begin]
        pattern = rf"\n{indent}{{" if not indent.strip() else r"\n[ \t]*{"  # the first row may follow the bracket
        row = re.compile(pattern).search(self.text, self.at)
        self.at = row.start() + 1 if row else self.at
        return row is not None

    def error(self, problems: list[tuple[int, str]]) -> DataError:
        lines = [f"line {line}: {problem}" for line, problem in problems[:MAX_PROBLEMS]]
        lines += [f"and {len(problems) - MAX_PROBLEMS:,} more"] if len(problems) > MAX_PROBLEMS else []
        what = problems[0][1] if len(problems) == 1 else "\n    ".join([f"{len(problems):,} problems", *lines])
        where = f"{self.source.path}:{problems[0][0]}"
        lines_named = f"line {problems[0][0]}" if len(problems) == 1 else "these lines"
        return DataError(f"broken JSON: {what}", where=where, fix=f"correct {lines_named} and try again")


def _csv(source: Source, on_progress: Progress | None) -> Iterator[RawRow]:
    """One row a record, keyed by the header; a row with wrong quotes or a wrong number of cells is a fault.

    Of a faulty row only the first line is used up: the others may be rows.
    """
    csv.field_size_limit(sys.maxsize)
    name = {",": "comma", "\t": "tab"}.get(source.delimiter, source.delimiter)
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
        if not header and SEPARATOR.fullmatch(first[1].strip("\ufeff\r\n")):
            again.extendleft(reversed(record[1:]))
        elif not header and (cells or fault):
            header = _csv_header(source, cells, fault)
        elif cells and len(cells) != len(header):
            counts = f"{len(cells)} cells where the header has {len(header)}"
            fault = f"{counts}; a cell with a {name} needs quotes around it"
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


def _arrow(source: Source, on_progress: Progress | None) -> Iterator[RawRow]:
    """One row a record of a Parquet or Arrow file, in order."""
    path, index = source.path or Path(), 0
    total = shards.count(path) if on_progress else 0
    for batch in shards.batches(path):
        for value in batch.to_pylist():
            yield RawRow(f"{source.name}[{index}]", value)
            index += 1
        if on_progress:
            on_progress(index, total)


def _excel(source: Source, on_progress: Progress | None) -> Iterator[RawRow]:
    """One row a line of every sheet, keyed by the sheet's first line."""
    import openpyxl  # type: ignore[import-untyped,unused-ignore]

    try:
        book = openpyxl.load_workbook(source.path, read_only=True, data_only=True)
    except Exception as error:  # the library raises whatever it stumbles over
        what = f"the Excel file is broken: {one_line(error)}"
        raise DataError(what, where=str(source.path), fix="save it again, or as CSV") from None
    for sheet in book.worksheets:
        header: list[str] = []
        for number, line in enumerate(sheet.iter_rows(values_only=True), 1):
            cells = [cell.isoformat() if isinstance(cell, date) else cell for cell in line]
            place = f"{source.name}:{number}" if len(book.worksheets) == 1 else f"{source.name}[{sheet.title}]:{number}"
            if all(cell is None for cell in cells):
                continue
            if not header:
                cells = cells[: max(index for index, cell in enumerate(cells, 1) if cell is not None)]
                header = _csv_header(source, [str(cell or "") for cell in cells], None)
            elif any(cell is not None for cell in cells[len(header) :]):
                what = "more cells than the header has: the first line of a sheet names the columns"
                yield RawRow(place, None, what, repr(line))
            else:
                yield RawRow(place, dict(zip(header, cells, strict=False)))


def _qa_marks(lines: list[str]) -> re.Pattern[str] | None:
    """What begins the questions and (as group `answer`) the answers, written as the first question in `lines` is."""
    first = next(filter(None, map(QA_MARK.match, lines)), None)
    if first is None:
        return None
    number = r"(?:\d+[.)][ \t]*)?" if first["number"] else ""
    words = f"(?:{first['word']}|(?P<answer>{QA_ANSWERS[first['word']]}))"
    return re.compile(rf"[ \t]*{number}{words}{re.escape(first['colon'])}[ \t]*")


def _qa_text(source: Source, on_progress: Progress | None) -> Iterator[RawRow]:
    """Each line that begins with `Q:` begins a row, the line with `A:` its answer; both run to the next such line."""

    def finished() -> RawRow:
        question, *answers = ["\n".join(part).strip() for part in parts]
        text = "\n".join([question, *answers])
        fault = _invalid_text(source, text)
        if len(answers) != 1:
            fault = f"{len(answers)} answers (lines that begin with A:) after this question, instead of one"
        value = None if fault else {"question": question, "answer": answers[0]}
        return RawRow(f"{source.name}:{begin}", value, fault, text if fault else None)

    marks, begin, parts = None, 0, list[list[str]]()
    for number, line in _lines(source, on_progress):
        marks = marks or _qa_marks([line])
        mark = marks.match(line) if marks else None
        if mark and not mark["answer"]:
            if parts:
                yield finished()
            begin, parts = number, []
        if mark:
            parts.append([line[mark.end() :].strip("\r\n")])
        elif parts:
            parts[-1].append(line.strip("\r\n"))
    if parts:
        yield finished()
