"""Rows outside one file of JSON lines: Arrow and Parquet, folders of files, hub data sets and URLs.

`local` turns what a config names into a path on this machine; `rows` and `batches` read it part by part. A table with a
column `input_ids` holds tokens (`has_tokens`), which `chat/pretokenised.py` checks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft import files
from sft.config.load import display_path, resolve_path
from sft.config.schema import DataSection
from sft.errors import DataError, EnvironmentProblem, one_line, redact

log = logging.getLogger("sft.data")
FOLDER = ".cache/downloads"  # below the project root
ABOUT = ".about.json"  # hidden: no file of rows
TABLES = (".arrow", ".parquet")
LINES = (".jsonl", ".ndjson")  # also .gz and .zst of them
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
URL = re.compile(r"^[a-z][a-z0-9+]+://")
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}
BATCH = 1_000  # rows in memory at a time


def local(text: str, root: Path, data: DataSection, split: str = "train") -> Path:
    """The file or folder on this machine that `text` names: a path, a URL (any that fsspec opens) or `owner/name`, a
    hub data set (`owner/name:split`). The last two are cached in FOLDER.

    split: train, val or test: a folder with folders of splits is entered. Raises DataError, EnvironmentProblem.
    """
    if URL.match(text):
        return download(text, root)
    path = resolve_path(root, text)
    name, _, hub_split = text.partition(":")
    if not path.exists() and HUB_NAME.match(name) and not is_rows(path):
        default = {"train": data.hub_split, "val": "validation", "test": "test"}[split]
        return _hub_folder(name, data.hub_config, hub_split or default, root)
    return next((path / name for name in SPLIT_NAMES[split] if (path / name).is_dir()), path)


def beside(train: Path, split: str) -> Path:
    """Where the rows of val or test are looked for: beside the training rows, a file or folder like those."""
    ending = train.suffix if train.suffix in TABLES else ".jsonl"
    names = SPLIT_NAMES[split] if train.is_dir() else (f"{split}{ending}",)
    return next((train.with_name(name) for name in names if train.with_name(name).exists()), train.with_name(names[0]))


def is_rows(path: Path) -> bool:
    """Whether the name is that of a file that `rows` reads: Arrow, Parquet or JSON lines, compressed or not."""
    return path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith((*TABLES, *LINES))


def is_table(path: Path) -> bool:
    """Whether `path` is a folder of files of rows, or an Arrow or Parquet file."""
    return path.is_dir() or path.suffix.lower() in TABLES


def files_of(path: Path) -> list[Path]:
    """The files of rows in a folder, by name, or the file itself. Raises DataError for a folder without any, or where
    some are named for a split and others are not of it (val.jsonl, quarantine.jsonl).
    """
    if not path.is_dir():
        return [path]
    inside = [file for file in sorted(path.iterdir()) if is_rows(file) and not file.name.startswith(".")]
    if not inside:
        what = "the folder holds no rows: no file ends in .arrow, .parquet or .jsonl"
        raise DataError(what, where=str(path), fix=f"rows in other formats: make process RAW={path}")
    firsts = (re.split(r"[-._]", file.name)[0] for file in inside)
    splits = {next((one for one, names in SPLIT_NAMES.items() if first in names), "others") for first in firsts}
    if len(splits) > 1:
        what = f"the folder mixes the files of several splits ({', '.join(sorted(splits))})"
        raise DataError(what, where=str(path), fix="name one file, or put each split into a folder of its own")
    return inside


def digest(path: Path) -> str:
    """The SHA-256 of a file, or of the names and contents of a folder's files of rows."""
    if not path.is_dir():
        return files.sha256(path)
    parts = [f"{file.name} {files.sha256(file)}" for file in files_of(path)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def columns(file: Path) -> set[str]:
    """The names of an Arrow or Parquet file's columns; none of another file."""
    if file.suffix.lower() not in TABLES:
        return set()
    with _reading(file):
        if _is_parquet(file):
            from pyarrow import parquet

            return set(parquet.read_schema(file).names)
        return set(_reader(file)[0].schema.names)


def has_tokens(path: Path) -> bool:
    """Whether the rows at `path` come as tokens. Raises DataError if only some files have them."""
    if not is_table(path):
        return False
    inside = files_of(path)
    tokens = [file for file in inside if "input_ids" in columns(file)]
    if 0 < len(tokens) < len(inside):
        other = next(file for file in inside if file not in tokens)
        what = f"{tokens[0].name} has a column input_ids, {other.name} has none"
        raise DataError(what, where=str(path), fix="keep tokens and texts in folders of their own")
    return bool(tokens)


def count(path: Path) -> int:
    """The rows of a table; of JSON lines, the lines that are not blank."""
    total = 0
    for file in files_of(path):
        if not is_table(file):
            with file.open("rb") as lines:
                total += sum(1 for line in lines if line.strip())
            continue
        with _reading(file):
            if _is_parquet(file):
                from pyarrow import parquet

                total += int(parquet.read_metadata(file).num_rows)
            else:
                total += sum(batch.num_rows for batch in _record_batches(_reader(file)[0]))
    return total


def rows(file: Path) -> Iterator[tuple[int, bytes]]:
    """The rows of an Arrow or Parquet file as (index, JSON); what is null is left out. Raises DataError."""
    from sft.data.rows import dump_json

    index = 0
    for batch in batches(file):
        for row in batch.to_pylist():
            yield index, dump_json(_without_nulls(row))
            index += 1


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object of a column the same keys, null where an object had none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def batches(file: Path) -> Iterator[Any]:
    """Record batches of at most BATCH rows, one in memory at a time: pages of a mapped file are released once read."""
    with _reading(file):
        if _is_parquet(file):
            from pyarrow import parquet

            with parquet.ParquetFile(file) as opened:
                yield from opened.iter_batches(batch_size=BATCH)
            return
        reader, pages = _reader(file)
        for whole in _record_batches(reader):
            for start in range(0, whole.num_rows, BATCH):
                yield whole.slice(start, BATCH)
                pages.madvise(mmap.MADV_DONTNEED)


def can_be_mapped(file: Path) -> bool:
    """Whether the rows of a table can be used where they lie in the file: it is Arrow, and not compressed."""
    from pyarrow import py_buffer

    if _is_parquet(file):
        return False
    reader, pages = _reader(file)
    whole = py_buffer(pages)
    inside = range(whole.address, whole.address + whole.size)
    first = next(_record_batches(reader), None)
    buffers = [buffer for column in first.columns for buffer in column.buffers()] if first is not None else []
    return all(buffer.address in inside for buffer in buffers if buffer is not None and buffer.size)


def mapped(inside: Iterable[Path], names: Sequence[str] | None = None) -> tuple[Any, Callable[[], None]]:
    """These columns (None: all) of Arrow files as one table that stays in the files; and a function that releases the
    memory that reading it has filled.
    """
    import pyarrow

    opened = [_reader(file) for file in inside]
    names = opened[0][0].schema.names if names is None else names
    table = pyarrow.Table.from_batches(
        [batch.select(names) for reader, _ in opened for batch in _record_batches(reader)],
        schema=pyarrow.schema([opened[0][0].schema.field(name) for name in names]),
    )

    def release() -> None:
        for _, pages in opened:
            pages.madvise(mmap.MADV_DONTNEED)

    return table, release


def _record_batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "get_batch"):
        return map(reader.get_batch, range(reader.num_record_batches))
    return iter(reader)


def _reader(file: Path) -> tuple[Any, mmap.mmap]:
    """A reader of an Arrow file (of either form: file, or stream, as the datasets library writes), and its pages."""
    from pyarrow import ipc, py_buffer

    with file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    source = py_buffer(pages)
    return (ipc.open_file if pages[:6] == b"ARROW1" else ipc.open_stream)(source), pages


def _is_parquet(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"PAR1"


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Errors of reading `file` as a DataError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        what = f"the {'Parquet' if file.suffix.lower() == '.parquet' else 'Arrow'} file is broken: {one_line(error)}"
        raise DataError(what, where=str(file), fix="fetch it again") from None


# -- what is not on this machine ---------------------------------------------------------------------------------------


def download(url: str, root: Path) -> Path:
    """What a URL names, copied once into FOLDER: a file, or a folder's files of rows. `file:` is not copied.

    Raises DataError if it cannot be opened, EnvironmentProblem if fsspec lacks the library for it.
    """
    import fsspec  # type: ignore[import-untyped,unused-ignore]

    shown = _without_password(url)
    try:
        system, place = fsspec.core.url_to_fs(url)
        if url.startswith("file:"):
            return Path(place)
        target = root / FOLDER / hashlib.sha256(url.encode()).hexdigest()[:16]
        about = files.read_json(target / ABOUT)
        if about:
            log.info("%s: the copy of %s is used; to download it again, delete %s", shown, about["at"], target)
        else:
            about = {"url": shown, "at": time.strftime("%Y-%m-%d %H:%M"), "file": _file_name(place)}
            addresses = [place]
            if not is_rows(Path(about["file"])) and system.isdir(place):
                addresses, about["file"] = [name for name in system.ls(place, detail=False) if is_rows(Path(name))], ""
            with files.atomic_folder(target) as staged:
                for name in addresses:
                    log.info("downloading %s", _file_name(name) if name != place else shown)
                    system.get_file(name, str(staged / _file_name(name)))
                files.write_json(staged / ABOUT, about)
    except ImportError as error:
        fix = f"{one_line(error)}; or download it and name the file"
        raise EnvironmentProblem("the library that opens this kind of URL is missing", where=shown, fix=fix) from None
    except Exception as error:  # clients of HTTP and of clouds have errors of their own
        what = f"the URL cannot be opened: {type(error).__name__}: {_without_password(one_line(error))}"
        raise DataError(what, where=shown, fix="check the address; or download it and name the file") from None
    return target / str(about["file"])


def _without_password(text: str) -> str:
    return redact(re.sub(r"[^/\s@]+:[^/\s@]+@", "", text))


def _file_name(place: str) -> str:
    """The last part of an address, without the query behind it."""
    return Path(place.partition("?")[0]).name


def load_hub(name: str, config: str | None, split: str) -> Any:
    """A data set of the Hugging Face hub, from its cache if possible. Any failure is a DataError."""
    import datasets
    import huggingface_hub

    where = f"hub data set {name}" + (f", config {config}" if config else "") + f", split {split}"
    try:
        datasets.disable_progress_bars()
        return datasets.load_dataset(name, config, split=split)
    except huggingface_hub.errors.GatedRepoError:
        fix = f"request access on https://huggingface.co/datasets/{name}, then: hf auth login"
        raise DataError("the data set is gated", where=where, fix=fix) from None
    except Exception as error:  # the library raises a dozen kinds for a wrong name, config, split or file
        fix = (
            "check the name (no file has it here either), or name config and split: --set data.hub_config=... --set"
            " data.hub_split=train; without a network, or with HF_HUB_OFFLINE, give a file with --raw_path"
        )
        what = f"the data set cannot be loaded: {one_line(error) or type(error).__name__}"
        raise DataError(what, where=where, fix=fix) from None


def _hub_folder(name: str, config: str | None, split: str, root: Path) -> Path:
    """The Arrow files of a hub data set's split, as links to the datasets library's own cache where that has them."""
    data_set = load_hub(name, config, split)
    cached = [Path(entry["filename"]) for entry in data_set.cache_files]
    version = json.dumps([name, config, split, len(data_set), *map(str, cached)])
    folder = root / FOLDER / hashlib.sha256(version.encode()).hexdigest()[:16]
    if not folder.is_dir():
        with files.atomic_folder(folder) as staged:
            if cached and sum(map(count, cached)) == len(data_set):
                for number, file in enumerate(cached):
                    (staged / f"{number:05d}.arrow").symlink_to(file)
            else:  # a part of a split
                data_set.save_to_disk(staged / "part")
    part = folder / "part"
    log.info("%s: %d rows, in %s", name, len(data_set), display_path(folder, root))
    return part if part.is_dir() else folder
