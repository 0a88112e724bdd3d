"""Which model a command is about: the newest run's, a named adapter, merged weights, or the base; and its settings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sft import runs
from sft.config.load import load
from sft.config.paths import resolve
from sft.config.schema import Config
from sft.errors import ModelError, RunError
from sft.runs import RESOLVED, Run

log = logging.getLogger("sft.generation")


@dataclass(frozen=True)
class Target:
    """What to open. config: the run's own, with today's `eval` and `generation` settings.

    adapter, merged: the tuned side; neither for a base alone. run: the run that it belongs to, if there is one.
    """

    config: Config
    run: Run | None
    adapter: Path | None = None
    merged: Path | None = None

    @property
    def tuned(self) -> bool:
        return self.adapter is not None or self.merged is not None

    @property
    def folder(self) -> Path | None:
        """Where the tuned side lies."""
        return self.adapter or self.merged

    @property
    def name(self) -> str:
        """What results are filed under."""
        if self.run is not None:
            return self.run.name
        return self.folder.name if self.folder is not None else "base"


def choose(
    config: Path,
    sets: Sequence[str],
    *,
    adapters: Path | None = None,
    merged: Path | None = None,
    base: bool = False,
    is_default: bool = False,
    root: Path,
) -> Target:
    """Nothing named: the newest run. `base` alone: the newest run's base, or that of `config` before any run.

    config: the file of --config; its `eval` and `generation` win over the run's where it was named by hand or is the
    run's own (same train.output_dir); `sets` win over all. Raises RunError, ModelError, ConfigError.
    """
    if adapters is not None and merged is not None:
        raise ModelError("--adapters and --merged name two models", mend="give one of them")
    if adapters is not None:
        return _named(config, sets, _adapter_folder(adapters), "adapter", is_default, root)
    if merged is not None:
        return _named(config, sets, _model_folder(merged), "merged", is_default, root)
    if not (root / "outputs" / "last").is_dir():
        if base:
            return Target(load(config, sets, root=root).config, None)
        raise RunError(
            "there is no trained model yet", where=str(root / "outputs" / "last"), mend="make train, or --base"
        )
    run = runs.last_run(root)
    settings = _settings(config, sets, run.folder, is_default, root)
    if run.adapter_dir.is_dir():
        return Target(settings, run, adapter=run.adapter_dir)
    if run.model_dir.is_dir():
        return Target(settings, run, merged=run.model_dir)
    if base:
        return Target(settings, run)
    raise RunError(
        f"the run {run.name} left neither an adapter nor a model", where=str(run.folder), mend="make train, or --base"
    )


def _named(config: Path, sets: Sequence[str], folder: Path, side: str, is_default: bool, root: Path) -> Target:
    home = next((place for place in (folder, folder.parent) if (place / RESOLVED).is_file()), None)
    if home is None:
        log.warning("%s has no %s: its base and template are taken from %s", folder, RESOLVED, config)
        return Target(load(config, sets, root=root).config, None, **{side: folder})
    settings = _settings(config, sets, home, is_default, root)
    return Target(settings, _run_of(folder, settings, root), **{side: folder})


def _run_of(folder: Path, settings: Config, root: Path) -> Run | None:
    """The run that left its adapter or its whole model in `folder`; None for a copy, or a folder from elsewhere.

    Runs of one `train.output_dir` are numbered, so the run has the folder's name (outputs/X-2 left adapters/X-2).
    """
    here = resolve(root, settings.train.output_dir)
    run = runs.at(folder.parent if folder.name == "model" else here.with_name(folder.name), root)
    own = folder in (run.adapter_dir.resolve(), run.model_dir.resolve())
    return run if own and run.folder.is_dir() else None


def _settings(config: Path, sets: Sequence[str], home: Path, is_default: bool, root: Path) -> Config:
    """The run's resolved config under --set, with the sections about answers taken from --config where it speaks."""
    resolved = load(home / RESOLVED, sets, root=root).config
    if is_default and not config.is_file():
        return resolved
    asked = load(config, sets, root=root)
    same = _stem(asked.config.train.output_dir, home.name) or _stem(
        asked.config.train.output_dir, Path(resolved.train.output_dir).name
    )
    if is_default and not same:
        return resolved
    update = {section: getattr(asked.config, section) for section in ("eval", "generation") if asked.given(section)}
    return resolved.model_copy(update=update)


def _stem(output_dir: str, run: str) -> bool:
    name = Path(output_dir).name
    return run == name or (run.startswith(name + "-") and run[len(name) + 1 :].isdigit())


def _adapter_folder(path: Path) -> Path:
    folder = path.expanduser().resolve()
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"there is no adapter in {path}" if folder.is_dir() else f"the adapter folder {path} is not there",
            where="--adapters",
            mend="name a folder that train wrote, such as adapters/last; make train makes one",
        )
    return folder


def _model_folder(path: Path) -> Path:
    folder = path.expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"there is no model in {path}" if folder.is_dir() else f"the model folder {path} is not there",
            where="--merged",
            mend="name a folder that merge_lora wrote: make merge",
        )
    return folder
