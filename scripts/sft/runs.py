"""Run folders: their names, which run and checkpoint `--resume` means, the finished marker, links to the newest run.

A run is `outputs/<name>`, its adapter `adapters/<name>`, its curves `outputs/tb/<name>`. Nothing here loads a model.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import files
from sft.config.load import display_path, dump_config, load, resolve_path
from sft.errors import ConfigError, RunError, Stopped, nearest, one_line, redact

if TYPE_CHECKING:
    from sft.config.schema import Config

MODEL_CONFIG = "config.json"  # of a model's folder: merged weights lie in outputs/ too, with a RESOLVED, and are no run
SETTINGS, RESOLVED, FINISHED = "config.yaml", "config.resolved.yaml", "finished.json"
LOCK, PAUSE, SAVE = "lock", "pause", "save"
STATUS = "status.json"  # what the run's process is doing: phase, pid, step, the last figures, when it was written
FINGERPRINT = "backend.json"  # of a run and a checkpoint: the settings that its weights depend on
SERVING = "serving.json"  # of an adapter or model: {"system": the system text that all training rows share}
_RESERVED = {"tb", "wandb", "mlflow", "trackio", "last", ""}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Run:
    """The folders of one run."""

    name: str
    folder: Path
    adapter_dir: Path
    tb_dir: Path

    @property
    def model_dir(self) -> Path:
        """Where full tuning writes its weights."""
        return self.folder / "model"

    @property
    def finished(self) -> bool:
        return (self.folder / FINISHED).is_file()

    @property
    def settings(self) -> Path:
        """The config that it was started with, `auto` values included: resolved ones may split a step differently."""
        path = self.folder / SETTINGS
        return path if path.is_file() else self.folder / RESOLVED

    def last_trained(self) -> float:
        """When it logged a step, or else when it began."""
        return max(path.stat().st_mtime for path in self.folder.glob("*") if path.name in (RESOLVED, "log.jsonl"))

    def checkpoints(self) -> list[Path]:
        """Its checkpoint folders, oldest step first, valid or not."""
        paths = [path for path in self.folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
        return sorted((path for path in paths if path.is_dir()), key=step_of)


@dataclass(frozen=True)
class OpenRun:
    """The run to train, the checkpoint to resume from (None: start at step 0), and a sentence that says why."""

    run: Run
    checkpoint: Path | None
    message: str


def at(folder: Path, root: Path) -> Run:
    """The run whose folder is `folder`."""
    return Run(folder.name, folder, root / "adapters" / folder.name, root / "outputs" / "tb" / folder.name)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    if not match:
        raise RunError(f"{checkpoint} is not a checkpoint folder", fix="name a run's folder or its checkpoint-<step>")
    return int(match[1])


# --- which run and which checkpoint


def open_run(output_dir: str, root: Path, resume: str) -> OpenRun:
    """Chooses the run and the checkpoint; writes nothing.

    resume: "auto" resumes the newest of <run>, <run>-2, ... if it is unfinished, else starts the next one; "newest"
    only resumes; "never" only starts; else it is a run's or a checkpoint's folder. Raises RunError, ConfigError.
    """
    base = resolve_path(root, output_dir)
    if base.name in _RESERVED:
        what = f"train.output_dir ends in {base.name!r}, which is a reserved name"
        raise ConfigError(what, where="train.output_dir", fix="--set train.output_dir=outputs/NAME")
    if resume not in {"auto", "never", "newest"}:
        return _resume_path(Path(resume), root)
    numbers = _series(base)
    if resume == "newest" and not (numbers and not at(_nth(base, numbers[-1]), root).finished):
        raise RunError(f"no run of {display_path(base, root)} is unfinished", fix="make train starts a new one")
    if not numbers:
        return OpenRun(at(base, root), None, f"a new run: {display_path(base, root)}")
    newest, following = (at(_nth(base, number), root) for number in (numbers[-1], numbers[-1] + 1))
    shown = display_path(following.folder, root)
    if resume == "never":
        return OpenRun(following, None, f"a new run (--resume never): {shown}")
    if newest.finished:
        return OpenRun(following, None, f"{newest.name} is finished, so this is a new run: {shown}")
    return _resume(newest, root)


def _resume(run: Run, root: Path) -> OpenRun:
    checkpoint, skipped = newest_checkpoint(run)
    shown = display_path(run.folder, root)
    if checkpoint is None:
        if not any(run.folder.iterdir()):
            return OpenRun(run, None, f"a new run: {shown}")
        return OpenRun(run, None, f"{shown} was started but has no checkpoint yet: it starts again at step 0")
    notes = "".join(f"\nskipped {path.name}: {reason}" for path, reason in skipped)
    return OpenRun(run, checkpoint, f"resuming {shown} at {checkpoint.name}{notes}")


def _resume_path(path: Path, root: Path) -> OpenRun:
    path = path.expanduser().absolute()
    if not path.is_dir():
        what = f"there is no run or checkpoint folder {display_path(path, root)} to resume"
        raise RunError(what, fix="--resume auto, --resume never, or a folder: ls outputs")
    path = path.resolve()
    is_checkpoint = _CHECKPOINT.fullmatch(path.name) is not None
    run = at(path.parent if is_checkpoint else path, root)
    if run.finished:
        raise RunError(f"{run.name} is finished: there is nothing to resume", fix="make train starts a new run")
    if not is_checkpoint:
        return _resume(run, root)
    if problem := files.manifest_problem(path):
        raise RunError(f"{path.name} cannot be used: {problem}", where=str(path), fix="--resume auto uses a valid one")
    return OpenRun(run, path, f"resuming {display_path(run.folder, root)} at {path.name} (--resume)")


def newest_checkpoint(run: Run) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest valid checkpoint, and the newer ones that were skipped, each with the reason.

    Raises RunError if there are checkpoints and all are damaged: never a silent restart.
    """
    skipped: list[tuple[Path, str]] = []
    for path in reversed(run.checkpoints()):
        problem = files.manifest_problem(path)
        if not problem:
            return path, skipped
        skipped.append((path, problem))
    if skipped:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped)
        fix = "start a new run beside it: --resume never"
        raise RunError(f"all checkpoints of {run.name} are damaged: {reasons}", where=str(run.folder), fix=fix)
    return None, []


def _nth(base: Path, number: int) -> Path:
    return base if number == 1 else base.with_name(f"{base.name}-{number}")


def _series(base: Path) -> list[int]:
    """The numbers of the existing runs named after `base`, ascending: 1 is `base` itself."""
    pattern = re.compile(re.escape(base.name) + r"-(\d+)")
    matches = [match for path in base.parent.glob("*") if (match := pattern.fullmatch(path.name)) and path.is_dir()]
    return sorted({int(match[1]) for match in matches if int(match[1]) > 1} | ({1} if base.is_dir() else set()))


def last_run(root: Path) -> Run:
    """The newest finished run. Raises RunError if there is none yet."""
    link = root / "outputs" / "last"
    if not link.is_dir():
        raise RunError("no run has finished yet", where=str(link), fix="make train")
    return at(link.resolve(), root)


def running(root: Path) -> list[Run]:
    """The runs under outputs/ whose lock a living process holds."""
    return [at(path.parent, root) for path in sorted((root / "outputs").glob(f"*/{LOCK}")) if files.is_locked(path)]


def named(name: str, root: Path) -> Run:
    """The run called `name` (or named by its folder). Raises RunError, with the existing names, if there is none."""
    run = at(Path(name).resolve() if Path(name).is_dir() else root / "outputs" / name, root)
    if (run.folder / RESOLVED).is_file() and not (run.folder / MODEL_CONFIG).exists():
        return run
    names = [each.name for each in newest_first(root)]
    close = nearest(name, names)
    fix = f"did you mean {close}?" if close else f"choose one: {', '.join(names)}" if names else "make train"
    raise RunError(f"there is no run called {name}", where=str(run.folder), fix=fix)


def newest_first(root: Path) -> list[Run]:
    """The runs under outputs/, the one that trained last first."""
    folders = {path.parent.resolve() for path in (root / "outputs").glob(f"*/{RESOLVED}")}
    folders = {folder for folder in folders if not (folder / MODEL_CONFIG).exists()}
    return sorted((at(folder, root) for folder in folders), key=Run.last_trained, reverse=True)


def unfinished(root: Path) -> Run:
    """The newest run that has not finished. Raises RunError if there is none: nothing is started."""
    for run in newest_first(root):
        if not run.finished:
            return run
    raise RunError("there is no unfinished run to resume", where=str(root / "outputs"), fix="make train")


# --- what a run writes


def check_place(output_dir: str, root: Path) -> None:
    """Raises, before any work, RunError if a run cannot be written there, ConfigError if the folder is no run's."""
    folder = resolve_path(root, output_dir)
    contents = {path.name.partition("-")[0] for path in folder.glob("*")} if folder.is_dir() else set()
    if root.is_relative_to(folder) or (
        contents and (MODEL_CONFIG in contents or not contents & {RESOLVED, FINISHED, LOCK, "checkpoint", "log.jsonl"})
    ):
        what = f"train.output_dir is {output_dir}, a folder that holds other things than a run"
        raise ConfigError(what, where="train.output_dir", fix="--set train.output_dir=outputs/NAME")
    for folder in (resolve_path(root, output_dir), root / "adapters"):
        place = files.existing(folder)
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            what = f"{folder} cannot be written to ({place} is {'read-only' if place.is_dir() else 'a file'})"
            fix = "choose another: --set train.output_dir=outputs/NAME, or fix its permissions"
            raise RunError(what, where="train.output_dir", fix=fix)


def write_resolved(folder: Path, config: Config, name: str = RESOLVED) -> None:
    """Writes the resolved config into `folder`, where eval, infer, merge and export read it."""
    files.write_text(folder / name, redact(dump_config(config)))


def run_of_adapter(folder: Path) -> Config:
    """The resolved config of an adapter, a full model or a run's folder. Raises RunError if there is none."""
    for place in (folder, folder.parent):
        if (place / RESOLVED).is_file():
            return load(place / RESOLVED, root=Path.cwd()).config
    what = f"{folder} holds no {RESOLVED}, so its base model and template are unknown"
    raise RunError(what, fix="name a folder that `train` wrote, such as adapters/last")


def update_status(folder: Path, **values: object) -> None:
    """Merges `values` into the status.json of a run's folder. Not flushed, and a disk that refuses it stops no run."""
    path = folder / STATUS
    staged = files.beside(path, "part")
    with suppress(OSError):
        staged.write_text(json.dumps({**files.read_json(path), **values, "updated": time.time()}), encoding="utf-8")
        staged.replace(path)


@contextmanager
def reporting(run: Run, model: str) -> Iterator[None]:
    """Writes into status.json that this process works on the run, and at the end of the block how that ended.

    The environment may name the job (SFT_JOB) that the server started the process for.
    """
    job, gpu = os.environ.get("SFT_JOB"), os.environ.get("CUDA_VISIBLE_DEVICES")
    update_status(run.folder, phase="starting", pid=os.getpid(), job=job, gpu=gpu, error=None, model=model)
    try:
        yield
    except (Stopped, KeyboardInterrupt) as stop:
        update_status(run.folder, phase="stopped", error=one_line(stop) or None)
        raise
    except BaseException as error:
        update_status(run.folder, phase="failed", error=one_line(error))
        raise
    update_status(run.folder, phase="completed" if run.finished else "stopped")


def point_last(run: Run, root: Path) -> None:
    """Makes outputs/last, and adapters/last where there is an adapter, point to this run."""
    files.point(root / "outputs" / "last", run.folder)
    if run.adapter_dir.is_dir():
        files.point(root / "adapters" / "last", run.adapter_dir)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log.jsonl, without lines that a crash left incomplete; none if there is no such file."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        with suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)]


def versions(names: Iterable[str]) -> dict[str, str]:
    """The version of each installed package among `names`."""
    installed = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed
