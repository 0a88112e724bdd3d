"""The guided set-up behind workflows/quick_start.sh: choose model and data, process, check, train, evaluate.

    python scripts/quick_start.py             guided on a terminal
    python scripts/quick_start.py --yes       takes every default
    python scripts/quick_start.py --demo      the small demo model

Reads data/raw; writes configs/local.yaml, which every command then takes by default, and what those commands write.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sft import console
from sft.errors import DataError, SftError

DEMO = "models/demo"
SAMPLE = "data/samples/support_desk.jsonl"
LOCAL = console.LOCAL_CONFIG
NEXT = """
What to do next:
  make infer                  chat with it
  make tensorboard            look at the curves
  make compare                what got better, what was forgotten, every answer on one page
  make merge && make merge-test   one folder of weights, checked (make export: for llama.cpp or Ollama)
  put your own file of examples into data/raw/ and run this again (docs/DATA.md: formats)
  docs/CONFIG.md has every setting; configs/local.yaml keeps yours"""


Choice = tuple[str, str]  # a model to train, and why this one


def parser() -> argparse.ArgumentParser:
    result = console.parser(__doc__, config=False)
    result.add_argument("--yes", action="store_true", help="take every default without asking")
    result.add_argument("--demo", action="store_true", help="use the shipped demo model")
    return result


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Choose model and data, process, preview, check, train, evaluate."""
    root, started = console.project_root(), time.monotonic()
    interactive = sys.stdin.isatty() and not args.yes
    earlier = earlier_choices(root, args.demo)
    model, reason = earlier or choose_model(args.demo, interactive)
    console.say(f"model: {model} - {reason}")
    console.say(f"data:  {choose_data(root, model, keep=earlier is not None)}")
    console.say(f"your settings are in {LOCAL}; edit it as you like, and start this again")
    step("process the data", "process_data")
    step("show what is trained on", "preview", "--limit", "1")
    step("check the set-up", "check")
    if interactive and input("\ntrain now? [Y/n] ").strip().lower() == "n":
        console.say("to start training later: make train")
        return {"model": model, "trained": False}
    step("train", "train")
    step("compare base and tuned model on the test split", "eval", "--split", "test", "--both", "--samples", "3")
    console.say(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes{NEXT}")
    return {"model": model, "trained": True}


def earlier_choices(root: Path, demo: bool) -> Choice | None:
    """The model of an existing configs/local.yaml, whose settings stay; None with --demo where it has another model."""
    from sft.config.load import load

    if not (root / LOCAL).exists():
        return None
    name = load(root / LOCAL, root=root).config.model.name
    if demo and name != DEMO:
        backup = root / f"{LOCAL}.{time.strftime('%Y%m%d-%H%M%S')}.bak"
        (root / LOCAL).rename(backup)
        console.say(f"--demo: your {LOCAL} is now {backup.name}")
        return None
    return name, f"from {LOCAL} (delete that file to choose again)"


def choose_model(demo: bool, interactive: bool) -> Choice:
    """Looks at the GPU and the hub, then takes the first model offered or lets the user choose."""
    from sft.memory import estimate
    from sft.model import hub
    from sft.model.hardware import probe

    if demo:
        return DEMO, "the shipped demo model (--demo): proves the pipeline, knows nothing"
    hardware = probe()
    gpu = hardware.name if hardware.device == "cuda" else None
    gib = hardware.total_bytes / 2**30 if gpu else 0.0
    reachable = gpu is not None and hub.reachable(timeout=2.0)
    offers = choices(gpu, gib, reachable, estimate.models_that_fit(gib) if gpu else [])
    if not interactive or len(offers) == 1:
        return offers[0]
    for number, (name, reason) in enumerate(offers, 1):
        console.say(f"  {number}. {name} - {reason}")
    while True:
        answer = input(f"which model? [1-{len(offers)}, Enter for 1, or a hub name] ").strip() or "1"
        if answer.isdigit() and 1 <= int(answer) <= len(offers):
            return offers[int(answer) - 1]
        if "/" in answer:
            return answer, "your choice"


def choices(gpu: str | None, gib: float, hub: bool, fitting: list[str]) -> list[Choice]:
    """Models to offer, the default first: those that fit the card, then the demo model.

    gpu: the card's name or None; gib: its memory; hub: whether it can be reached; fitting: hub names, largest first.
    """
    reason = "no GPU was found" if gpu is None else "quick try" if hub else "the model hub cannot be reached"
    offers = [(name, f"fits {gpu} ({gib:.0f} GiB) in 4-bit") for name in fitting] if gpu and hub else []
    return [*offers, (DEMO, f"the shipped demo model ({reason}): proves the pipeline, knows nothing")]


def choose_data(root: Path, model: str, *, keep: bool) -> str:
    """Writes the model and the raw file into configs/local.yaml; returns what the data is.

    keep: the file exists and its settings stay: only a `raw_path` in data/raw follows the files that are there now.
    """
    from sft import files
    from sft.config.load import dump_yaml, load

    path = root / LOCAL
    if keep:
        loaded = load(path, root=root)
        where, name = loaded.origin("data.raw_path") or "", loaded.config.data.raw_path or ""
        if not name.startswith("data/raw/") or not where.startswith(f"{LOCAL}:"):
            return f"from {LOCAL}"
    raw, origin = raw_data(root)
    current = raw.relative_to(root).as_posix()
    if not keep:
        settings = {
            "include": "configs/demo_cpu.yaml" if model == DEMO else "configs/run_bnb.yaml",
            "model": {"name": model},
            "data": {"raw_path": current},
            "train": {"output_dir": "outputs/quick-start"},
        }
        text = (
            f"# Written by the quick start on {time.strftime('%Y-%m-%d')}; every command takes it by default.\n"
            "# Edit it freely, or delete it to go back to configs/run_bnb.yaml. Every key: docs/CONFIG.md\n"
        )
        files.write_text(path, text + dump_yaml(settings))
    elif current != name:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        at = int(where.rpartition(":")[2]) - 1
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        lines[at] = indent + dump_yaml({"raw_path": current})
        files.write_text(path, "".join(lines))
    return f"{current} ({origin})"


def raw_data(root: Path) -> tuple[Path, str]:
    """The raw file to use and where it comes from; copies the shipped sample where data/raw is empty.

    The copy of the sample gives way to any other file. Raises DataError if data/raw holds several files and none is
    called raw, or none that can be read.
    """
    from sft.data.readers import SUFFIXES, is_data_file, plain_name

    folder, sample = root / "data" / "raw", root / SAMPLE
    copied = folder / "raw.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if copied in entries and copied.read_bytes() == sample.read_bytes():
        if entries == [copied]:
            return copied, f"a copy of {SAMPLE}"
        entries.remove(copied)
    texts = [path for path in entries if path.suffix.lower() == ".txt"]
    data_files = [path for path in entries if path.is_file() and is_data_file(path)] or texts
    names = ", ".join(path.name for path in data_files or entries)
    if called_raw := [path for path in data_files if plain_name(path).stem.lower() == "raw"]:
        kinds = [*SUFFIXES, "", ".txt"]
        return min(called_raw, key=lambda path: kinds.index(plain_name(path).suffix.lower())), "yours"
    if len(data_files) > 1:
        fix = "rename the one to use to raw with its own ending: raw.jsonl, raw.csv, raw.jsonl.gz"
        raise DataError(f"data/raw holds several files: {names}", where=str(folder), fix=fix)
    if data_files:
        return data_files[0], "yours"
    if entries:
        fix = "put a .jsonl, .json, .csv, .xlsx or .parquet file there, or empty the folder to use the sample"
        raise DataError(f"data/raw holds no file of rows, only: {names}", where=str(folder), fix=fix)
    shutil.copyfile(sample, copied)
    return copied, f"data/raw was empty: copied {SAMPLE}"


def step(title: str, script: str, *flags: str) -> None:
    """Runs one command of the kit; raises SftError with its exit code where it fails.

    Ctrl-C is for that command alone: training then writes its checkpoint before it ends.
    """
    path = Path(__file__).with_name(f"{script}.py")
    console.say(f"\n== {title}: python scripts/{script}.py {' '.join(flags)}".rstrip())
    target = {"process_data": "process", "eval": "eval-test"}.get(script, script)
    env = {**os.environ, "SFT_MAKE": target, "MAKEFLAGS": ""}  # so that fixes are make commands
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        code = subprocess.run([sys.executable, str(path), *flags], env=env, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, handler)
    if code in (130, 143, -signal.SIGINT):  # the command's own message says what to do
        sys.exit(code if code > 0 else 130)
    if code:
        error = SftError(f"the quick start stopped at: {title}", fix="follow the message above, then start it again")
        error.exit_code = code if code > 0 else 1
        raise error


if __name__ == "__main__":
    console.run(parser(), main)
