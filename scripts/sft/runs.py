"""Run folders: their names, what resuming takes up, the finished marker, and the links to the newest one.

A run is `outputs/<name>`, its adapter `adapters/<name>`, its curves `outputs/tb/<name>`. Nothing here loads a model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import files
from sft.config import load
from sft.credentials import redact
from sft.errors import ConfigError, EnvironmentProblem, RunError

if TYPE_CHECKING:
    from sft.config.schema import Config

RESOLVED, FINISHED, LOCK, PAUSE, SAVE = "config.resolved.yaml", "finished.json", "lock", "pause", "save"
SESSION = "session.json"  # of a checkpoint: counts so far, and the step of the best one
_FIX = "choose another: --set train.output_dir=outputs/NAME, or fix its permissions"
_RESERVED = {"tb", "last", ""}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Run:
    """One run's places."""

    name: str
    folder: Path
    adapter_dir: Path
    tb_dir: Path

    @property
    def model_dir(self) -> Path:
        """Where a full fine-tune leaves its weights."""
        return self.folder / "model"

    @property
    def finished(self) -> bool:
        return (self.folder / FINISHED).is_file()

    def checkpoints(self) -> list[Path]:
        """Its checkpoint folders, oldest step first, valid or not."""
        found = [path for path in self.folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
        return sorted((path for path in found if path.is_dir()), key=step_of)


@dataclass(frozen=True)
class OpenRun:
    """What a training command is to do: the run, the checkpoint to take up (None: from the start), and why."""

    run: Run
    checkpoint: Path | None
    said: str


def at(folder: Path, root: Path) -> Run:
    """The run whose folder is `folder`."""
    return Run(folder.name, folder, root / "adapters" / folder.name, root / "outputs" / "tb" / folder.name)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    found = _CHECKPOINT.fullmatch(checkpoint.name)
    if not found:
        raise RunError(f"{checkpoint} is no checkpoint folder", fix="name a run's folder or its checkpoint-<step>")
    return int(found[1])


def open_run(output_dir: str, root: Path, resume: str) -> OpenRun:
    """Chooses the run and the checkpoint; writes nothing.

    resume: "auto" takes up the newest of <run>, <run>-2, ... if it is unfinished, else takes the next name; "never"
    takes the next free name; anything else is a run's or a checkpoint's folder. Raises RunError, ConfigError.
    """
    base = load.resolve_path(root, output_dir)
    if base.name in _RESERVED:
        what = f"train.output_dir ends in {base.name!r}, which sft-play needs itself"
        raise ConfigError(what, fix="--set train.output_dir=outputs/NAME")
    if resume not in {"auto", "never"}:
        return _take_up_path(Path(resume), root)
    numbers = _series(base)
    if not numbers:
        return OpenRun(at(base, root), None, f"a new run: {load.display_path(base, root)}")
    newest, following = at(_nth(base, numbers[-1]), root), at(_nth(base, numbers[-1] + 1), root)
    shown = load.display_path(following.folder, root)
    if resume == "never":
        return OpenRun(following, None, f"a new run, as --resume never asks: {shown}")
    if newest.finished:
        return OpenRun(following, None, f"{newest.name} is finished, so this is a new run: {shown}")
    return _take_up(newest, root)


def _take_up(run: Run, root: Path) -> OpenRun:
    checkpoint, passed_over = newest_checkpoint(run)
    shown = load.display_path(run.folder, root)
    if checkpoint is None:
        if not any(run.folder.iterdir()):
            return OpenRun(run, None, f"a new run: {shown}")
        return OpenRun(run, None, f"{shown} was begun but has no checkpoint yet: it starts again from the beginning")
    notes = "".join(f"\npassed over {path.name}: {reason}" for path, reason in passed_over)
    return OpenRun(run, checkpoint, f"taking up {shown} at {checkpoint.name}{notes}")


def _take_up_path(path: Path, root: Path) -> OpenRun:
    path = path.expanduser().absolute()
    if not path.is_dir():
        raise RunError(f"--resume names {path}, which is not there", fix="--resume auto, or list them: ls outputs")
    path = path.resolve()
    is_checkpoint = _CHECKPOINT.fullmatch(path.name) is not None
    run = at(path.parent if is_checkpoint else path, root)
    if run.finished:
        raise RunError(f"{run.name} is finished: there is nothing to resume", fix="leave out --resume for a new run")
    if not is_checkpoint:
        return _take_up(run, root)
    if problem := files.manifest_problem(path):
        raise RunError(f"{path.name} cannot be used: {problem}", where=str(path), fix="--resume auto takes a good one")
    return OpenRun(run, path, f"taking up {load.display_path(run.folder, root)} at {path.name}, as --resume asks")


def newest_checkpoint(run: Run) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose manifest holds, and those passed over for it with the reason.

    One whose best checkpoint is damaged is passed over for an older one that makes the best again; it is taken all the
    same where there is none. Raises RunError if there are checkpoints and none is whole: never a silent fresh start.
    """
    passed_over: list[tuple[Path, str]] = []
    without_best: tuple[Path, list[tuple[Path, str]]] | None = None
    for path in reversed(run.checkpoints()):
        problem = files.manifest_problem(path)
        if not problem:
            problem = _lost_best(path)
            if not problem:
                return path, passed_over
            without_best = without_best or (path, list(passed_over))
        passed_over.append((path, problem))
    if passed_over and not without_best:
        told = "; ".join(f"{path.name}: {why}" for path, why in passed_over)
        fix = "--resume never starts a new run; the old folder stays as it is"
        raise RunError(f"none of {run.name}'s checkpoints is whole: {told}", where=str(run.folder), fix=fix)
    return without_best or (None, passed_over)


def _lost_best(checkpoint: Path) -> str | None:
    """Why the best checkpoint up to this whole one, which the run is to end with, cannot be used; None if it can."""
    best = json.loads((checkpoint / SESSION).read_text(encoding="utf-8")).get("best")
    if best in (None, step_of(checkpoint)):
        return None
    folder = checkpoint.with_name(f"checkpoint-{best}")
    problem = files.manifest_problem(folder)
    return f"the best one until then, {folder.name}, is to be made again ({problem})" if problem else None


def _nth(base: Path, number: int) -> Path:
    return base if number == 1 else base.with_name(f"{base.name}-{number}")


def _series(base: Path) -> list[int]:
    """The numbers of the runs named after `base` that exist: 1 is `base` itself."""
    pattern = re.compile(re.escape(base.name) + r"-(\d+)")
    found = [int(hit[1]) for path in base.parent.glob("*") if (hit := pattern.fullmatch(path.name)) and path.is_dir()]
    return sorted({number for number in found if number > 1} | ({1} if base.is_dir() else set()))


def check_place(output_dir: str, root: Path) -> None:
    """Raises RunError where a run could not be written, before anything is read or made; ConfigError as `resolve`."""
    for folder in (load.resolve_path(root, output_dir), root / "adapters"):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = "read-only" if there.is_dir() else "a file"
            raise RunError(f"{folder} cannot be written to ({there} is {why})", where="train.output_dir", fix=_FIX)


def make_folders(run: Run) -> None:
    """Makes the run's folder and adapters/, and proves that both can be written to; raises RunError."""
    for folder in (run.folder, run.adapter_dir.parent):
        try:
            files.make_folder(folder)
            probe = folder / f".{run.name}.{os.getpid()}.part"  # swept, should it be left behind
            files.put(probe, "")
            files.remove(probe)
        except (OSError, EnvironmentProblem) as error:
            why = getattr(error, "strerror", None) or error
            what = f"{folder} cannot be written to ({why})"
            raise RunError(what, where="train.output_dir", fix=_FIX) from None


def write_resolved(folder: Path, config: Config) -> None:
    """Puts the resolved config into `folder`, so that whoever uses it later need not restate anything."""
    from sft.config.load import dump_config

    files.write_text(folder / RESOLVED, redact(dump_config(config)))


def run_of_adapter(folder: Path) -> Config:
    """The resolved config beside an adapter, a full model or in a run's folder. Raises RunError if there is none."""
    from sft.config.load import read_resolved

    for place in (folder, folder.parent):
        if (place / RESOLVED).is_file():
            return read_resolved(place / RESOLVED)
    what = f"{folder} holds no {RESOLVED}, so its base model and template are unknown"
    raise RunError(what, fix="name a folder that `train` wrote, such as adapters/last")


def finish(run: Run, summary: dict[str, Any]) -> None:
    """Marks the run as finished."""
    files.write_json(run.folder / FINISHED, summary)


def point_last(run: Run, root: Path) -> None:
    """Makes outputs/last, and adapters/last where there is an adapter, point to this run."""
    files.point(root / "outputs" / "last", run.folder)
    if run.adapter_dir.is_dir():
        files.point(root / "adapters" / "last", run.adapter_dir)


def last_run(root: Path) -> Run:
    """The newest finished run. Raises RunError if there is none yet."""
    link = root / "outputs" / "last"
    if not link.is_dir():
        raise RunError("no run has finished yet", where=str(link), fix="make train")
    return at(link.resolve(), root)


def running(root: Path) -> list[Run]:
    """The runs under outputs/ whose lock a living process holds."""
    return [at(path.parent, root) for path in sorted((root / "outputs").glob(f"*/{LOCK}")) if files.locked(path)]


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of the packages among `names` that are installed."""
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
