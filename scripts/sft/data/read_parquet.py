"""Parquet files and hub data sets: tables with types, read batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.data.lines import Progress
from sft.data.raw import Raw
from sft.errors import DataError

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
        raise DataError(f"the Parquet file is broken: {said}", where=str(path), mend="fetch it again") from None


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
        mend = f"ask for access on https://huggingface.co/datasets/{name}, then: hf auth login"
        raise DataError("the data set is gated", where=where, mend=mend) from None
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
        mend = f"look at the name (no file of that name is here either); {offline}"
        raise DataError(f"the data set cannot be had: {_first_line(error)}", where=where, mend=mend) from None
    except Exception as error:  # the library raises a dozen kinds for a wrong config, split or file
        mend = "name config and split: --set data.hub_config=... --set data.hub_split=train"
        raise DataError(f"the data set cannot be read: {_first_line(error)}", where=where, mend=mend) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
