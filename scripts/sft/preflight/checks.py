"""A finding, and what the checks share."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sft import files, runs
from sft.config import load as config_load
from sft.config import load as paths
from sft.errors import ConfigError, SftError, TemplateError
from sft.model.files import ModelFiles
from sft.preflight import disk_space

if TYPE_CHECKING:
    from sft.config.schema import Config
    from sft.model.files import ModelFiles
if TYPE_CHECKING:
    from packaging.requirements import Requirement


Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line. said: what was found. fix: what to do about it, where something is to be done."""

    level: Level
    name: str
    said: str
    fix: str | None = None


@dataclass
class Case:
    """What the checks share: where, which config file, and what earlier checks have found out."""

    root: Path
    config_path: Path
    sets: list[str]
    port: int
    config: Config | None = None
    files: ModelFiles | None = None
    to_fetch: int = 0
    gpu_bytes: int | None = None


class Tokenizer:
    """Special tokens, chat template and the ids of a text."""

    def __init__(self, folder: Path) -> None:
        read = {name: folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")}
        said = {
            key: value
            for path in read.values()
            if path.is_file()
            for key, value in json.loads(path.read_text(encoding="utf-8")).items()
        }
        self.name_or_path = str(folder)
        self.special_tokens_map = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in said.items()
            if key.endswith("_token") and isinstance(value, (str, dict))
        }
        self.bos_token = self.special_tokens_map.get("bos_token")
        self.chat_template = said.get("chat_template")
        if isinstance(self.chat_template, list):
            self.chat_template = {entry["name"]: entry["template"] for entry in self.chat_template}
        if (folder / "chat_template.jinja").is_file():
            self.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self.folder = folder

    @property
    def bos_token_id(self) -> int | None:
        return self._fast().token_to_id(self.bos_token) if self.bos_token else None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._fast().encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _fast(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))


def config(case: Case) -> Iterator[Finding]:
    """Loads the config; every mistake in it is a finding."""
    from sft.config.load import load

    try:
        loaded = load(case.config_path, case.sets, root=case.root)
    except ConfigError as error:
        for problem in error.problems or [error]:
            where = f" ({problem.where})" if problem.where else ""
            yield Finding("error", "config", problem.what + where, problem.fix)
        return
    case.config = loaded.config
    tuning, model = loaded.config.tuning, loaded.config.model
    named = paths.display_path(case.config_path, case.root)
    yield Finding("ok", "config", f"{named}: {tuning.mode} of {model.name} with {tuning.backend}")


def data(case: Case) -> Iterator[Finding]:
    """The rows of the stage that training would take, counted; the first one read."""
    if case.config is None:
        return
    from sft.data import sources, store

    data = case.config.data
    processed = paths.resolve_path(case.root, data.processed_dir) / "train.jsonl"
    if data.train_path is None and data.stage in ("auto", "processed") and not processed.exists():
        raw = sources.find_sources(data, case.root)
        yield Finding("warning", "data", f"{raw.name} is there ({raw.kind}), but not processed yet", "make process")
        return
    stage = store.resolve_stage(data, case.root)
    splits = (("train", stage.train), ("val", stage.val), ("test", stage.test))
    counts = {name: store.count_rows(path) for name, path in splits if path is not None}
    said = ", ".join(f"{name} {rows}" for name, rows in counts.items())
    if not counts["train"]:
        yield Finding("error", "data", f"{paths.display_path(stage.train, case.root)} has no rows", "make process")
        return
    next(iter(store.iter_rows(stage.train)))
    level: Level = "ok" if counts.get("val") else "warning"
    fix = None if counts.get("val") else "without validation rows no best checkpoint is chosen: raise data.split.val"
    yield Finding(level, "data", f"{stage.name} rows: {said}", fix)


def model(case: Case) -> Iterator[Finding]:
    """The model's files here, or on the hub; nothing is fetched or loaded."""
    if case.config is None:
        return
    from sft.model import hub

    section = case.config.model
    folder = hub.local_folder(section.name, case.root) or hub.cached(section.name, section.revision)
    place = hub.find_token(case.root)[1]
    if folder is not None:
        offline = hub.local_folder(section.name, case.root) is not None or hub.offline()
        try:
            case.files = _whole(section, folder)
        except SftError:
            if offline:
                raise
            yield Finding("warning", "model", f"{section.name} is in the cache in part", "make download-model")
            return
        size = f"{case.files.size} parameters, {case.files.kind}"
        yield Finding("ok", "model", f"{section.name}: {size}, all files whole")
    elif hub.offline():
        yield Finding("error", "model", f"{section.name} is not here, and HF_HUB_OFFLINE is set", "make download-model")
    elif not hub.reachable(1.5):
        fix = "fix the network, or --set model.name=models/demo"
        yield Finding("error", "model", f"{section.name} is not here, and the hub does not answer", fix)
    else:
        case.to_fetch = hub.peek(section, case.root, timeout=1.5).bytes
        said = f"{section.name} is on the hub: {case.to_fetch / 1e9:.2f} GB to fetch"
        yield Finding("warning", "model", said, "make download-model (train fetches it too)")
    yield Finding("ok", "hub token", f"from {place}" if place else "none (needed for gated and private models only)")


def _whole(section: Any, folder: Path) -> ModelFiles:
    from sft.model import files as model_files

    config = model_files.read_config(folder, section.name)
    kind = model_files.kind_of(config, section.type, name=section.name)
    result = model_files.ModelFiles(folder, section.name, section.revision, config, kind)
    _ = result.weights
    return result


def template(case: Case) -> Iterator[Finding]:
    """Compiles the template and renders a turn with it: does the answer stand in it, does the question."""
    if case.config is None or case.files is None:
        return
    from sft.chat.template import load_template

    template = load_template(case.config.data, Tokenizer(case.files.path), case.root)  # type: ignore[arg-type]
    question, answer = "what-was-asked", "what-was-answered"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = template.render(messages)
    for part, shown in (("answer", answer), ("question", question)):
        if shown not in text:
            raise TemplateError(
                f"the template never shows the {part}", where=template.name, fix="make preview shows what it writes"
            )
    prompt = template.render(messages[:1], add_generation_prompt=True)
    if answer in prompt or not text.startswith(prompt.rstrip()):
        said = f"{template.name}: what the model is asked is not how a trained row begins"
        yield Finding("warning", "template", said, "make preview shows both")
        return
    yield Finding("ok", "template", f"{template.name} shows question and answer")


GIB = 2**30
PYTHONS = ((3, 10), (3, 13))


def system(case: Case) -> Iterator[Finding]:
    """Linux or WSL2, and a Python that the kit is tested on."""
    release = platform.release()
    kind = "WSL2" if "microsoft" in release.lower() else platform.system()
    known = platform.system() == "Linux"
    yield Finding(
        "ok" if known else "error", "system", f"{kind} {release}", None if known else "use Linux, or WSL2 on Windows"
    )
    version = sys.version_info[:2]
    fits = PYTHONS[0] <= version <= PYTHONS[1]
    said = f"{version[0]}.{version[1]} ({sys.executable})"
    yield Finding(
        "ok" if fits else "error", "python", said, None if fits else "install Python 3.10 to 3.13, make install"
    )


def requirements() -> Iterator[Requirement]:
    """The lines of requirements.txt."""
    from packaging.requirements import Requirement

    for line in (config_load.PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text and not text.startswith("-"):
            yield Requirement(text)


def packages(case: Case) -> Iterator[Finding]:
    """Installed versions against requirements.txt, whose floors are the security floors too."""
    wrong, seen = [], 0
    for wanted in requirements():
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        seen += 1
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version} is not {wanted.specifier}")
    if wrong:
        yield Finding("error", "packages", "; ".join(wrong), "make install")
    else:
        shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
        yield Finding("ok", "packages", f"{seen} within their bounds ({shown})")


def gpu(case: Case) -> Iterator[Finding]:
    """Every visible GPU: memory, precision, whether torch and the backend can use it."""
    from sft.model import hardware

    cards = hardware.gpus()
    if not cards:
        slow = case.files is not None and case.files.parameters > 2e8
        fix = "training it here takes days; --set model.name=models/demo shows the pipeline" if slow else None
        yield Finding("warning" if slow else "ok", "gpu", "none: training on the CPU", fix)
    for card in cards:
        case.gpu_bytes = case.gpu_bytes or card.total_bytes
        busy = card.free_bytes < 0.8 * card.total_bytes
        said = (
            f"{card.name}, {card.free_bytes / GIB:.1f} of {card.total_bytes / GIB:.1f} GiB free,"
            f" {'bf16' if card.capability >= (8, 0) else 'fp16 alone (no bf16)'}"
        )
        fix = "another process holds its memory: nvidia-smi names it" if busy else None
        yield Finding("warning" if busy else "ok", "gpu", said, fix)
    if cards and "+cpu" in metadata.version("torch"):
        said = "torch is a build for the CPU alone, so the GPU would stay idle"
        yield Finding("error", "torch", said, "remove .venv and make install, which takes the CUDA build")
    if case.config is not None and case.config.tuning.backend == "unsloth":
        yield from _unsloth(bool(cards))


def _unsloth(cuda: bool) -> Iterator[Finding]:
    import importlib.util

    missing = "there is no CUDA GPU" if not cuda else "it is not installed"
    if cuda and importlib.util.find_spec("unsloth") is not None:
        yield Finding("ok", "backend", f"unsloth {metadata.version('unsloth')}")
    else:
        yield Finding("warning", "backend", f"unsloth falls back to bnb: {missing}", "make install-unsloth")


def disk(case: Case) -> Iterator[Finding]:
    """Checkpoints (kept, best and the one being written), the adapter, and the model if it is still to be fetched."""
    if case.config is None:
        return
    run = runs.at(config_load.resolve_path(case.root, case.config.train.output_dir), case.root)
    place = files.existing(run.folder)
    free = files.free_bytes(place)
    need = case.to_fetch + 2 * GIB if case.files is None else sum(disk_space.parts(case.config, case.files).values())
    said = f"{files.format_bytes(free)} free in {place}, a run needs about {files.format_bytes(need)}"
    short = free < need
    fix = "free space (old runs: outputs/), or --set train.save_total_limit=1" if short else None
    yield Finding("error" if short else "ok", "disk", said, fix)
    for folder in (run.folder, run.adapter_dir.parent):
        standing = files.existing(folder)
        if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
            yield Finding("error", "outputs", f"{standing} cannot be written to", "fix its permissions, or output_dir")
            return
    yield Finding("ok", "outputs", f"{config_load.display_path(run.folder, case.root)} can be written to")


def memory(case: Case) -> Iterator[Finding]:
    """The system's memory against a rough need: libraries, and on a CPU weights."""
    from sft.memory import devices
    from sft.model import hardware

    total, free = hardware.memory()
    said = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    level: Level = "ok"
    fix = None
    if case.files is not None and case.config is not None:
        device = "cpu" if case.gpu_bytes is None else "cuda"
        need = devices.ram(case.files.parameters, case.config.tuning.mode, device)
        said += (
            f", a run needs {need:.1f} for libraries{' and weights' if device == 'cpu' else ''} (all of it: make plan)"
        )
        if need * GIB > free:
            level, fix = "warning", "close what else runs, or choose a smaller model (make plan)"
    yield Finding(level, "memory", said, fix)


def port(case: Case) -> Iterator[Finding]:
    """TensorBoard's port."""
    from sft.report import tensorboard

    ours = tensorboard.running(case.root / "outputs" / "tb")
    if ours is not None:
        yield Finding("ok", "tensorboard", f"runs at {ours.address}")
    elif tensorboard.port_in_use(case.port):
        fix = f"another port: TB_PORT={case.port + 1}"
        yield Finding("warning", "tensorboard", f"port {case.port} is in use by another program", fix)
    else:
        yield Finding("ok", "tensorboard", f"port {case.port} is free")


CHECKS: tuple[tuple[str, Callable[[Case], Iterator[Finding]]], ...] = (
    ("system", system),
    ("packages", packages),
    ("config", config),
    ("data", data),
    ("model", model),
    ("template", template),
    ("gpu", gpu),
    ("disk", disk),
    ("memory", memory),
    ("tensorboard", port),
)


def run(case: Case) -> list[Finding]:
    """Every check, in order; one that breaks is an error of its own and stops none of the others."""
    findings: list[Finding] = []
    for name, check in CHECKS:
        try:
            findings.extend(check(case))
        except SftError as error:
            where = f" ({error.where})" if error.where else ""
            findings.append(Finding("error", name, error.what + where, error.fix))
        except Exception as error:  # a check must never end the others
            findings.append(Finding("error", name, f"{type(error).__name__}: {error}", "report this, with the line"))
    return findings
