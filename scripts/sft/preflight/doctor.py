"""`make doctor`: everything that a bug report needs, as sections of lines. Nothing here loads a model or writes."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sft import files, runs
from sft.config.load import PROJECT
from sft.files import format_bytes
from sft.model import hardware
from sft.preflight import checks
from sft.preflight.checks import CheckContext, requirements

LAST_ERROR = "last_error.txt"  # written by `console.run`, below outputs/
_VARIABLES = tuple("CUDA_ HF_ HUGGING TRANSFORMERS_ PYTORCH_ TORCH_ OMP_ SFT_ LD_LIBRARY WORLD_SIZE".split())


def sections(context: CheckContext) -> Iterator[tuple[str, list[str]]]:
    """Title and lines of each section: kit, packages, machine, checks, last run, last error; the home folder as ~."""
    home, last_error = str(Path.home()), context.root / "outputs" / LAST_ERROR
    names = [*(requirement.name for requirement in requirements()), "unsloth"]
    installed = runs.versions(names)
    errors = last_error.read_text(encoding="utf-8", errors="replace").splitlines() if last_error.is_file() else ["none"]
    for title, lines in (
        ("kit", _kit(context.root)),
        ("packages", [", ".join(f"{name} {installed.get(name, 'missing')}" for name in names)]),
        ("machine", _machine(context.root)),
        ("environment", _environment()),
        ("checks", [f"{each.level:8} {each.name:12} {each.message}" for each in checks.run(context)]),
        ("last run", _last_run(context.root)),
        ("last errors, newest first", errors),
    ):
        yield title, [line.replace(home, "~") if len(home) > 1 else line for line in lines]


def _kit(root: Path) -> list[str]:
    git = ["git", "-C", str(PROJECT), "log", "-1", "--format=%h %cs"]
    commit = ""
    with suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(git, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    kit = f"sft-play {commit or 'without git'} at {root}, {time.strftime('%Y-%m-%d %H:%M %Z')}"
    return [kit, f"Python {sys.version.split()[0]} ({sys.executable})"]


def _machine(root: Path) -> list[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    def free(what: str, free_bytes: int, total_bytes: int) -> str:
        return f"{what}: {format_bytes(free_bytes)} free of {format_bytes(total_bytes)}"

    total, available = hardware.memory()
    lines = [f"{platform.platform()}, {os.cpu_count()} cores", free("memory", available, total)]
    cards = hardware.gpus()
    lines += [free(f"GPU {card.index} ({card.name})", card.free_bytes, card.total_bytes) for card in cards]
    lines += [f"driver {hardware.driver() or 'unknown'}"] if cards else ["no GPU"]
    for name, place in (("project", root), ("outputs", root / "outputs"), ("hub cache", Path(HF_HUB_CACHE))):
        usage = shutil.disk_usage(files.existing(place))
        lines.append(free(f"disk of {name}", usage.free, usage.total))
    return lines


def _environment() -> list[str]:
    def value(name: str) -> str:
        return "(set, not shown)" if "TOKEN" in name or "KEY" in name else os.environ[name]

    return [f"{name}={value(name)}" for name in sorted(os.environ) if name.startswith(_VARIABLES)]


def _last_run(root: Path) -> list[str]:
    """The run that trained last: its state, its checkpoints, its last log lines."""
    newest = runs.newest_first(root)
    if not newest:
        return ["none"]
    run = newest[0]
    is_running = run.name in {each.name for each in runs.running(root)}
    lines = [f"{run.name}: {'finished' if run.finished else 'running' if is_running else 'not finished'}"]
    for checkpoint in run.checkpoints():
        problem = files.manifest_problem(checkpoint) or "complete"
        lines.append(f"{checkpoint.name}: {problem}, {format_bytes(files.size(checkpoint))}")
    log = run.folder / "log.jsonl"
    logged = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return lines + [line for line in logged if '"eval/samples"' not in line][-3:]  # answers quote the user's rows
