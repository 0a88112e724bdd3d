"""Everything that a bug report needs, as sections of lines: versions, machine, checks, the last run, the last error."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from sft import files, runs
from sft.config import load
from sft.model import hardware
from sft.preflight import checks
from sft.preflight.checks import Case, requirements

Section = tuple[str, list[str]]
LAST_ERROR = "last_error.txt"  # written by the frame of every command, below outputs/
_TELLING = tuple("CUDA_ HF_ HUGGING TRANSFORMERS_ PYTORCH_ TORCH_ OMP_ SFT_ LD_LIBRARY WORLD_SIZE".split())


def sections(case: Case) -> Iterator[Section]:
    """Title and lines of each; nothing in here loads a model or changes anything. The home folder is written as ~."""
    for title, lines in (
        ("kit", _kit(case.root)),
        ("packages", _packages()),
        ("machine", _machine(case)),
        ("environment", sorted(f"{k}={_secret(k, v)}" for k, v in os.environ.items() if k.startswith(_TELLING))),
        ("checks", [_finding(found) for found in checks.run(case)]),
        ("last run", _last_run(case.root)),
        ("last error", _last_error(case.root)),
    ):
        home = str(Path.home())
        yield title, [line.replace(home, "~") if len(home) > 1 else line for line in lines]


def _kit(root: Path) -> list[str]:
    git = ["git", "-C", str(load.PROJECT), "log", "-1", "--format=%h %cs"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "no git"
    now = time.strftime("%Y-%m-%d %H:%M %Z")
    return [f"sft-play {commit} at {root}, {now}", f"Python {sys.version.split()[0]} ({sys.executable})"]


def _packages() -> list[str]:
    names = [*(wanted.name for wanted in requirements()), "unsloth"]
    found = runs.versions(names)
    return [", ".join(f"{name} {found.get(name, 'missing')}" for name in names)]


def _machine(case: Case) -> list[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    total, free = hardware.memory()
    lines = [
        f"{platform.platform()}, {os.cpu_count()} cores",
        f"memory {files.format_bytes(free)} free of {files.format_bytes(total)}",
    ]
    cards = hardware.gpus()
    lines += [
        f"GPU {c.index}: {c.name}, {files.format_bytes(c.free_bytes)} free of {files.format_bytes(c.total_bytes)}"
        for c in cards
    ]
    lines += [f"driver {hardware.driver() or 'unknown'}"] if cards else ["no GPU"]
    for name, place in (("project", case.root), ("outputs", case.root / "outputs"), ("hub cache", Path(HF_HUB_CACHE))):
        usage = shutil.disk_usage(files.existing(place))
        lines.append(f"disk of {name}: {files.format_bytes(usage.free)} free of {files.format_bytes(usage.total)}")
    return lines


def _secret(name: str, value: str) -> str:
    return "(set, not shown)" if "TOKEN" in name or "KEY" in name else value


def _finding(found: checks.Finding) -> str:
    return f"{found.level:8} {found.name:12} {found.said}"


def _last_run(root: Path) -> list[str]:
    """The run that was written to last: its state, its checkpoints, its last lines."""
    folders = [path.parent for path in (root / "outputs").glob(f"*/{runs.RESOLVED}") if not path.parent.is_symlink()]
    if not folders:
        return ["none"]
    run = runs.at(max(folders, key=lambda folder: folder.stat().st_mtime), root)
    going_on = run.name in {one.name for one in runs.running(root)}
    lines = [f"{run.name}: {'finished' if run.finished else 'running' if going_on else 'not finished'}"]
    for checkpoint in run.checkpoints():
        problem = files.manifest_problem(checkpoint) or "whole"
        lines.append(f"{checkpoint.name}: {problem}, {files.format_bytes(files.size(checkpoint))}")
    log = run.folder / "log.jsonl"
    logged = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return lines + [line for line in logged if '"eval/samples"' not in line][-3:]  # answers quote the user's rows


def _last_error(root: Path) -> list[str]:
    path = root / "outputs" / LAST_ERROR
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ["none"]
