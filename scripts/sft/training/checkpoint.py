"""Checkpoints: what a resumed run needs, written so that a folder is either complete or absent.

A checkpoint holds the trained weights (safetensors), the optimizer, the learning-rate schedule, the random state of
every rank, the loop's progress, the resolved config and the fingerprint of the run's settings. It is written to a
staged folder, synced, listed in its manifest and renamed; only then are older checkpoints removed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sft import files, runs
from sft.config.schema import LoraSection
from sft.errors import EnvironmentProblem, RunError, one_line
from sft.model import adapters, shard
from sft.runs import Run, step_of
from sft.step.step import out_of_memory, release_memory
from sft.training import distributed

log = logging.getLogger("sft.training")
OPTIMIZER, RNG, SCHEDULER, SCALER = "optimizer.pt", "rng.pt", "scheduler.json", "scaler.json"
OPTIMIZER_PARTS = "optimizer"  # the folder in the place of optimizer.pt where the weights are sharded
PROGRESS, FINGERPRINT, REHEARSAL = "trainer_state.json", runs.FINGERPRINT, "rehearsal.json"
OLD_SESSION = "session.json"  # the second half of the progress in checkpoints of earlier versions


@dataclass
class Progress:
    """How far a run has come, as trainer_state.json; the first six keys are those of transformers' Trainer.

    log_history: every logged entry, with its step. best_global_step, best_metric: of the best evaluation so far.
    tokens, labelled, seconds: of all training steps, over all ranks. skipped: the steps that `on_nan: skip` dropped.
    last_loss, unlogged: of the last step; the sum since the last log entry, and the step of that entry.
    measures: of preference pairs, summed since then.
    asked_budget, budget, evaluating: how steps are split into micro-batches: as configured, now, and in evaluation.
    checkpointing, kernels: whether activations are recomputed, and the kernels in use.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    best_global_step: int | None = None
    best_metric: float | None = None
    log_history: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    labelled: int = 0
    seconds: float = 0.0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    last_loss: float = 0.0
    unlogged: tuple[float, int] = (0.0, 0)
    measures: list[float] = field(default_factory=list)
    asked_budget: list[Any] = field(default_factory=list)
    budget: list[Any] = field(default_factory=list)
    evaluating: int | None = None
    checkpointing: bool = False
    kernels: str = "plain"

    @classmethod
    def read(cls, checkpoint: Path) -> Progress:
        """The progress in a checkpoint; keys that only transformers' Trainer writes are ignored."""
        stored = {**files.read_json(checkpoint / OLD_SESSION), **read_state(checkpoint, PROGRESS)}
        return cls(**{each.name: stored[each.name] for each in fields(cls) if each.name in stored})


@dataclass(frozen=True)
class CheckpointManager:
    """Writes a run's checkpoints and keeps the newest `limit` of them, besides the best.

    write_settings: writes the resolved config and the run's fingerprint into a folder.
    """

    run: Run
    limit: int
    write_settings: Callable[[Path], None]

    def folder(self, step: int) -> Path:
        """The folder of the checkpoint at `step`."""
        return self.run.folder / f"checkpoint-{step}"

    def save(
        self,
        model: Any,
        progress: Progress,
        states: Mapping[str, Any],
        weights: Mapping[str, Any] | None = None,
        parts: Path | None = None,
    ) -> Path:
        """Writes a checkpoint, once more if memory runs out meanwhile, then removes old ones.

        states: for each state file what it holds. weights: `whole_state`, parts: of `save_parts`, where the weights are
        sharded. Raises EnvironmentProblem when the disk refuses; older checkpoints then stay.
        """
        try:
            return self._save(model, progress, states, weights, parts)
        except (EnvironmentProblem, RuntimeError, MemoryError) as error:
            if parts is not None or not (out_of_memory(error) or out_of_memory(error.__cause__)):
                raise
        release_memory()
        log.warning("out of memory while saving: trying once more")
        return self._save(model, progress, states, weights, parts)

    def save_parts(self, model: Any, optimizer: Any, step: int) -> Path:
        """Every rank writes its part of the optimizer's state into a folder that `save` then takes into the checkpoint.

        Raises EnvironmentProblem on every rank when the disk refuses one.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_saver import save

        target = self.run.folder / f"{OPTIMIZER_PARTS}-{step}"
        folder = Path(distributed.on_rank0(lambda: str(files.beside(target, "part"))))
        if (engine := shard.engine_of(model)) is not None:
            engine.save(folder)
            return folder
        try:
            save({OPTIMIZER_PARTS: get_optimizer_state_dict(model, optimizer.optimizer)}, checkpoint_id=folder)
        except CheckpointException as error:
            rank, failure = next(iter(error.failures.items()))
            what = f"the optimizer's state could not be written on rank {rank}: {one_line(failure[0], 200)}"
            fix = "free disk space and run the same command: it resumes from the newest checkpoint"
            raise EnvironmentProblem(what, where=str(self.folder(step)), fix=fix) from error
        return folder

    def _save(
        self,
        model: Any,
        progress: Progress,
        states: Mapping[str, Any],
        weights: Mapping[str, Any] | None,
        parts: Path | None,
    ) -> Path:
        target = self.folder(progress.global_step)
        try:
            with files.atomic_folder(target) as staged:
                save_weights(model, staged, weights)
                if parts is not None:
                    files.rename(parts, staged / OPTIMIZER_PARTS)
                for name, state in {**states, PROGRESS: asdict(progress)}.items():
                    as_json = json.dumps(state, indent=1) + "\n" if name.endswith(".json") else None
                    files.put(staged / name, as_json or partial(torch.save, state))
                self.write_settings(staged)
                files.write_manifest(staged)
        except EnvironmentProblem as error:
            older = [path.name for path in self.run.checkpoints()]
            resumes_from = older[-1] if older else "the start of the run"
            fix = f"free disk space and run the same command: it resumes from {resumes_from}"
            raise EnvironmentProblem(error.what, where=error.where, fix=fix) from error
        if problem := files.manifest_problem(target, hashes=False):
            raise RunError(f"{target.name} was not written completely: {problem}", fix="check the disk")
        self._remove_old(progress)
        return target

    def _remove_old(self, progress: Progress) -> None:
        """Removes the oldest checkpoints up to this step; never the best one, nor one of a later step."""
        keep = {self.folder(progress.best_global_step or 0), self.folder(progress.global_step)}
        past = [path for path in self.run.checkpoints() if step_of(path) <= progress.global_step]
        for path in past[: -self.limit]:
            if path not in keep:
                try:
                    files.remove(path)
                except EnvironmentProblem as error:
                    log.warning("%s is no longer needed but could not be removed: %s", path.name, error.what)

    def archive_newer(self, step: int) -> None:
        """Renames checkpoints of later steps than the one that is resumed."""
        for path in self.run.checkpoints():
            if step_of(path) > step:
                archived = path.with_name(f"set-aside-{path.name}")
                files.remove(archived)
                files.rename(path, archived)
                log.info("%s is newer than the checkpoint being resumed; renamed to %s", path.name, archived.name)


def read_state(checkpoint: Path, name: str) -> Any:
    """One of the checkpoint's state files."""
    if name.endswith(".pt"):
        return torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    return json.loads((checkpoint / name).read_text(encoding="utf-8"))


def is_adapter(model: torch.nn.Module) -> bool:
    """Whether only an adapter of this model is trained."""
    return hasattr(model, "peft_config")


def save_weights(model: Any, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Writes the trained weights into `folder`: the adapter with its config, or the whole model.

    state: `whole_state`, where the weights are sharded.
    """
    if is_adapter(model):
        files.put(folder, lambda to: adapters.save(model, to, state))
    else:
        files.put(folder, partial(model.save_pretrained, state_dict=state))


def load_weights(model: Any, folder: Path) -> None:
    """Loads what `save_weights` wrote into the model, bit for bit. Raises RunError if the names differ.

    From DeepSpeed's part of the checkpoint in `folder`, with the optimizer's state, where its engine trains the model.
    """
    if (engine := shard.engine_of(model)) is not None:
        engine.load(folder / OPTIMIZER_PARTS)
        return
    with shard.loading_whole(model):
        _load_weights(model, folder)


def _load_weights(model: Any, folder: Path) -> None:
    if is_adapter(model):
        missing, unexpected = adapters.restore(model, folder)
    else:
        parts = [load_file(part) for part in sorted(folder.glob("model*.safetensors"))]
        state = {name: tensor for part in parts for name, tensor in part.items()}
        result = model.load_state_dict(state, strict=False)
        loaded = {id(parameter) for name, parameter in model.named_parameters() if name in state}
        tied = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in loaded}
        missing, unexpected = [name for name in result.missing_keys if name not in tied], result.unexpected_keys
    if wrong := [*missing, *unexpected]:
        raise RunError(
            f"the weights in {folder.name} do not fit this model: {len(wrong)} names differ, such as {wrong[0]}",
            where=str(folder),
            fix="start a new run: --resume never",
        )


def restore_optimizer(checkpoint: Path, optimizer: Any, scheduler: Any, model: Any = None) -> None:
    """Loads the state of both. Each parameter group keeps the peak rate and weight decay of the current config.

    These differ from the stored ones only where --allow-change accepted that. model: needed for a state that was
    written in parts.
    """
    decays, base_rates = [group["weight_decay"] for group in optimizer.param_groups], list(scheduler.base_lrs)
    parts = checkpoint / OPTIMIZER_PARTS
    if parts.is_dir() and shard.engine_of(model) is None:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        inner = getattr(optimizer, "optimizer", optimizer)
        state = {OPTIMIZER_PARTS: get_optimizer_state_dict(model, inner)}
        load(state, checkpoint_id=parts)
        set_optimizer_state_dict(model, inner, state[OPTIMIZER_PARTS])
    elif not parts.is_dir():
        optimizer.load_state_dict(read_state(checkpoint, OPTIMIZER))
    scheduler.load_state_dict(read_state(checkpoint, SCHEDULER))
    scheduler.base_lrs = base_rates
    stored = [group["lr"] for group in optimizer.param_groups]
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, base_rate, factor, decay in zip(optimizer.param_groups, base_rates, factors, decays, strict=True):
        group.update(lr=base_rate * factor, initial_lr=base_rate, weight_decay=decay)
    rates = [group["lr"] for group in optimizer.param_groups]
    if rates != stored:
        log.warning("the learning rate changes from %.3g to %.3g, as the settings do", stored[0], rates[0])


def random_state() -> dict[str, Any]:
    """The states of torch's generators, of the CPU and of every visible GPU: nothing else draws while training."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(saved: dict[str, Any]) -> None:
    """Restores what `random_state` returned; warns where the GPUs are not those of then."""
    torch.set_rng_state(saved["torch"])
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, state in enumerate(saved["cuda"][:visible]):
        torch.cuda.set_rng_state(state, device)
    if visible != len(saved["cuda"]):
        log.warning(
            "the checkpoint was written with %d visible GPUs, now there are %d: dropout may draw other numbers from"
            " here on, so the result may differ in its last bits",
            len(saved["cuda"]),
            visible,
        )


CONSEQUENCES = {
    "data": "some rows may be trained twice this epoch and others skipped",
    "seed": "the order of rows changes from here on",
    "effective_batch": "the epoch continues at the row that this many steps of the new size reach",
    "template": "the rows trained on so far were formatted differently",
    "weights": "the adapter was trained on other weights",
    "max_seq_len": "other rows may be dropped or truncated",
    "labels": "other tokens are trained on from here on",
    "rehearsal": "other rehearsal rows are mixed in from here on",
    **dict.fromkeys(
        ("total_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
        "the learning rate jumps to that of the new schedule",
    ),
}
OF_OLD_RUNS: dict[str, Any] = {  # keys that runs of earlier versions lack
    "objective": "response", "rehearsal": "off", "normalize": "tokens", "z_loss": 0.0, "weight_field": None,
    "min_lr_ratio": 0.0, "decay_ratio": None,
    "adapter": "lora", "adapter_path": None, "freeze": [], "neftune_alpha": None, "ewc": "off",
    "preference": None, "sharding": "off",
}  # fmt: skip
NEVER_ALLOWED = {
    "backend", "mode", "kind", "base_model", "precision", "lora", "optim", "freeze", "adapter", "ewc", "sharding",
}  # fmt: skip


def check_fingerprint(folder: Path, fingerprint: dict[str, Any], allowed: Iterable[str] = ()) -> list[str]:
    """Compares with the fingerprint in `folder`; returns the changes that `allowed` accepts, as text.

    Raises RunError with every other difference (was, is). NEVER_ALLOWED changes cannot be accepted: the weights would
    not fit, or would mean something else.
    """
    try:
        stored = {**OF_OLD_RUNS, **json.loads((folder / FINGERPRINT).read_text(encoding="utf-8"))}
        if stored.get("lora"):  # keys that are newer than the run had their default
            stored["lora"] = {**LoraSection().model_dump(), **stored["lora"]}
    except (OSError, ValueError) as error:
        what = f"{FINGERPRINT} cannot be read ({type(error).__name__}), so its settings are unknown"
        raise RunError(what, where=str(folder / FINGERPRINT), fix="start a new run: --resume never") from None
    current = json.loads(json.dumps(fingerprint, default=str))
    changed = [key for key in sorted({*stored, *current}) if stored.get(key) != current.get(key)]
    lines = {key: _change(key, stored.get(key), current.get(key)) for key in changed}
    refused = [key for key in changed if key in NEVER_ALLOWED or key not in set(allowed)]
    if not refused:
        return [line + (f" ({CONSEQUENCES[key]})" if key in CONSEQUENCES else "") for key, line in lines.items()]
    fix = "start a new run (--resume never), or restore these settings"
    if not {*refused} - {"world_size", "sharding"}:
        shard = {"off": "ddp", "fsdp": "fsdp"}.get(stored["sharding"], "deepspeed")
        same = f" --nproc {stored['world_size']} --shard {shard}" if stored["world_size"] > 1 else ""
        fix = f"python scripts/train.py --run {folder.parent.name}{same}; or start a new run: --resume never"
    if not NEVER_ALLOWED & set(refused):
        fix += "; or accept the change: " + " ".join(f"--allow-change {key}" for key in refused)
    raise RunError(
        "this run was started with other settings, so it cannot be resumed:\n"
        + "\n".join(f"  {lines[key]}" for key in refused),
        where=str(folder / FINGERPRINT),
        fix=fix,
    )


def _change(key: str, was: Any, now: Any) -> str:
    """What a user reads about a changed setting; what is stored as a hash is named instead."""
    if isinstance(was, dict) and isinstance(now, dict):
        names = sorted(name for name in {*was, *now} if was.get(name) != now.get(name))
        if key == "data":
            return f"data: your rows have changed ({', '.join(names)})"
        return "; ".join(f"{key}.{name}: was {was.get(name)}, is {now.get(name)}" for name in names)
    if key == "rehearsal":
        was, now = (value if value == "off" else f"{value['rows']} questions" for value in (was, now))
    if key in ("template", "weights"):
        return f"{key}: the {'chat template' if key == 'template' else 'files of the base model'} changed"
    source = {
        "total_steps": "train.epochs, train.max_steps and the rows",
        "warmup_steps": "train.warmup_ratio, train.warmup_steps and the steps",
    }
    return f"{key}: was {was}, is {now}" + (f" (from {source[key]})" if key in source else "")
