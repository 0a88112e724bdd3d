"""What the quick start decides: which model, which data, and the `configs/local.yaml` that keeps both."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from sft import files
from sft.data.readers import SUFFIXES, is_data_file, plain_name
from sft.errors import DataError

DEMO = "models/demo"
SAMPLE = "data/samples/support_desk.jsonl"
LOCAL = "configs/local.yaml"


@dataclass(frozen=True)
class Choice:
    """A model to train, and why this one."""

    name: str
    reason: str

    @property
    def demo(self) -> bool:
        """Whether it is the shipped demo model."""
        return self.name == DEMO


def choices(gpu: str | None, gib: float, hub: bool, fitting: list[str]) -> list[Choice]:
    """Models to offer, the default first: what fits the card, then the demo model.

    gpu: the card's name or None; gib: its memory; hub: whether it can be reached; fitting: hub names, largest first.
    """
    demo_reason = "no GPU was found" if gpu is None else "the model hub cannot be reached" if not hub else "quick try"
    demo = Choice(DEMO, f"the shipped demo model ({demo_reason}): proves the pipeline, knows nothing")
    if gpu is None or not hub or not fitting:
        return [demo]
    return [*(Choice(name, f"fits {gpu} ({gib:.0f} GiB) in 4-bit") for name in fitting), demo]


def raw_data(root: Path) -> tuple[Path, str]:
    """The raw file to use and a word about it; copies the shipped samples where data/raw is empty.

    Raises DataError where data/raw holds several files and none has a default name.
    """
    folder = root / "data" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    yours = sorted(path for path in folder.iterdir() if path.is_file() and is_data_file(path))
    raw = [path for path in yours if plain_name(path).stem.lower() == "raw"]
    if raw:
        kinds = [*SUFFIXES, ""]
        return min(raw, key=lambda path: kinds.index(plain_name(path).suffix.lower())), "yours"
    if len(yours) > 1:
        names = ", ".join(path.name for path in yours)
        raise DataError(
            f"data/raw holds several files: {names}",
            where=str(folder),
            fix="rename the one to use to raw with its own ending: raw.jsonl, raw.csv, raw.jsonl.gz",
        )
    if yours:
        return yours[0], "yours"
    shutil.copyfile(root / SAMPLE, folder / "raw.jsonl")
    return folder / "raw.jsonl", f"data/raw was empty: copied {SAMPLE}"


def write_local(root: Path, choice: Choice, raw: Path) -> Path | None:
    """Writes configs/local.yaml, which every command then takes by default. Returns where an older one was kept."""
    path, kept = root / LOCAL, None
    include = "configs/demo_cpu.yaml" if choice.demo else "configs/run_bnb.yaml"
    text = (
        f"# Written by workflows/quick_start.sh on {time.strftime('%Y-%m-%d')}; every command takes it by default.\n"
        f"# Edit it freely, or delete it to go back to configs/run_bnb.yaml. Every key: docs/CONFIG.md\n"
        f"include: {include}\n\n"
        f"model:\n  name: {choice.name}\n\n"
        f"data:\n  raw_path: {raw.relative_to(root)}\n\n"
        f"train:\n  output_dir: outputs/quick-start\n"
    )
    if path.exists():
        old = path.read_text(encoding="utf-8")
        if old.splitlines()[1:] != text.splitlines()[1:]:
            kept = path.with_name(f"local.yaml.{time.strftime('%Y%m%d-%H%M%S')}.bak")
            files.write_text(kept, old)
    files.write_text(path, text)
    return kept
