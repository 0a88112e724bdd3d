"""A small project whose commands are run over and over, each in a fork of a process that has imported everything."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import merge_lora
import train
from sft import console, files
from tests import tiny_models
from tests.faults.faulty_disk import FaultyDisk
from tests.training import project

MODES = ("lora", "qlora", "full", "seq2seq")
HEAVY = ("sft.training.job", "sft.training.loop", "sft.training.autobatch", "sft.ship.merge")
SETTINGS = (
    "eval.train_sample=0",
    "train.save_total_limit=1",
    "train.micro_batch_tokens=128",  # several micro-batches a step
    "logging.log_interval=1",
)


class Bench:
    """One project, trained over and over in forks."""

    def __init__(self, root: Path, mode: str, *, tensorboard: bool = False) -> None:
        make = tiny_models.tiny_t5 if mode == "seq2seq" else tiny_models.tiny_qwen2
        model = make(root / "base")
        self.root = project.make(root, model, mode="full" if mode == "seq2seq" else mode)
        self.weights = "adapters/t/adapter_model.safetensors" if "lora" in mode else "outputs/t/model/model.safetensors"
        board = "tensorboard" if tensorboard else "none"
        self.sets = [part for one in (*SETTINGS, f"logging.backend={board}") for part in ("--set", one)]
        os.environ.update(SFT_ROOT=str(root), OMP_NUM_THREADS="1")

    def start(
        self,
        disk: files.Disk | None = None,
        *sets: str,
        first: Callable[[], object] = lambda: None,
        merge: bool = False,
    ) -> int:
        """Forks a training run (or a merge) on `disk`; returns its pid. Its output goes to output.txt, its calls to
        calls.json. first: done in the fork before the command begins.
        """
        if pid := os.fork():
            return pid
        code = 1
        with open(self.root / "output.txt", "wb", buffering=0) as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        try:
            os.chdir(self.root)
            files.disk = disk or files.Disk()
            first()
            sys.argv = ["command", "--config", "config.yaml", *([] if merge else self.sets), *sets]
            console.run(*((merge_lora.parser(), merge_lora.main) if merge else (train.build_parser(), train.main)))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            with contextlib.suppress(Exception):
                calls = getattr(disk, "calls", [])
                (self.root / "calls.json").write_text(json.dumps([calls, sorted(sys.modules)]))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def run(self, disk: files.Disk | None = None, *sets: str, **how: Any) -> int:
        """Starts the run and waits for it; returns its exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(disk, *sets, **how), 0)[1])

    def output(self) -> str:
        return (self.root / "output.txt").read_text(encoding="utf-8")

    def clear(self) -> None:
        for name in ("outputs", "adapters", ".cache"):
            shutil.rmtree(self.root / name, ignore_errors=True)

    def result(self) -> dict[str, Any]:
        """What a run must end with, however often it was broken."""
        curve = project.losses(self.root, "t") + project.losses(self.root, "t", "eval/loss")
        links = [str(path.readlink()) for path in sorted(self.root.glob("*/last"))]
        return {"sha256": files.sha256(self.root / self.weights), "curve": curve, "links": links}

    def left_behind(self) -> list[str]:
        """Files that a killed process left half-written, and checkpoints that fail their manifest."""
        hidden = [*(self.root / "outputs").rglob(".*"), *(self.root / "adapters").glob(".*")]
        torn = [path for path in (self.root / "outputs/t").glob("checkpoint-*") if files.manifest_problem(path)]
        return [str(path.relative_to(self.root)) for path in (*hidden, *torn)]

    def clean(self) -> tuple[dict[str, Any], list[str], float]:
        """The result of an undisturbed run, its calls of the disk, and its seconds (with most imports done before)."""
        for module in HEAVY:
            importlib.import_module(module)
        gc.freeze()  # a fork that collects garbage would copy and walk all that was imported
        self.clear()
        began, code = time.monotonic(), self.run(FaultyDisk(0, ""))
        if code:
            raise SystemExit(f"the clean run failed with {code}:\n{self.output()}")
        seconds = time.monotonic() - began
        calls, modules = json.loads((self.root / "calls.json").read_text())
        for name in modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        gc.freeze()
        return self.result(), calls, seconds

    def broken_then_resumed(
        self, break_it: Callable[[], int], expected: dict[str, Any], codes: tuple[int, ...] = (0, 2, -signal.SIGKILL)
    ) -> dict[str, Any]:
        """One case: {"exit", "wrong": every violation}. codes: the exit codes that the broken run may have."""
        code = break_it()
        output, wrong = self.output(), []
        finished = (self.root / "outputs/t/finished.json").is_file()
        if code not in codes or "Traceback" in output:
            wrong.append(f"exit {code}: {output[-600:]}")
        if code == 2 and "could not be" not in output and "cannot be" not in output:
            wrong.append(f"the message does not name what the disk refused: {output[-300:]}")
        if not finished and (again := self.run()):
            wrong.append(f"not resumed, exit {again}: {self.output()[-600:]}")
        else:
            actual = self.result()
            wrong += [f"{key} differs" for key in expected if actual[key] != expected[key]]
            wrong += [f"left behind: {name}" for name in ([] if finished else self.left_behind())]
        return {"exit": code, "wrong": wrong}
