"""A folder of ours that changes as a whole: written aside, then put in place; files that others laid there move on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft import files
from sft.config.load import resolve_path
from sft.config.schema import DataSection
from sft.data import rows
from sft.data.readers import read_lines, sniff
from sft.data.rows import Row
from sft.data.split import NAMES
from sft.errors import DataError


@contextmanager
def replaced(target: Path, ours: set[str], key: str) -> Iterator[Path]:
    """Yields an empty folder to fill, which takes the place of `target` on a clean exit; on an error nothing changes.

    ours: names of files that are not carried over. key: the config key that names another folder. Raises DataError
    when the folder holds folders (it is not ours to replace) or cannot be written.
    """
    target, fix = target.resolve(), f"name a folder of its own: --set {key}=DIR"
    if target.exists() and not target.is_dir():
        raise DataError("the folder to write to is a file", where=str(target), fix=fix)
    others = [path for path in sorted(target.iterdir()) if path.name not in ours] if target.exists() else []
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


STYLED_FROM = "source.json"  # beside styled rows: which file each was made from, with which content, by which style
COMMANDS = {"processed": "make process", "styled": "make style", "rendered": "make render"}


@dataclass(frozen=True)
class Stage:
    """The files of one stage; a split without rows has none. name: processed, styled, rendered, or given."""

    name: str
    train: Path
    val: Path | None
    test: Path | None


def read_rows(path: Path | str) -> list[Row]:
    """All rows of a stored file, each with `id` and `origin`. Raises DataError with file:line at the first bad one."""
    return list(iter_rows(path))


def iter_rows(path: Path | str) -> Iterator[Row]:
    """The same, one at a time."""
    path = Path(path)
    if not path.exists():
        raise DataError("no such file of rows", where=str(path), fix="make it: make process RAW=your_file")
    found = sniff(path)
    if found.kind != "jsonl":
        raise DataError("not a file of JSON lines", where=str(path), fix=f"make process RAW={path}")
    for raw in read_lines(path, str(path), found, None):
        if fault := raw.fault or _fault(raw.value):
            raise DataError(fault, where=raw.origin, fix=f"fix that line, or: make process RAW={path}")
        row: Row = raw.value
        row.setdefault("origin", f"{path.name}:{raw.origin.rpartition(':')[2]}")
        yield row if row.get("id") else {"id": rows.row_id(row), **row}


def count(path: Path) -> int:
    """Lines with text in them: rows, if they can be read."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _fault(row: Any) -> str | None:
    """What keeps a row from being one of the three stored shapes, with text where text belongs."""
    keys = set(row) if isinstance(row, dict) else set()
    if "messages" in keys:
        turns = row["messages"]
        good = isinstance(turns, list) and turns and all(isinstance(turn, dict) and "role" in turn for turn in turns)
        return None if good else "messages is not a list of turns with a role"
    wanted = ("user", "assistant") if "user" in keys else ("input", "target")
    if not set(wanted) <= keys:
        shapes = "{system,user,assistant}, {messages} or {input,target}"
        return f"not a processed row: it has {sorted(map(str, keys))[:8]} and not {shapes}"
    for key in (*wanted, *({"system"} & keys)):
        if not isinstance(row[key], str) and not (key == "system" and row[key] is None):
            return f"{key} is not text"
    return None


def paths(data: DataSection, root: Path) -> Stage:
    """The files to train and evaluate on, by `data.stage`; `data.train_path` and its like win.

    auto: styled rows where there are any, else processed. Raises DataError for a stage that is not there, and for
    styled rows whose source has changed since.
    """
    if data.train_path:
        return _given(data, root)
    name: str = data.stage
    if name == "auto":
        name = "styled" if (resolve_path(root, data.styled_dir) / "train.jsonl").exists() else "processed"
    folder = resolve_path(root, getattr(data, f"{name}_dir"))
    if not (folder / "train.jsonl").exists():
        fix = COMMANDS[name] + ("" if name == "processed" else ", or --set data.stage=auto")
        raise DataError(f"there are no {name} rows", where=str(folder / "train.jsonl"), fix=fix)
    if name == "styled":
        check_styled(data, root)
    found = {split: folder / f"{split}.jsonl" for split in NAMES}
    for split, given in (("val", data.val_path), ("test", data.test_path)):
        if given:
            found[split] = _existing(root, given, f"data.{split}_path")
    there = {split: path for split, path in found.items() if path.exists()}
    return Stage(name, found["train"], there.get("val"), there.get("test"))


def _given(data: DataSection, root: Path) -> Stage:
    """Named files; val and test that are not named are looked for beside the training file, never in another folder."""
    train = _existing(root, str(data.train_path), "data.train_path")
    found: dict[str, Path | None] = {}
    for split, given in (("val", data.val_path), ("test", data.test_path)):
        path = _existing(root, given, f"data.{split}_path") if given else train.with_name(f"{split}.jsonl")
        found[split] = path if path.exists() and path != train else None
    return Stage("given", train, found["val"], found["test"])


def _existing(root: Path, text: str, key: str) -> Path:
    """The file that the config key `key` names. Raises DataError where there is none."""
    path = resolve_path(root, text)
    if not path.is_file():
        raise DataError(f"the file of {key} does not exist", where=str(path), fix=f"correct {key}, or make process")
    return path


def check_styled(data: DataSection, root: Path) -> None:
    """Raises DataError unless the styled rows were made from the processed rows as they are now."""
    styled, processed = resolve_path(root, data.styled_dir), resolve_path(root, data.processed_dir)
    kept = styles(styled)
    for name in (f"{split}.jsonl" for split in NAMES):
        source, made = processed / name, styled / name
        if not source.exists() and not made.exists():
            continue
        if name not in kept or not made.exists():
            what = f"{name} is processed, but not styled"
            if made.exists():
                what = f"{STYLED_FROM} does not tell what {name} was made from"
        elif not source.exists():
            what = f"{name} is styled, but its source is gone"
        elif files.sha256(source) != kept[name].get("sha256"):
            what = f"{name} was styled before the processed rows changed"
        else:
            continue
        fix = "style again: make style STYLE=...; or train without style: --set data.stage=processed"
        raise DataError(f"the styled rows are stale: {what}", where=str(styled), fix=fix)


def note_style(target: Path, source: Path, digest: str, **how: str) -> None:
    """Writes beside `target` that it was made from `source`, whose bytes had the SHA-256 `digest`."""
    entry = {"source": source.name, "sha256": digest, **how}
    files.write_json(target.parent / STYLED_FROM, {"files": {**styles(target.parent), target.name: entry}})


def styles(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> its entry; nothing where there is no source.json or it cannot be read."""
    entries = files.read_json(folder / STYLED_FROM).get("files")
    known = entries.items() if isinstance(entries, dict) else ()
    return {name: entry for name, entry in known if isinstance(entry, dict)}
