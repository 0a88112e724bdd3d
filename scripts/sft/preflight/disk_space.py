"""Room on the disk for all that a run writes, asked for before a weight is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

from sft import files as disk
from sft.config.schema import Config
from sft.errors import EnvironmentProblem
from sft.model.files import ModelFiles, tensors
from sft.runs import Run

LOGS = 32 * 2**20  # log.jsonl, event files, ledger, settings
_TABLES = ("embed", "wte", "wpe", "shared", "lm_head")  # 2-D tensors that "all-linear" leaves alone


def trained(config: Config, files: ModelFiles) -> int:
    """Numbers that training changes: all of a model, or r * (rows + columns) of every linear layer."""
    if config.tuning.mode == "full":
        return files.parameters
    shapes = {name: entry["shape"] for path in files.weights for name, entry in tensors(path).items()}
    sides = [sum(s) for name, s in shapes.items() if len(s) == 2 and not any(table in name for table in _TABLES)]
    return int(config.tuning.lora.r * sum(sides))


def parts(config: Config, files: ModelFiles) -> dict[str, int]:
    """Bytes of each thing that stays on the disk at the worst moment: while a checkpoint is written beside the others.

    A checkpoint is the trained weights and AdamW's two moments in float32 (8-bit optimizers: a byte a moment).
    """
    train, numbers = config.train, trained(config, files)
    beside = sum(path.stat().st_size for path in files.path.glob("*") if "token" in path.name or "vocab" in path.name)
    checkpoint = numbers * (4 + (2 if "8bit" in train.optim else 8)) + 2**20
    kept = train.save_total_limit if train.save_strategy != "no" else 0
    best = train.load_best_model_at_end and train.eval_strategy != "no"
    merged = files.parameters * 2 if train.merge_at_end and config.tuning.mode != "full" else 0
    return {
        "checkpoints": checkpoint * (kept + 1),
        "best checkpoint": checkpoint if best else 0,
        "model" if config.tuning.mode == "full" else "adapter": numbers * 4 + beside,
        "merged model": merged,
        "logs": LOGS,
    }


def require_disk_space(config: Config, files: ModelFiles, run: Run) -> dict[str, int]:
    """The parts of what is needed, less the run's older checkpoints. Raises EnvironmentProblem where it is not free.

    An adapter folder on another disk than the run's is asked for there.
    """
    needed = parts(config, files)
    there = sum(disk.size(path) for path in run.checkpoints()) if run.folder.is_dir() else 0
    needed["checkpoints"] = max(0, needed["checkpoints"] - there)
    places = {existing(run.folder): sum(needed.values())}
    adapters = existing(run.adapter_dir)
    if "adapter" in needed and adapters.stat().st_dev != existing(run.folder).stat().st_dev:
        places = {existing(run.folder): sum(needed.values()) - needed["adapter"], adapters: needed["adapter"]}
    for place, need in places.items():
        if need > (free := shutil.disk_usage(place).free):
            items = ", ".join(f"{name} {in_words(size)}" for name, size in needed.items() if size)
            raise EnvironmentProblem(
                f"the run needs about {in_words(need)} on that disk, {in_words(free)} are free ({items})",
                where=str(place),
                fix="make room (old runs: outputs/), --set train.save_total_limit=1, or another train.output_dir",
            )
    return needed


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def in_words(size: int) -> str:
    """Bytes as MiB, or GiB from one on."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
