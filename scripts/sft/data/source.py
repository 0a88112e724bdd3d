"""One source of raw rows: a file, or a hub data set. Several of them: mix.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sft.config.paths import shown
from sft.config.schema import DataSection, ReplaySection, SourceSection
from sft.data.lines import Progress
from sft.data.raw import Raw
from sft.data.read_csv import read_csv
from sft.data.read_json import read_array, read_lines
from sft.data.read_parquet import read_hub, read_parquet
from sft.data.sniff import SAID, Found, sniff

Section = DataSection | SourceSection | ReplaySection
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
FILE_ENDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz", ".txt", ".zst")


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
    if not path.exists() and HUB_NAME.match(text) and not text.lower().endswith(FILE_ENDS):
        return Source(text, None, None, section.hub_config, section.hub_split)
    return local(path, root)


def local(path: Path, root: Path) -> Source:
    """The source in this file. Raises DataError as `sniff` does."""
    return Source(shown(path, root), path, sniff(path))
