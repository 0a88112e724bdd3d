"""Checks of the machine: system, packages, GPU, disk, memory, ports."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

from sft import runs
from sft.config import paths
from sft.preflight import space
from sft.preflight.case import Case, Finding, Level

if TYPE_CHECKING:
    from packaging.requirements import Requirement

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

    for line in (paths.PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines():
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
        mend = "training it here takes days; --set model.name=models/demo shows the pipeline" if slow else None
        yield Finding("warning" if slow else "ok", "gpu", "none: training on the CPU", mend)
    for card in cards:
        case.gpu_bytes = case.gpu_bytes or card.total_bytes
        busy = card.free_bytes < 0.8 * card.total_bytes
        said = (
            f"{card.name}, {card.free_bytes / GIB:.1f} of {card.total_bytes / GIB:.1f} GiB free,"
            f" {'bf16' if card.capability >= (8, 0) else 'fp16 alone (no bf16)'}"
        )
        mend = "another process holds its memory: nvidia-smi names it" if busy else None
        yield Finding("warning" if busy else "ok", "gpu", said, mend)
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
    run = runs.at(paths.resolve(case.root, case.config.train.output_dir), case.root)
    place = space.existing(run.folder)
    free = shutil.disk_usage(place).free
    need = case.to_fetch + 2 * GIB if case.files is None else sum(space.parts(case.config, case.files).values())
    said = f"{space.in_words(free)} free in {place}, a run needs about {space.in_words(need)}"
    short = free < need
    mend = "make room (old runs: outputs/), or --set train.save_total_limit=1" if short else None
    yield Finding("error" if short else "ok", "disk", said, mend)
    for folder in (run.folder, run.adapter_dir.parent):
        standing = space.existing(folder)
        if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
            yield Finding("error", "outputs", f"{standing} cannot be written to", "mend its permissions, or output_dir")
            return
    yield Finding("ok", "outputs", f"{paths.shown(run.folder, case.root)} can be written to")


def memory(case: Case) -> Iterator[Finding]:
    """The system's memory against a rough need: libraries, and on a CPU weights."""
    from sft.memory import devices
    from sft.model import hardware

    total, free = hardware.memory()
    said = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    level: Level = "ok"
    mend = None
    if case.files is not None and case.config is not None:
        device = "cpu" if case.gpu_bytes is None else "cuda"
        need = devices.ram(case.files.parameters, case.config.tuning.mode, device)
        said += (
            f", a run needs {need:.1f} for libraries{' and weights' if device == 'cpu' else ''} (all of it: make plan)"
        )
        if need * GIB > free:
            level, mend = "warning", "close what else runs, or choose a smaller model (make plan)"
    yield Finding(level, "memory", said, mend)


def port(case: Case) -> Iterator[Finding]:
    """TensorBoard's port."""
    from sft.report import board

    ours = board.running(case.root / "outputs" / "tb")
    if ours is not None:
        yield Finding("ok", "tensorboard", f"runs at {ours.address}")
    elif board.answers(case.port):
        mend = f"another port: TB_PORT={case.port + 1}"
        yield Finding("warning", "tensorboard", f"port {case.port} is in use by another program", mend)
    else:
        yield Finding("ok", "tensorboard", f"port {case.port} is free")
