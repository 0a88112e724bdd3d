"""`make check`: everything that a run needs, checked before it starts, without loading a model or writing a file."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sft import files, runs
from sft.config.load import PROJECT, display_path, load, resolve_path
from sft.errors import ConfigError, SftError, TemplateError, one_line

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


def check_system(context: CheckContext) -> Iterator[Finding]:
    """Linux or WSL2, and a Python that the kit is tested on."""
    release = platform.release()
    kind = "WSL2" if "microsoft" in release.lower() else platform.system()
    supported = platform.system() == "Linux"
    fix = None if supported else "use Linux, or WSL2 on Windows"
    yield Finding("ok" if supported else "error", "system", f"{kind} {release}", fix)
    version = sys.version_info[:2]
    supported = OLDEST_PYTHON <= version <= NEWEST_PYTHON
    fix = None if supported else "install Python 3.10 to 3.13, make install"
    yield Finding("ok" if supported else "error", "python", f"{version[0]}.{version[1]} ({sys.executable})", fix)


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
    from sft.data import sources, store

    data = context.config.data
    processed = resolve_path(context.root, data.processed_dir) / "train.jsonl"
    if data.train_path is None and data.stage in ("auto", "processed") and not processed.exists():
        raw = sources.find_sources(data, context.root)[0]
        yield Finding("warning", "data", f"{raw.name} ({raw.kind}) is not processed yet", "make process")
        return
    stage = store.resolve_stage(data, context.root)
    splits = (("train", stage.train), ("val", stage.val), ("test", stage.test))
    counts = {name: store.count_rows(path) for name, path in splits if path is not None}
    if not counts["train"]:
        yield Finding("error", "data", f"{display_path(stage.train, context.root)} has no rows", "make process")
        return
    next(iter(store.iter_rows(stage.train)))
    message = f"{stage.name} rows: {', '.join(f'{name} {rows}' for name, rows in counts.items())}"
    if counts.get("val"):
        yield Finding("ok", "data", message)
    else:
        fix = "raise data.split.val: without validation rows no best checkpoint can be chosen"
        yield Finding("warning", "data", message, fix)


def check_model(context: CheckContext) -> Iterator[Finding]:
    """The model's files on this machine, or on the hub; nothing is downloaded or loaded."""
    if context.config is None:
        return
    from sft.model import files as model_files
    from sft.model import hub

    section = context.config.model
    local = hub.local_folder(section.name, context.root)
    folder = local or hub.cached(section.name, section.revision)
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
        yield Finding("ok", "model", f"{section.name}: {model.size} parameters, {model.kind}, all files complete")
    elif hub.offline():
        yield Finding(
            "error", "model", f"{section.name} is not in the cache, and HF_HUB_OFFLINE is set", "make download-model"
        )
    elif not hub.reachable(1.5):
        fix = "fix the network, or --set model.name=models/demo"
        yield Finding("error", "model", f"{section.name} is not in the cache, and the hub does not answer", fix)
    else:
        context.download_bytes = hub.list_files(section, context.root, timeout=1.5).bytes
        message = f"{section.name} is on the hub: {context.download_bytes / 1e9:.2f} GB to download"
        yield Finding("warning", "model", message, "make download-model (train downloads it too)")
    message = f"from {token_place}" if token_place else "none (needed for gated and private models only)"
    yield Finding("ok", "hub token", message)


def check_template(context: CheckContext) -> Iterator[Finding]:
    """Renders one exchange: it must show question and answer, and start with the generation prompt."""
    if context.config is None or context.model is None:
        return
    from sft.chat.template import load_template
    from sft.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(context.model, trust_remote_code=context.config.model.trust_remote_code)
    template = load_template(context.config.data, tokenizer, context.root)
    question, answer = "the-question", "the-answer"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = template.render(messages)
    for part, content in (("answer", answer), ("question", question)):
        if content not in text:
            what = f"the template never shows the {part}"
            raise TemplateError(what, where=template.name, fix="make preview shows what it renders")
    prompt = template.render(messages[:1], add_generation_prompt=True)
    if answer in prompt or not text.startswith(prompt.rstrip()):
        message = f"{template.name}: the generation prompt differs from the start of a training row"
        yield Finding("warning", "template", message, "make preview shows both")
    else:
        yield Finding("ok", "template", f"{template.name} shows question and answer")


def check_gpu(context: CheckContext) -> Iterator[Finding]:
    """Every visible GPU: memory, precision, whether torch and the backend can use it."""
    from sft.model import hardware

    cards = hardware.gpus()
    if not cards:
        slow = context.model is not None and context.model.parameters > 2e8
        fix = "training this model here takes days; --set model.name=models/demo shows the pipeline" if slow else None
        yield Finding("warning" if slow else "ok", "gpu", "none: training on the CPU", fix)
    for card in cards:
        context.gpu_bytes = context.gpu_bytes or card.total_bytes
        busy = card.free_bytes < 0.8 * card.total_bytes
        precision = "bf16" if card.capability >= (8, 0) else "fp16 only (no bf16)"
        memory = f"{card.free_bytes / GIB:.1f} of {card.total_bytes / GIB:.1f} GiB free"
        fix = "another process uses its memory: nvidia-smi names it" if busy else None
        yield Finding("warning" if busy else "ok", "gpu", f"{card.name}, {memory}, {precision}", fix)
    if cards and "+cpu" in metadata.version("torch"):
        fix = "remove .venv and make install, which installs the CUDA build"
        yield Finding("error", "torch", "this torch is built for the CPU only, so the GPU would not be used", fix)
    if context.config is not None and context.config.tuning.backend == "unsloth":
        if cards and importlib.util.find_spec("unsloth") is not None:
            yield Finding("ok", "backend", f"unsloth {metadata.version('unsloth')}")
        else:
            missing = "it is not installed" if cards else "there is no CUDA GPU"
            yield Finding("warning", "backend", f"unsloth falls back to bnb: {missing}", "make install-unsloth")


def check_disk(context: CheckContext) -> Iterator[Finding]:
    """Free space for checkpoints, adapter and a model still to be downloaded; write access to the output folders."""
    if context.config is None:
        return
    from sft.preflight import disk_space

    run = runs.at(resolve_path(context.root, context.config.train.output_dir), context.root)
    if context.model is None:
        needed = context.download_bytes + 2 * GIB
    else:
        needed = sum(disk_space.parts(context.config, context.model).values())
    free = files.free_bytes(run.folder)
    message = f"{files.format_bytes(free)} free, a run needs about {files.format_bytes(needed)}"
    fix = "free space (old runs: outputs/), or --set train.save_total_limit=1" if free < needed else None
    yield Finding("error" if free < needed else "ok", "disk", message, fix)
    try:
        runs.check_place(context.config.train.output_dir, context.root)
        yield Finding("ok", "outputs", f"{display_path(run.folder, context.root)} can be written to")
    except SftError as error:
        yield _error("outputs", error)


def check_memory(context: CheckContext) -> Iterator[Finding]:
    """The machine's memory against a rough need: the libraries, and on a CPU the weights."""
    from sft.memory import estimate
    from sft.model import hardware

    total, free = hardware.memory()
    message = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if context.model is None or context.config is None:
        yield Finding("ok", "memory", message)
        return
    device = "cpu" if context.gpu_bytes is None else "cuda"
    needed = estimate.ram_needed(context.model.parameters, context.config.tuning.mode, device)
    message += f", a run needs {needed:.1f} for libraries{' and weights' if device == 'cpu' else ''}"
    short = needed * GIB > free
    fix = "close other programs, or choose a smaller model (make plan)" if short else None
    yield Finding("warning" if short else "ok", "memory", f"{message} (all of it: make plan)", fix)


def check_port(context: CheckContext) -> Iterator[Finding]:
    """TensorBoard's port."""
    from sft.report import tensorboard

    ours = tensorboard.running(context.root / "outputs" / "tb")
    if ours is not None:
        yield Finding("ok", "tensorboard", f"runs at {ours.address}")
    elif tensorboard.port_in_use(context.port):
        fix = f"another port: TB_PORT={context.port + 1}"
        yield Finding("warning", "tensorboard", f"port {context.port} is in use by another program", fix)
    else:
        yield Finding("ok", "tensorboard", f"port {context.port} is free")


CHECKS: dict[str, Callable[[CheckContext], Iterator[Finding]]] = {
    "system": check_system,
    "packages": check_packages,
    "config": check_config,
    "data": check_data,
    "model": check_model,
    "template": check_template,
    "gpu": check_gpu,
    "disk": check_disk,
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
            message = f"{type(error).__name__}: {one_line(error)}"
            findings.append(Finding("error", name, message, "this is a bug of sft-play: report it with this line"))
    return findings


def _error(name: str, error: SftError) -> Finding:
    return Finding("error", name, error.what + (f" ({error.where})" if error.where else ""), error.fix)
