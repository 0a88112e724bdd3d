"""What a file is, told from its bytes and not from its name: kind, encoding, delimiter, compression."""

from __future__ import annotations

import difflib
import gzip
import io
import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from sft.errors import DataError

SUFFIXES = (".gz", ".zst")
BROKEN = (OSError, EOFError, zlib.error)  # what reading a compressed file that is cut or damaged raises
Kind = Literal["jsonl", "json", "csv", "parquet"]
HEAD = 1 << 18
CONTROL = re.compile("[\0-\x08\x0e-\x1f\ufffe\uffff]")  # what text does not hold
BLOCK = 1 << 20
ASCII_AND_TAILS = bytes(range(0xC0))  # what UTF-8 characters beyond ASCII do not begin with
WRAPPERS = ("data", "rows", "train", "examples", "instances", "items", "records", "samples")
NAMES: dict[str, Kind] = {
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
    return path.with_suffix("") if path.suffix.lower() in SUFFIXES else path


def sniff(path: Path) -> Found:
    """What `path` is. Raises DataError for what cannot be read: missing, empty, a picture, a web page, a database."""
    try:
        if path.is_dir():
            raise DataError("this is a folder, not a file", where=str(path), mend="name one file in it")
        stream, raw = open_bytes(path)
        with raw, stream:
            head = stream.read(HEAD)
            return _sniff(path, head, stream)
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), mend=_meant(path)) from None
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None
        raise DataError(f"the compressed file is broken: {error}", where=str(path), mend="fetch it again") from None


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
    for opening, what, mend in OTHERS:
        if head.startswith(opening):
            raise _refused(path, what, mend)
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
        mend = f"convert it: tr '\\r' '\\n' < {path.name} > converted-{path.name}"
        raise DataError("its lines end in carriage returns alone, as on old Macs", where=str(path), mend=mend)
    return Found(kind, encoding, errors, suspect, delimiter, said + _misnamed(path, kind))


def _empty(path: Path) -> DataError:
    return DataError("the file is empty", where=str(path), mend="put rows into it, see docs/DATA.md")


def _refused(path: Path, what: str, mend: str) -> DataError:
    named = f"{path.suffix[1:].upper()} by its name, but " if path.suffix else ""
    readable = "rows are read from JSON, JSONL, CSV, TSV and Parquet"
    return DataError(f"the file is {named}{what}", where=str(path), mend="; ".join(filter(None, [mend, readable])))


def _misnamed(path: Path, kind: Kind) -> list[str]:
    suffix = plain_name(path).suffix.lower()
    if suffix in NAMES and kind != NAMES[suffix]:
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
    if objects * 2 > min(len(lines), 50) or (path.suffix in (".jsonl", ".ndjson") and (objects or not delimiter)):
        return "jsonl", ","
    named_csv = NAMES.get(plain_name(path).suffix.lower()) == "csv"
    if delimiter is None and named_csv and len(lines) > 1 and re.fullmatch(r'"?\w+"?', first):
        return "csv", ","  # a table of one column
    if delimiter is None:
        mend = "rows are read from JSON, JSONL, CSV, TSV and Parquet: see docs/DATA.md"
        raise DataError(f"neither JSON nor a table: the file begins {first[:60]!r}", where=str(path), mend=mend)
    return "csv", delimiter


def _json_kind(path: Path, first: str, lines: list[str]) -> Kind:
    second = lines[1].strip() if len(lines) > 1 else ""
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        # A broken first line among lines of objects, or one value that runs over many lines.
        broken = second.startswith("{") and first.startswith("{") and first[-1] not in "{[,"
        alone = not second and len(first) < HEAD // 4 and path.suffix in (".jsonl", ".ndjson")
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
