"""A project whose `train` is a script of a few lines: it locks its run and reports steps as the real one does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sft.server import jobs

TRAIN = """
import json, os, signal, sys, time
sys.path.insert(0, {scripts!r})
from pathlib import Path
from sft import files, runs
from sft.errors import Stopped
root, args = Path(os.environ["SFT_ROOT"]), sys.argv[1:]
output = [arg.partition("=")[2] for arg in args if arg.startswith("train.output_dir=")]
resume = args[args.index("--resume") + 1] if "--resume" in args else "auto"
folder = runs.open_run((output or ["outputs/run"])[0], root, resume).run.folder
settings = dict(pair.split("=") for pair in Path(args[args.index("--config") + 1]).read_text().split())
if settings.get("fail") == "early":
    print(json.dumps({{"error": "no rows", "where": "data", "fix": "make process"}}))
    sys.exit(2)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
files.make_folder(folder)
with files.lock(folder / runs.LOCK, "run"):
    (folder / runs.RESOLVED).write_text("model: {{name: tiny}}")
    (folder / "started.txt").open("a").write(os.environ.get("SFT_JOB", "") + "\\n")
    try:
        with runs.reporting(runs.at(folder, root), "tiny"):
            first = files.read_json(folder / runs.STATUS).get("step", 0)
            for step in range(first + 1, int(settings["steps"]) + 1):
                time.sleep(0.05)
                print("step", step, file=sys.stderr, flush=True)
                runs.update_status(folder, phase="training", step=step, total_steps=int(settings["steps"]))
                with open(folder / "log.jsonl", "a") as file:
                    file.write(json.dumps({{"step": step, "train/loss": 1 / step}}) + "\\n")
                if stop:
                    raise Stopped("stopped")
            files.write_json(folder / runs.FINISHED, {{"steps": step}})
    except Stopped:
        print(json.dumps({{"error": "Stopped", "where": None, "fix": None}}))
        sys.exit(143)
print(json.dumps({{"run": folder.name}}))
"""


def install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes jobs of `root` run the quick script."""
    scripts = root / "quick"
    scripts.mkdir()
    (scripts / "train.py").write_text(TRAIN.format(scripts=str(jobs.SCRIPTS)))
    monkeypatch.setattr(jobs, "SCRIPTS", scripts)
    monkeypatch.setattr(jobs, "gpus", list)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Until it holds; AssertionError if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)
