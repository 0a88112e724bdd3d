"""The weights that training changes, to and from safetensors: an adapter's, or the whole model's."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from sft import files, runs
from sft.errors import EnvironmentProblem, RunError
from sft.model import adapters
from sft.runs import Run, step_of


def is_adapter(model: torch.nn.Module) -> bool:
    """True for a model whose adapter alone is trained."""
    return hasattr(model, "peft_config")


def save_weights(model: Any, folder: Path) -> None:
    """Writes the trained weights into `folder`: the adapter with its config, or the model as transformers keeps it."""
    files.put(folder, (lambda to: adapters.save(model, to)) if is_adapter(model) else model.save_pretrained)


def load_weights(model: Any, folder: Path) -> None:
    """Puts the weights that `save` wrote into the model in place, bit for bit. Raises RunError if they do not fit."""
    if is_adapter(model):
        from peft import set_peft_model_state_dict

        result = set_peft_model_state_dict(model, load_file(folder / adapters.WEIGHTS))
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        missing = [name for name in result.missing_keys if name in trained]
    else:
        parts = sorted(folder.glob("model*.safetensors"))
        state = {name: tensor for part in parts for name, tensor in load_file(part).items()}
        result = model.load_state_dict(state, strict=False)
        kept = {id(parameter) for name, parameter in model.named_parameters() if name in state}
        tied = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in kept}
        missing = [name for name in result.missing_keys if name not in tied]
    if missing or result.unexpected_keys:
        wrong = [*missing, *result.unexpected_keys]
        raise RunError(
            f"the weights in {folder.name} do not fit this model: {len(wrong)} names differ, such as {wrong[0]}",
            where=str(folder),
            fix="--resume never starts a new run",
        )


STAMP = "backend.json"
FOLLOWS = {
    "data": "rows that were learnt may come again, others not in this epoch",
    "seed": "the order of rows is another from here on",
    "effective_batch": "the epoch goes on at the row that this many steps of the new size reach",
    "world_size": "dropout draws other numbers",
    "template": "what was learnt so far was written otherwise",
    "weights": "the adapter was made for other weights",
    "revision": "the adapter goes on over that revision's weights",
    "max_seq_len": "other rows may be left out, or cut otherwise",
    "labels": "other tokens are learnt from here on",
    "total_steps": "the rate jumps to where the new plan has it",
    "learning_rate": "the rate jumps to where the new plan has it",
    "lr_scheduler_type": "the rate jumps to where the new plan has it",
    "warmup_steps": "the rate jumps to where the new plan has it",
    "weight_decay": "it holds from the next step",
    "max_grad_norm": "it holds from the next step",
    "label_smoothing": "it holds from the next step, and losses before and after do not compare",
}
FIXED = {"backend", "mode", "kind", "base_model", "precision", "lora", "optim"}


def write_fingerprint(folder: Path, stamp: dict[str, Any]) -> None:
    """Records the stamp in a run's or a checkpoint's folder."""
    files.write_json(folder / STAMP, stamp)


def check_fingerprint(folder: Path, stamp: dict[str, Any], allowed: Iterable[str] = ()) -> list[str]:
    """Compares with the stamp in `folder`; returns the changes that `allowed` accepts, as text.

    Raises RunError with every other difference (was, is). A change of what is FIXED can never be accepted: the
    weights would not fit, or would be others.
    """
    try:
        old = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{STAMP} cannot be read ({type(error).__name__}), so nobody knows what the checkpoint belongs to",
            where=str(folder / STAMP),
            fix="--resume never starts a new run",
        ) from None
    new = json.loads(json.dumps(stamp, default=str))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    lines = {key: f"{key}: was {old.get(key)}, is {new.get(key)}" for key in changed}
    refused = [key for key in changed if key in FIXED or key not in set(allowed)]
    if not refused:
        return [line + (f" ({FOLLOWS[key]})" if key in FOLLOWS else "") for key, line in lines.items()]
    fix = "--resume never starts a new run; or set them back"
    if not FIXED & set(refused):
        fix += "; or accept what follows: " + " ".join(f"--allow-change {key}" for key in refused)
    raise RunError(
        "this run was started with other settings, so it cannot be taken up:\n"
        + "\n".join(f"  {lines[key]}" for key in refused),
        where=str(folder / STAMP),
        fix=fix,
    )


log = logging.getLogger("sft.training")
OPTIMIZER, RNG, SCHEDULER, SCALER = "optimizer.pt", "rng.pt", "scheduler.json", "scaler.json"
STATE, SESSION = "trainer_state.json", runs.SESSION


@dataclass(frozen=True)
class CheckpointManager:
    """Where checkpoints go, how many stay besides the best, and what goes into each besides the state."""

    run: Run
    limit: int
    beside: Callable[[Path], None]  # writes the resolved config and the stamp into the staged folder


@dataclass
class TrainState:
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


def save_checkpoint(keeper: CheckpointManager, snapshot: TrainState, best_step: int | None) -> Path:
    """Writes, verifies, then rotates. Raises EnvironmentProblem when the disk refuses; older checkpoints then stay."""
    target = folder_of(keeper.run, snapshot.step)
    try:
        with files.atomic_folder(target) as staged:
            _fill(staged, keeper, snapshot)
            files.write_manifest(staged)
    except EnvironmentProblem as error:
        older = [path.name for path in keeper.run.checkpoints()]
        raise EnvironmentProblem(
            f"{error.what}; a checkpoint takes about {checkpoint_bytes(snapshot) / 2**20:,.1f} MiB",
            where=error.where,
            fix=f"make room and run the same command: it takes up {older[-1] if older else 'the run from its start'}",
        ) from error
    if problem := files.manifest_problem(target):
        raise RunError(f"{target.name} did not survive being written: {problem}", fix="check the disk")
    _rotate(keeper, snapshot.step, best_step)
    return target


def checkpoint_bytes(snapshot: TrainState) -> int:
    """Bytes of the trained weights and of what the optimizer keeps for them."""
    moments = [value for kept in snapshot.optimizer.state.values() for value in kept.values()]
    tensors = [tensor for tensor in moments if isinstance(tensor, torch.Tensor)]
    tensors += [weight for weight in snapshot.model.parameters() if weight.requires_grad]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _fill(folder: Path, keeper: CheckpointManager, snapshot: TrainState) -> None:
    save_weights(snapshot.model, folder)
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


def read_state(checkpoint: Path, name: str) -> Any:
    """One of the checkpoint's state files, as it was saved."""
    if name.endswith(".pt"):
        return torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    return json.loads((checkpoint / name).read_text(encoding="utf-8"))


def restore_optimizer(checkpoint: Path, optimizer: Any, scheduler: Any, learning_rate: float) -> None:
    """Puts both back as they were saved; rate and weight decay are those of now, which differ only if that was allowed.

    scheduler: a LambdaLR, as all that the config offers are.
    """
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    optimizer.load_state_dict(read_state(checkpoint, OPTIMIZER))
    scheduler.load_state_dict(read_state(checkpoint, SCHEDULER))
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


def archive_newer(run: Run, step: int) -> None:
    """Gives checkpoints of later steps another name: they belong to a past that is being left."""
    for path in run.checkpoints():
        if step_of(path) > step:
            aside = path.with_name(f"set-aside-{path.name}")
            files.remove(aside)
            files.rename(path, aside)
            log.info("%s belongs to a past that is left behind: kept as %s", path.name, aside.name)


def _rotate(keeper: CheckpointManager, step: int, best_step: int | None) -> None:
    """Removes the oldest checkpoints up to this step; never the best one, nor one of a later step."""
    names = {f"checkpoint-{best_step}", f"checkpoint-{step}"}
    mine = [path for path in keeper.run.checkpoints() if int(path.name.split("-")[1]) <= step]
    for path in mine[: -keeper.limit]:
        if path.name not in names:
            try:
                files.remove(path)
            except EnvironmentProblem as error:
                log.warning("%s is no longer needed, but could not be removed: %s", path.name, error.what)
