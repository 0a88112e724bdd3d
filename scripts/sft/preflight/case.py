"""A finding, and what the checks share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sft.config.schema import Config
    from sft.model.files import ModelFiles

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line. said: what was found. mend: what to do about it, where something is to be done."""

    level: Level
    name: str
    said: str
    mend: str | None = None


@dataclass
class Case:
    """What the checks share: where, which config file, and what earlier checks have found out."""

    root: Path
    config_path: Path
    sets: list[str]
    port: int
    config: Config | None = None
    files: ModelFiles | None = None
    to_fetch: int = 0
    gpu_bytes: int | None = None
