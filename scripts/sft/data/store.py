"""Stored rows on disk: folders that are replaced as a whole, files of rows, and which of them a stage means."""

from __future__ import annotations

import codecs
import gzip
import io
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from sft import files
from sft.config.load import resolve_path
from sft.config.schema import DataSection
from sft.data import shards
from sft.data.rows import Row, RowFault, is_pair, parse_json, row_id, to_weight
from sft.errors import DataError

SPLITS = ("train", "val", "test")
BROKEN = (OSError, EOFError, zlib.error)  # what reading a damaged compressed file raises
STYLE_RECORD = "source.json"  # beside styled rows: the source, content and style of each
COMMANDS = {"processed": "make process", "styled": "make style", "rendered": "make render"}


@contextmanager
def replace_dir(target: Path, own_files: set[str], key: str) -> Iterator[Path]:
    """Yields an empty folder to fill, which replaces `target` on a clean exit; on an error nothing changes.

    own_files: names that are not carried over from the old folder, as all others are. key: the config key of the
    folder. Raises DataError if `target` holds folders (somebody else's) or cannot be written.
    """
    target, fix = target.resolve(), f"name a folder of its own: --set {key}=DIR"
    if target.exists() and not target.is_dir():
        raise DataError("the folder to write to is a file", where=str(target), fix=fix)
    others = [path for path in sorted(target.iterdir()) if path.name not in own_files] if target.exists() else []
    for path in others:
        if path.is_dir() and not path.is_symlink():
            raise DataError(f"the folder to write to holds another folder, {path.name}", where=str(target), fix=fix)
    try:
        with files.atomic_folder(target) as staged:
            yield staged
            for path in others:
                shutil.copy2(path, staged / path.name, follow_symlinks=False)
    except OSError as error:
        what, where = f"cannot write: {error.strerror or error}", str(error.filename or target)
        raise DataError(what, where=where, fix=f"free space, or {fix}") from None


@contextmanager
def open_bytes(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed content of `path`, and the file below it, whose `tell` shows the progress."""
    with path.open("rb") as raw:
        head = raw.read(4)
        raw.seek(0)
        stream: Any = raw
        if head[:2] == b"\x1f\x8b":
            stream = io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=raw)))
        elif head == b"\x28\xb5\x2f\xfd":
            import pyarrow

            stream = io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
        with stream:
            yield stream, raw


def read_rows(path: Path | str) -> list[Row]:
    """All rows of a stored file, each with `id` and `origin`. Raises DataError with file:line at the first bad one."""
    return list(iter_rows(path))


def iter_rows(path: Path | str) -> Iterator[Row]:
    """The same, one at a time. path: a file of JSON lines, Arrow or Parquet, or a folder of such files."""
    path, process = Path(path), f"make process RAW={path}"
    if not path.exists():
        raise DataError("no such file of rows", where=str(path), fix="create it: make process RAW=your_file")
    if shards.has_tokens(path):
        what = "these rows are tokens (a column input_ids), and this needs their texts"
        raise DataError(what, where=str(path), fix="name rows of text: data.train_path, data.val_path, data.test_path")
    empty = True
    for file in shards.files_of(path):
        place = str(file)
        try:
            for place, text in _texts(file):
                row = _stored_row(text)
                row.setdefault("origin", place.removeprefix(f"{file.parent}/"))
                empty = False
                yield row if row.get("id") else {"id": row_id(row), **row}
        except (RowFault, UnicodeDecodeError) as error:
            what = error.detail if isinstance(error, RowFault) else f"not UTF-8 at byte {error.start + 1}"
            raise DataError(what, where=place, fix=f"correct that line, or: {process}") from None
        except BROKEN as error:
            raise DataError(f"the file cannot be read: {error}", where=str(file), fix=process) from None
    if empty:
        raise DataError("the file is empty", where=str(path), fix="create it: make process RAW=your_file")


def _texts(file: Path) -> Iterator[tuple[str, bytes]]:
    """The place ("path:line" or "path[index]") and the JSON of each row of a file."""
    if shards.is_table(file):
        yield from ((f"{file}[{index}]", text) for index, text in shards.rows(file))
        return
    with open_bytes(file) as (lines, _):
        for number, line in enumerate(lines, 1):
            text = line.removeprefix(codecs.BOM_UTF8).strip()
            if text and number == 1 and not text.startswith(b"{"):
                what = "not a file of JSON lines"
                raise DataError(what, where=str(file), fix=f"make process RAW={file}")
            if text:
                yield f"{file}:{number}", text


def _stored_row(text: bytes) -> Row:
    """Raises RowFault unless this is a row of one of the four stored shapes, with text if text belongs."""
    row = parse_json(text.decode("utf-8"))
    keys = set(row) if isinstance(row, dict) else set()
    pair = bool(keys) and is_pair(row)
    for key in ("messages", *(("chosen", "rejected") if pair else ())):
        if key in keys and not (key != "messages" and isinstance(row[key], str)):
            turns = row[key]
            if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) and "role" in t for t in turns):
                raise RowFault("unknown format", f"{key} is not a list of turns with a role")
            for number, turn in enumerate(turns):
                to_weight(turn.get("weight", 1), f"{key}[{number}].weight")
    if "messages" in keys:
        return dict(row)
    required = ("user", "assistant") if "user" in keys else ("prompt",) if pair else ("input", "target")
    if not keys.issuperset(required):
        shapes = "{system,user,assistant}, {messages}, {prompt,chosen,rejected} or {input,target}"
        raise RowFault(
            "unknown format", f"not a processed row: its keys are {', '.join(sorted(keys)[:8])}, not {shapes}"
        )
    for key in required:
        if not isinstance(row[key], str):
            raise RowFault("not text", f"{key} is not text")
    if not isinstance(row.get("system") or "", str):
        raise RowFault("not text", "system is not text")
    return dict(row)


@dataclass(frozen=True)
class Stage:
    """The files (or folders of files) of one stage; None for a split without rows. name: processed, styled, rendered or
    given.
    """

    name: str
    train: Path
    val: Path | None
    test: Path | None

    @property
    def paths(self) -> dict[str, Path]:
        """The splits that have rows: train, val, test."""
        return {name: path for name in SPLITS if (path := getattr(self, name))}


def resolve_stage(data: DataSection, root: Path) -> Stage:
    """The files to train and evaluate on, by `data.stage`; `data.train_path`, `val_path` and `test_path` win.

    auto: styled rows if there are any, else processed ones. val.jsonl and test.jsonl are looked for beside the training
    file. Raises DataError for files that do not exist, and for styled rows whose source has changed.
    """
    name: str = "given" if data.train_path else data.stage
    if name == "auto":
        name = "styled" if (resolve_path(root, data.styled_dir) / "train.jsonl").exists() else "processed"
    if name == "given":
        train = _existing(root, data, "train")
    else:
        train = resolve_path(root, getattr(data, f"{name}_dir")) / "train.jsonl"
        if not train.exists():
            fix = COMMANDS[name] + ("" if name == "processed" else ", or --set data.stage=auto")
            raise DataError(f"there are no {name} rows", where=str(train), fix=fix)
    if name == "styled":
        check_styled(data, root)
    paths: dict[str, Path | None] = {}
    for split, text in (("val", data.val_path), ("test", data.test_path)):
        path = _existing(root, data, split) if text else shards.beside(train, split)
        paths[split] = path if path.exists() and path != train else None
    return Stage(name, train, paths["val"], paths["test"])


def _existing(root: Path, data: DataSection, split: str) -> Path:
    """The file or folder that the config names for a split. Raises DataError if there is none."""
    key = f"{split}_path"
    path = shards.local(getattr(data, key), root, data, split)
    if not path.exists():
        what = f"the file of data.{key} does not exist"
        raise DataError(what, where=str(path), fix=f"correct data.{key}, or make process")
    return path


def check_styled(data: DataSection, root: Path) -> None:
    """Raises DataError unless the styled rows come from the processed rows in their current state."""
    folder, processed = resolve_path(root, data.styled_dir), resolve_path(root, data.processed_dir)
    records = style_records(folder)
    for name in (f"{split}.jsonl" for split in SPLITS):
        source, record = processed / name, records.get(name, {})
        digest = files.sha256(source) if source.exists() else None
        if digest != record.get("sha256") or (folder / name).exists() != bool(record):
            what = f"the styled rows are stale: {name} was styled before the processed rows changed, or not at all"
            fix = "style again: make style STYLE=...; or train without style: --set data.stage=processed"
            raise DataError(what, where=str(folder), fix=fix)


def record_style(target: Path, source: Path, digest: str, **style: str) -> None:
    """Writes beside `target` that it comes from `source`, whose bytes had the SHA-256 `digest`."""
    entry = {"source": source.name, "sha256": digest, **style}
    files.write_json(target.parent / STYLE_RECORD, {"files": {**style_records(target.parent), target.name: entry}})


def style_records(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> its record; nothing if source.json does not exist or cannot be read."""
    entries = files.read_json(folder / STYLE_RECORD).get("files")
    items = entries.items() if isinstance(entries, dict) else ()
    return {name: entry for name, entry in items if isinstance(entry, dict)}
