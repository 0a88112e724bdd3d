"""Processed rows, read again: strictly, since by now nothing may be wrong; and which files a stage means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft import files
from sft.config.paths import resolve
from sft.config.schema import DataSection
from sft.data import records
from sft.data.read_json import read_lines
from sft.data.records import Row
from sft.data.sniff import sniff
from sft.data.split import NAMES
from sft.errors import DataError

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
        raise DataError("no such file of rows", where=str(path), mend="make it: make process RAW=your_file")
    found = sniff(path)
    if found.kind != "jsonl":
        raise DataError("not a file of JSON lines", where=str(path), mend=f"make process RAW={path}")
    for raw in read_lines(path, str(path), found, None):
        if fault := raw.fault or _fault(raw.value):
            raise DataError(fault, where=raw.origin, mend=f"mend that line, or: make process RAW={path}")
        row: Row = raw.value
        row.setdefault("origin", f"{path.name}:{raw.origin.rpartition(':')[2]}")
        yield row if row.get("id") else {"id": records.row_id(row), **row}


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
        name = "styled" if (resolve(root, data.styled_dir) / "train.jsonl").exists() else "processed"
    folder = resolve(root, getattr(data, f"{name}_dir"))
    if not (folder / "train.jsonl").exists():
        mend = COMMANDS[name] + ("" if name == "processed" else ", or --set data.stage=auto")
        raise DataError(f"there are no {name} rows", where=str(folder / "train.jsonl"), mend=mend)
    if name == "styled":
        check_styled(data, root)
    found = {split: folder / f"{split}.jsonl" for split in NAMES}
    for split, given in (("val", data.val_path), ("test", data.test_path)):
        if given:
            found[split] = resolve(root, given)
    there = {split: path for split, path in found.items() if path.exists()}
    return Stage(name, found["train"], there.get("val"), there.get("test"))


def _given(data: DataSection, root: Path) -> Stage:
    """Named files; val and test that are not named are looked for beside the training file, never in another folder."""
    train = resolve(root, str(data.train_path))
    if not train.exists():
        raise DataError("data.train_path is not there", where=str(train), mend="make process, or mend data.train_path")
    found: dict[str, Path | None] = {}
    for split, given in (("val", data.val_path), ("test", data.test_path)):
        path = resolve(root, given) if given else train.with_name(f"{split}.jsonl")
        if given and not path.exists():
            raise DataError(f"data.{split}_path is not there", where=str(path), mend=f"mend data.{split}_path")
        found[split] = path if path.exists() and path != train else None
    return Stage("given", train, found["val"], found["test"])


def check_styled(data: DataSection, root: Path) -> None:
    """Raises DataError unless the styled rows were made from the processed rows as they are now."""
    styled, processed = resolve(root, data.styled_dir), resolve(root, data.processed_dir)
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
        mend = "style again: make style STYLE=...; or train without style: --set data.stage=processed"
        raise DataError(f"the styled rows are stale: {what}", where=str(styled), mend=mend)


def note_style(target: Path, source: Path, digest: str, **how: str) -> None:
    """Writes beside `target` that it was made from `source`, whose bytes had the SHA-256 `digest`."""
    entry = {"source": source.name, "sha256": digest, **how}
    files.write_json(target.parent / STYLED_FROM, {"files": {**styles(target.parent), target.name: entry}})


def styles(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> its entry; nothing where there is no source.json or it cannot be read."""
    entries = files.read_json(folder / STYLED_FROM).get("files")
    known = entries.items() if isinstance(entries, dict) else ()
    return {name: entry for name, entry in known if isinstance(entry, dict)}
