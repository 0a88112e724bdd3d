"""Checkpoints that are whole or not there: staged beside the target, SHA-256 manifest last, renamed, then rotated.

A folder `checkpoint-<step>` holds the trained weights (safetensors), `optimizer.pt` and `rng.pt` (torch's format, read
with weights_only=True), and everything else as JSON or YAML: `scheduler.json`, `scaler.json`, `trainer_state.json`,
`session.json`, the resolved config and the stamp. No other pickle is written.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sft import files, runs
from sft.errors import EnvironmentProblem, RunError
from sft.runs import Run, step_of
from sft.training import weights

log = logging.getLogger("sft.training")
OPTIMIZER, RNG, SCHEDULER, SCALER = "optimizer.pt", "rng.pt", "scheduler.json", "scaler.json"
STATE, SESSION = "trainer_state.json", runs.SESSION


@dataclass(frozen=True)
class Keeper:
    """Where checkpoints go, how many stay besides the best, and what goes into each besides the state."""

    run: Run
    limit: int
    beside: Callable[[Path], None]  # writes the resolved config and the stamp into the staged folder


@dataclass
class Snapshot:
    """All that a resumed run needs, at a step boundary."""

    step: int
    model: Any
    optimizer: Any
    scheduler: dict[str, Any]
    rng: list[dict[str, Any]]  # one for each rank
    trainer_state: Callable[[Path], None]  # writes the trainer's own state as JSON
    session: dict[str, Any] = field(default_factory=dict)  # tokens and seconds so far, the budget in force
    scaler: dict[str, Any] | None = None


def folder_of(run: Run, step: int) -> Path:
    """The folder of the checkpoint at `step`."""
    return run.folder / f"checkpoint-{step}"


def save(keeper: Keeper, snapshot: Snapshot, best_step: int | None) -> Path:
    """Writes, verifies, then rotates. Raises EnvironmentProblem when the disk refuses; older checkpoints then stay."""
    target = folder_of(keeper.run, snapshot.step)
    try:
        with files.atomic_folder(target) as staged:
            _fill(staged, keeper, snapshot)
            files.write_manifest(staged)
    except EnvironmentProblem as error:
        older = [path.name for path in keeper.run.checkpoints()]
        raise EnvironmentProblem(
            f"{error.what}; a checkpoint takes about {needed(snapshot) / 2**20:,.1f} MiB",
            where=error.where,
            mend=f"make room and run the same command: it takes up {older[-1] if older else 'the run from its start'}",
        ) from error
    if problem := files.manifest_problem(target):
        raise RunError(f"{target.name} did not survive being written: {problem}", mend="check the disk")
    _rotate(keeper, snapshot.step, best_step)
    return target


def needed(snapshot: Snapshot) -> int:
    """Bytes of the trained weights and of what the optimizer keeps for them."""
    moments = [value for kept in snapshot.optimizer.state.values() for value in kept.values()]
    tensors = [tensor for tensor in moments if isinstance(tensor, torch.Tensor)]
    tensors += [weight for weight in snapshot.model.parameters() if weight.requires_grad]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _fill(folder: Path, keeper: Keeper, snapshot: Snapshot) -> None:
    weights.save(snapshot.model, folder)
    files.put(folder / OPTIMIZER, lambda path: torch.save(snapshot.optimizer.state_dict(), path))
    files.put(folder / RNG, lambda path: torch.save(snapshot.rng, path))
    _write(folder / SCHEDULER, snapshot.scheduler)
    if snapshot.scaler is not None:
        _write(folder / SCALER, snapshot.scaler)
    _write(folder / SESSION, snapshot.session)
    files.put(folder / STATE, snapshot.trainer_state)
    keeper.beside(folder)


def _write(path: Path, value: dict[str, Any]) -> None:
    files.put(path, json.dumps(value, indent=1) + "\n")


def read(checkpoint: Path, name: str) -> Any:
    """One of the checkpoint's state files, as it was saved."""
    if name.endswith(".pt"):
        return torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    return json.loads((checkpoint / name).read_text(encoding="utf-8"))


def take_up(checkpoint: Path, optimizer: Any, scheduler: Any, learning_rate: float) -> None:
    """Puts both back as they were saved; rate and weight decay are those of now, which differ only if that was allowed.

    scheduler: a LambdaLR, as all that the config offers are.
    """
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    optimizer.load_state_dict(read(checkpoint, OPTIMIZER))
    scheduler.load_state_dict(read(checkpoint, SCHEDULER))
    scheduler.base_lrs = [learning_rate] * len(decays)
    was = [group["lr"] for group in optimizer.param_groups]
    now = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    if now != was:
        log.warning("the learning rate jumps from %.3g to %.3g: the plan of before had another", was[0], now[0])
    for group, rate, decay in zip(optimizer.param_groups, now, decays, strict=True):
        group.update(lr=rate, initial_lr=learning_rate, weight_decay=decay)
    scheduler._last_lr = now


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and every visible GPU's generator, as numbers and tensors: no pickle."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random(saved: dict[str, Any]) -> None:
    """Puts the generators back to a state that `random_state` gave."""
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.device_count() == len(saved["cuda"]):
        torch.cuda.set_rng_state_all(saved["cuda"])


def set_aside(run: Run, step: int) -> None:
    """Gives checkpoints of later steps another name: they belong to a past that is being left."""
    for path in run.checkpoints():
        if step_of(path) > step:
            aside = path.with_name(f"set-aside-{path.name}")
            files.remove(aside)
            files.rename(path, aside)
            log.info("%s belongs to a past that is left behind: kept as %s", path.name, aside.name)


def _rotate(keeper: Keeper, step: int, best_step: int | None) -> None:
    """Removes the oldest checkpoints up to this step; never the best one, nor one of a later step."""
    names = {f"checkpoint-{best_step}", f"checkpoint-{step}"}
    mine = [path for path in keeper.run.checkpoints() if int(path.name.split("-")[1]) <= step]
    for path in mine[: -keeper.limit]:
        if path.name not in names:
            try:
                files.remove(path)
            except EnvironmentProblem as error:
                log.warning("%s is no longer needed, but could not be removed: %s", path.name, error.what)
