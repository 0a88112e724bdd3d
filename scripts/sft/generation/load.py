"""Which model answers, and with what settings: the newest run's, a named adapter, merged weights, or a base alone."""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sft import runs
from sft.config.load import load, resolve_path
from sft.config.schema import Config
from sft.data import rows as records
from sft.data import store
from sft.errors import ModelError, RunError, SftError
from sft.generation.encoder import load_encoder
from sft.generation.engine import LoadedModel, Progress, warn_truncated
from sft.generation.stop import Answer
from sft.model import adapters, hardware, hub
from sft.model import load as model_load
from sft.runs import RESOLVED, SERVING, Run
from sft.step import attention

log = logging.getLogger("sft.generation")
BYTES_16_BIT = 2.4  # memory a parameter: 16-bit weights and a fifth for keys, values and activations
LowMemory = Literal["4bit", "cpu"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What to open. config: the run's own, with the `eval` and `generation` settings of today.

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
        """The folder of the tuned side."""
        return self.adapter or self.merged

    @property
    def name(self) -> str:
        """The name under which results are filed."""
        if self.run is not None:
            return self.run.name
        return self.folder.name if self.folder is not None else "base"


def resolve_model(
    config: Path,
    sets: Sequence[str],
    *,
    adapters: Path | None = None,
    merged: Path | None = None,
    base: bool = False,
    is_default: bool = False,
    root: Path,
) -> Target:
    """The model of the flags, else the newest run's. `base` alone: the newest run's base; before any run, `config`'s.

    config: the file of --config; its `eval` and `generation` replace the run's where it was named by hand (not
    `is_default`) or has the run's train.output_dir; `sets` win over all. Raises RunError, ModelError, ConfigError.
    """
    if adapters is not None and merged is not None:
        raise ModelError("--adapters and --merged name two models", fix="give one of them")
    if adapters is not None:
        return _target_of(adapters, "--adapters", config, sets, is_default, root)
    if merged is not None:
        return _target_of(merged, "--merged", config, sets, is_default, root)
    last = root / "outputs" / "last"
    if not last.is_dir():
        if base:
            return Target(load(config, sets, root=root).config, None)
        what, fix = "there is no trained model yet", "make train; the base alone: make infer BASE=1"
        raise RunError(what, where=str(last), fix=fix)
    run = runs.last_run(root)
    settings = _settings(config, sets, run.folder, is_default, root)
    shown = f"{settings.model.name}, the base of {run.name}" if base else run.name
    log.info("model: %s, the newest finished run (another one: --run NAME)", shown)
    if run.adapter_dir.is_dir():
        return Target(settings, run, adapter=run.adapter_dir)
    if run.model_dir.is_dir():
        return Target(settings, run, merged=run.model_dir)
    if not base:
        what = f"the run {run.name} left neither an adapter nor a model"
        raise RunError(what, where=str(run.folder), fix="make train; the base alone: make infer BASE=1")
    return Target(settings, run)


def _target_of(path: Path, flag: str, config: Path, sets: Sequence[str], is_default: bool, root: Path) -> Target:
    """The adapter or model in the flag's folder, its settings and its run. Raises ModelError for another folder."""
    folder, adapted = path.expanduser().resolve(), flag == "--adapters"
    what, file, command = (
        ("adapter", "adapter_config.json", "make train") if adapted else ("model", "config.json", "make merge")
    )
    if not (folder / file).is_file():
        problem = f"there is no {what} in {path}" if folder.is_dir() else f"there is no {what} folder {path}"
        raise ModelError(problem, where=flag, fix=f"name a folder that has {file}; {command} writes one")
    home = next((place for place in (folder, folder.parent) if (place / RESOLVED).is_file()), None)
    if home is None:
        log.warning("%s has no %s: its base and template are taken from %s", folder, RESOLVED, config)
        settings, run = load(config, sets, root=root).config, None
    else:
        settings = _settings(config, sets, home, is_default, root)
        run = _run_of(folder, settings, root)
    return Target(settings, run, adapter=folder if adapted else None, merged=None if adapted else folder)


def _run_of(folder: Path, settings: Config, root: Path) -> Run | None:
    """The run that left its adapter or its whole model in `folder`; None for a copy, or a folder from elsewhere.

    Runs of one `train.output_dir` are numbered, so the run has the folder's name (outputs/X-2 left adapters/X-2).
    """
    output_dir = resolve_path(root, settings.train.output_dir)
    run = runs.at(folder.parent if folder.name == "model" else output_dir.with_name(folder.name), root)
    own = folder in (run.adapter_dir.resolve(), run.model_dir.resolve())
    return run if own and run.folder.is_dir() else None


def _settings(config: Path, sets: Sequence[str], home: Path, is_default: bool, root: Path) -> Config:
    """The resolved config in `home` under --set; its `eval` and `generation` from --config where that has them."""
    resolved = load(home / RESOLVED, sets, root=root).config
    if is_default and not config.is_file():
        return resolved
    current = load(config, sets, root=root)
    series = re.compile(re.escape(Path(current.config.train.output_dir).name) + r"(-\d+)?")
    if is_default and not any(map(series.fullmatch, (home.name, Path(resolved.train.output_dir).name))):
        return resolved
    update = {name: getattr(current.config, name) for name in ("eval", "generation") if current.is_set(name)}
    return resolved.model_copy(update=update)


def system_text(config: Config, folder: Path | None, root: Path) -> str | None:
    """The system text to answer with: the one that all training rows shared, else `data.system_prompt`, else None.

    folder: the adapter or model, with SERVING in it or beside it; without, the training rows are read where they are.
    """
    for place in (folder, folder.parent) if folder else ():
        if (place / SERVING).is_file():
            try:
                text = json.loads((place / SERVING).read_text(encoding="utf-8")).get("system")
            except (ValueError, AttributeError):
                raise ModelError(f"{place / SERVING} is not a JSON object", fix="delete it, or train again") from None
            return text if isinstance(text, str) and text else config.data.system_prompt
    shared = None
    if folder is not None:
        with suppress(SftError, OSError):
            shared = records.shared_system_text(store.iter_rows(store.resolve_stage(config.data, root).train))
    return shared or config.data.system_prompt


def answer_all(
    loaded: LoadedModel, rows: Sequence[Row | None], config: Config, on_progress: Progress | None = None
) -> list[Answer | None]:
    """An answer to each row (in the form that the encoder takes), None for None."""
    prompts = {index: loaded.prompt(row, config.generation) for index, row in enumerate(rows) if row is not None}
    warn_truncated([removed for _, removed in prompts.values()], "turns")
    settings, batch_size = config.generation, config.eval.batch_size
    answers = loaded.generate([ids for ids, _ in prompts.values()], settings, batch_size, on_progress)
    warn_truncated([answer.truncated for answer in answers], "tokens")
    by_index = dict(zip(prompts, answers, strict=True))
    return [by_index.get(index) for index in range(len(rows))]


def open_sides(target: Target, sides: Sequence[str], root: Path) -> Iterator[tuple[str, LoadedModel]]:
    """Each of the sides ("tuned", "base") with its model, one after the other.

    With an adapter one load serves both: the base is the same model with the adapter off.
    """
    if target.adapter is None and len(sides) == 2:
        for side in sides:
            yield from open_sides(target, [side], root)
        return
    adapter, merged = (None, None) if list(sides) == ["base"] else (target.adapter, target.merged)
    loaded = open_model(target.config, adapter=adapter, merged=merged, root=root)
    for side in sides:
        with loaded.base_only() if side == "base" else nullcontext():
            yield side, loaded
    del loaded
    gc.collect()


def open_model(
    config: Config,
    *,
    adapter: Path | None = None,
    merged: Path | None = None,
    root: Path,
    dtype: torch.dtype | None = None,
    low_memory: LowMemory | None = None,
) -> LoadedModel:
    """The tuned model (`adapter` on its base, or the whole weights in `merged`), or the base without either.

    config: the run's resolved one. A 4-bit run is opened in 4 bits, its base alone too; merged weights as they are.
    dtype: of the weights; None: the run's on a GPU; on the CPU fp32, or bf16 where fp32 would not fit.
    low_memory: where 16-bit weights do not fit into the device's free memory, load them in 4 bits ("4bit") or on the
    CPU ("cpu"), and warn. None is "4bit" for merged weights, which may belong to a run that was trained in 4 bits;
    other weights are then loaded as they were trained.
    Raises ModelError (no model, the adapter is another base's), TemplateError, EnvironmentProblem.
    """
    card = hardware.choose(config.model.device_map)
    section = config.model if merged is None else config.model.model_copy(update={"name": str(merged.absolute())})
    device = model_load.placement(section.device_map, card.device)
    free = card.free_bytes if device.startswith(card.device) else hardware.memory()[1]
    files = hub.find(section, root, weights=True)
    saved = adapter if adapter is not None and (adapter / "tokenizer_config.json").is_file() else None
    encoder = load_encoder(config, root, files=files, tokenizer=saved)
    tuning, quantise = config.tuning, merged is None and config.tuning.mode == "qlora"
    low_memory = low_memory or ("4bit" if merged is not None else None)
    if low_memory and not quantise and BYTES_16_BIT * files.parameters > free:
        if low_memory == "4bit":
            log.warning(
                "%s does not fit into the free memory in 16 bits: it is loaded in 4 bits, which changes its answers"
                " a little (--set model.device_map=cpu keeps 16 bits)",
                files.name,
            )
            tuning, quantise = tuning.model_copy(update={"mode": "qlora"}), True
        elif device != "cpu":
            log.warning("%s does not fit into the GPU's free memory in 16 bits: it is loaded on the CPU", files.name)
            section, device = section.model_copy(update={"device_map": "cpu"}), "cpu"
            free = hardware.memory()[1]
    if dtype is None and device.startswith("cuda"):
        half = torch.float16 if config.train.fp16 is True or not card.bf16 else torch.bfloat16
        dtype = torch.float32 if config.train.bf16 is False and config.train.fp16 is False else half
    elif dtype is None:
        dtype = torch.float32 if quantise or 4 * files.parameters < 0.6 * free else torch.bfloat16
    model: Any = model_load.load_base(
        files, section, tuning, dtype, device=device, train=False, quantise=quantise,
        attention=attention.choose(device, files.config),
    )  # fmt: skip
    if adapter is not None:
        model = adapters.load(model, adapter)
    name = str(adapter or merged or files.name)
    return LoadedModel(model.eval(), encoder.tokenizer, encoder, files.kind, name)
