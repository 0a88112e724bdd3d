"""`make check`: everything that a run needs, checked before it starts, without loading a model or writing a file."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sft import files, runs
from sft.config.load import PROJECT, display_path, load, resolve_path
from sft.errors import ConfigError, SftError, one_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from sft.config.schema import Config
    from sft.model.files import ModelFiles

Level = Literal["ok", "warning", "error"]
GIB = 2**30
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)


@dataclass(frozen=True)
class Finding:
    """One line of the report. fix: what to do about it, where something is to be done."""

    level: Level
    name: str
    message: str
    fix: str | None = None


@dataclass
class CheckContext:
    """What the checks share: the project, the config file, and what earlier checks have read.

    model: the model's files, once they are known to be complete. download_bytes: of the model, if it is not here.
    gpu_bytes: memory of the first GPU.
    """

    root: Path
    config_path: Path
    sets: list[str]
    port: int
    config: Config | None = None
    model: ModelFiles | None = None
    download_bytes: int = 0
    gpu_bytes: int | None = None


def _finding(name: str, message: str, fix: str | None, level: Level = "warning") -> Finding:
    """`ok` where there is nothing to fix, else `level`."""
    return Finding(level if fix else "ok", name, message, fix)


def check_system(context: CheckContext) -> Iterator[Finding]:
    """Linux or WSL2, and a Python that the kit is tested on."""
    release, linux = platform.release(), platform.system() == "Linux"
    kind = "WSL2" if "microsoft" in release.lower() else platform.system()
    yield _finding("system", f"{kind} {release}", None if linux else "use Linux, or WSL2 on Windows", "error")
    version = sys.version_info[:2]
    fix = None if OLDEST_PYTHON <= version <= NEWEST_PYTHON else "install Python 3.10 to 3.13, then: make install"
    yield _finding("python", f"{version[0]}.{version[1]} ({sys.executable})", fix, "error")


def requirements() -> Iterator[Requirement]:
    """The lines of requirements.txt that apply to this machine."""
    from packaging.requirements import Requirement

    for line in (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text and not text.startswith("-"):
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate():
                yield requirement


def check_packages(context: CheckContext) -> Iterator[Finding]:
    """Installed versions against requirements.txt, whose lower bounds are the security floors too."""
    problems, required = [], list(requirements())
    installed = runs.versions(requirement.name for requirement in required)
    for requirement in required:
        version = installed.get(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if problems:
        yield Finding("error", "packages", "; ".join(problems), "make install")
    else:
        shown = ", ".join(f"{name} {installed[name]}" for name in ("torch", "transformers", "peft"))
        yield Finding("ok", "packages", f"{len(required)} within their bounds ({shown})")


def check_config(context: CheckContext) -> Iterator[Finding]:
    """Loads the config; every mistake in it is a finding."""
    try:
        config = load(context.config_path, context.sets, root=context.root).config
    except ConfigError as error:
        yield from (_error("config", problem) for problem in error.problems or [error])
        return
    context.config = config
    shown = display_path(context.config_path, context.root)
    yield Finding("ok", "config", f"{shown}: {config.tuning.mode} of {config.model.name} with {config.tuning.backend}")


def check_data(context: CheckContext) -> Iterator[Finding]:
    """Counts the rows that training would use and reads the first one."""
    if context.config is None:
        return
    from sft.data import shards, sources, store

    data = context.config.data
    processed = resolve_path(context.root, data.processed_dir) / "train.jsonl"
    if data.train_path is None and data.stage in ("auto", "processed") and not processed.exists():
        raw = sources.find_sources(data, context.root)[0]
        yield Finding("warning", "data", f"{raw.name} ({raw.kind}) is not processed yet", "make process")
        return
    stage = store.resolve_stage(data, context.root)
    counts = {name: shards.count(path) for name, path in stage.paths.items()}
    if not counts["train"]:
        yield Finding("error", "data", f"{display_path(stage.train, context.root)} has no rows", "make process")
        return
    if not shards.has_tokens(stage.train):
        next(iter(store.iter_rows(stage.train)))
    message = f"{stage.name} rows: {', '.join(f'{name} {rows}' for name, rows in counts.items())}"
    fix = "raise data.split.val: without validation rows no best checkpoint can be chosen"
    yield _finding("data", message, None if counts.get("val") else fix)


def check_model(context: CheckContext) -> Iterator[Finding]:
    """The model's files on this machine, or on the hub; nothing is downloaded or loaded."""
    if context.config is None:
        return
    from sft.model import files as model_files
    from sft.model import hub

    section = context.config.model
    local = hub.local_folder(section.name, context.root)
    folder = local or (None if hub.is_import(section.name) else hub.cached(section.name, section.revision))
    token_place = hub.find_token(context.root)[1]
    if folder is not None:
        try:
            config = model_files.read_config(folder, section.name)
            kind = model_files.kind_of(config, section.type, name=section.name)
            model = model_files.ModelFiles(folder, section.name, section.revision, config, kind)
            _ = model.weights  # raises ModelError where a file is missing or truncated
        except SftError:
            if local is not None or hub.offline():
                raise
            yield Finding("warning", "model", f"{section.name} is only partly in the cache", "make download-model")
            return
        context.model = model
        model.require_positions(section.max_seq_len)
        yield Finding("ok", "model", f"{section.name}: {model.size} parameters, {model.kind}, all files complete")
    elif hub.is_import(section.name):
        message = f"{section.name} is not imported yet"
        yield Finding("warning", "model", message, "make download-model (train does it too)")
    elif hub.offline():
        yield Finding(
            "error", "model", f"{section.name} is not in the cache, and HF_HUB_OFFLINE is set", "make download-model"
        )
    elif not hub.reachable(1.5):
        fix = "fix the network, or --set model.name=models/demo"
        yield Finding("error", "model", f"{section.name} is not in the cache, and the hub does not answer", fix)
    else:
        _, context.download_bytes = hub.list_files(section, context.root, timeout=1.5)
        message = f"{section.name} is on the hub: {context.download_bytes / 1e9:.2f} GB to download"
        yield Finding("warning", "model", message, "make download-model (train downloads it too)")
    message = f"from {token_place}" if token_place else "none (needed for gated and private models only)"
    yield Finding("ok", "hub token", message)


def check_template(context: CheckContext) -> Iterator[Finding]:
    """Labels can be derived, and one exchange shows question and answer and starts with the generation prompt."""
    if context.config is None or context.model is None:
        return
    from sft.generation.encoder import load_encoder

    encoder = load_encoder(context.config, context.root, files=context.model)
    row = {"user": "the-question", "assistant": "the-answer"}
    encoded, prompt = encoder.encode(row), encoder.prompt(row)
    name, fix = encoder.template.name, "look at the rows: make preview"
    if "the-question" not in encoder.tokenizer.decode(encoded.input_ids):
        yield Finding("error", "template", f"{name} never shows the question", fix)
    elif encoded.input_ids[: len(prompt)] != prompt:
        message = f"{name}: the generation prompt differs from the start of a training row"
        yield Finding("warning", "template", message, fix)
    else:
        yield Finding("ok", "template", f"{name} shows question and answer")


def check_gpu(context: CheckContext) -> Iterator[Finding]:
    """Every visible GPU: memory, precision, whether torch and the backend can use it."""
    from sft.model import hardware

    cards = hardware.gpus()
    if not cards:
        slow = context.model is not None and context.model.parameters > 2e8
        fix = "training this model here takes days; --set model.name=models/demo shows the pipeline" if slow else None
        yield _finding("gpu", "none: training on the CPU", fix)
    for card in cards:
        context.gpu_bytes = context.gpu_bytes or card.total_bytes
        memory = f"{card.free_bytes / GIB:.1f} of {card.total_bytes / GIB:.1f} GiB free"
        precision = "bf16" if card.capability >= (8, 0) else "fp16 only (no bf16)"
        busy = card.free_bytes < 0.8 * card.total_bytes
        fix = "another process uses its memory: nvidia-smi names it" if busy else None
        yield _finding("gpu", f"{card.name}, {memory}, {precision}", fix)
    if cards and "+cpu" in metadata.version("torch"):
        fix = "remove .venv and make install, which installs the CUDA build"
        yield Finding("error", "torch", "this torch is built for the CPU only, so the GPU would not be used", fix)
    if context.config is not None and context.config.tuning.backend == "unsloth":
        missing = "" if runs.versions(["unsloth"]) else "it is not installed"
        missing = missing if cards else "there is no CUDA GPU"
        message = f"unsloth falls back to bnb: {missing}" if missing else "unsloth is installed"
        yield _finding("backend", message, "make install-unsloth" if missing else None)


def check_disk(context: CheckContext) -> Iterator[Finding]:
    """Free space for checkpoints, adapter and a model still to be downloaded."""
    if context.config is None:
        return
    from sft.preflight import disk_space

    parts = disk_space.parts(context.config, context.model) if context.model else {"model": context.download_bytes}
    needed = sum(parts.values())
    free = files.free_bytes(resolve_path(context.root, context.config.train.output_dir))
    message = f"{files.format_bytes(free)} free, a run needs about {files.format_bytes(needed)}"
    fix = "free space (old runs: outputs/), or --set train.save_total_limit=1" if free < needed else None
    yield _finding("disk", message, fix, "error")


def check_outputs(context: CheckContext) -> Iterator[Finding]:
    """Write access to the folders of a run."""
    if context.config is not None:
        runs.check_place(context.config.train.output_dir, context.root)
        yield Finding("ok", "outputs", f"{context.config.train.output_dir} can be written to")


def check_memory(context: CheckContext) -> Iterator[Finding]:
    """The machine's memory; where training is on the CPU, at least the weights must fit."""
    from sft.model import hardware

    total, free = hardware.memory()
    needed = 4 * context.model.parameters if context.model and context.gpu_bytes is None else 0
    fix = "close other programs, or choose a smaller model: make plan" if needed > free else None
    yield _finding("memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free (what a run needs: make plan)", fix)


def check_port(context: CheckContext) -> Iterator[Finding]:
    """TensorBoard's port."""
    from sft.report import tensorboard

    ours = tensorboard.running(context.root / "outputs" / "tb")
    in_use = ours is None and tensorboard.port_in_use(context.port)
    message = f"port {context.port} is {'in use by another program' if in_use else 'free'}"
    fix = f"another port: TB_PORT={context.port + 1}" if in_use else None
    yield _finding("tensorboard", f"runs at {ours.address}" if ours else message, fix)


CHECKS: dict[str, Callable[[CheckContext], Iterator[Finding]]] = {
    "system": check_system,
    "packages": check_packages,
    "config": check_config,
    "data": check_data,
    "model": check_model,
    "template": check_template,
    "gpu": check_gpu,
    "disk": check_disk,
    "outputs": check_outputs,
    "memory": check_memory,
    "tensorboard": check_port,
}


def run(context: CheckContext) -> list[Finding]:
    """Every check, in order; one that fails is an error of its own and stops none of the others."""
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        try:
            findings.extend(check(context))
        except SftError as error:
            findings.append(_error(name, error))
        except Exception as error:
            fix = "this is a bug of sft-play: report it with this line"
            findings.append(Finding("error", name, f"{type(error).__name__}: {one_line(error)}", fix))
    return findings


def _error(name: str, error: SftError) -> Finding:
    return Finding("error", name, error.what + (f" ({error.where})" if error.where else ""), error.fix)
