"""Where a run's numbers go: outputs/<run>/log.jsonl, TensorBoard's event files, and the terminal.

On a resume, lines of steps after the checkpoint are removed and TensorBoard purges those steps, so that no
curve overlaps itself.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sft import files

log = logging.getLogger("sft.training")
# keys of the loop's history -> keys of log.jsonl and tags of TensorBoard
NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "input_wait": "train/input_wait",
    "epoch": "train/epoch",
    "windows_skipped": "train/windows_skipped",
}
Report = Callable[[int, int, str], None]  # steps done, steps in all, what to show beside them


def public_names(entry: Mapping[str, Any]) -> dict[str, float]:
    """An entry of the loop's history under the public names; `eval_x` is `eval/x`."""
    values = {NAMES[key]: value for key, value in entry.items() if key in NAMES}
    values |= {f"eval/{key[5:]}": value for key, value in entry.items() if key.startswith("eval_")}
    return {key: float(value) for key, value in values.items()}


class Logger:
    """Receives the numbers and sample answers of a run."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        raise NotImplementedError

    def text(self, step: int, name: str, text: str) -> None:
        """Sample answers, as Markdown."""

    def sync(self) -> None:
        """Called before a checkpoint is written: it must never know more than the log beside it."""

    def close(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """The run has ended. settings, results: for TensorBoard's HParams tab."""


class JsonLines(Logger):
    """log.jsonl: one JSON object a line, `step` first; a number that is not finite is null."""

    def __init__(self, path: Path, after_step: int) -> None:
        self.path = path
        entries = [entry for entry in read(path) if entry["step"] <= after_step]
        files.write_text(path, "".join(_json_line(entry) for entry in entries))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        files.append(self.path, _json_line({"step": step, **finite}))

    def text(self, step: int, name: str, text: str) -> None:
        files.append(self.path, _json_line({"step": step, name: text}))

    def sync(self) -> None:
        if self.path.exists():
            files.sync(self.path)


def _json_line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a log.jsonl, without lines that a crash left incomplete."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


class TensorBoard(Logger):
    """TensorBoard's event files, one folder a run, for every step after `after_step`."""

    def __init__(self, folder: Path, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=after_step + 1 if after_step else None)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, text, step)

    def sync(self) -> None:
        self.writer.flush()

    def close(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in settings.items()
        }
        self.writer.add_hparams(plain, dict(results), run_name=".")  # type: ignore[no-untyped-call]
        self.writer.close()


class Progress(Logger):
    """Reports each step to `report`, for a progress bar; without one (no terminal), logs a line for each log entry."""

    def __init__(self, report: Report | None, total_steps: int) -> None:
        self.report, self.total_steps = report, total_steps
        self.shown = ""
        self._first: tuple[float, int] | None = None  # when the first step of this process ended, and its number

    def step(self, step: int) -> None:
        self._first = self._first or (time.monotonic(), step)
        if self.report is not None:
            self.report(step, self.total_steps, self.shown)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        if "eval/loss" in values:
            shown = {
                key[5:]: value for key, value in values.items() if key.startswith("eval/") and key != "eval/seconds"
            }
            log.info("step %d: eval %s", step, "  ".join(f"{name} {value:.4f}" for name, value in shown.items()))
        if "train/loss" not in values:
            return
        self.shown = f"loss {values['train/loss']:.4f}  {values['train/tokens_per_second']:,.0f} tok/s"
        if self.report is not None:
            self.report(step, self.total_steps, self.shown)
        else:
            log.info(
                "step %d/%d  %s  lr %.2e%s", step, self.total_steps, self.shown, values["train/lr"], self._left(step)
            )

    def _left(self, step: int) -> str:
        if self._first is None or step <= self._first[1]:
            return ""
        pace = (time.monotonic() - self._first[0]) / (step - self._first[1])
        return f"  {clock(pace * (self.total_steps - step))} left"


class Loggers:
    """All loggers of rank 0 as one. gauges: further numbers for each training entry (GPU memory, utilisation)."""

    def __init__(
        self, loggers: list[Logger], gauges: Callable[[], dict[str, float]] = dict, progress: Progress | None = None
    ) -> None:
        self.loggers, self.gauges, self.progress = [*loggers, *([progress] if progress else [])], gauges, progress

    def entry(self, step: int, entry: Mapping[str, Any]) -> None:
        """Logs an entry of the loop's history."""
        values = public_names(entry) | (self.gauges() if "loss" in entry else {})
        self._each(step, lambda logger: logger.numbers(step, values))

    def text(self, step: int, name: str, text: str) -> None:
        self._each(step, lambda logger: logger.text(step, name, text))

    def step(self, step: int) -> None:
        if self.progress is not None:
            self.progress.step(step)

    def sync(self, step: int) -> None:
        self._each(step, lambda logger: logger.sync())

    def close(self, step: int, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """Writes the run's settings and results where a logger takes them, and closes all."""
        self._each(step, lambda logger: logger.close(settings, results))

    def _each(self, step: int, call: Callable[[Logger], object]) -> None:
        """Calls every logger. TensorBoard's is dropped where its disk refuses; log.jsonl's refusal ends the run."""
        for logger in list(self.loggers):
            try:
                call(logger)
            except OSError as error:
                self.loggers.remove(logger)
                log.warning("TensorBoard's curves end at step %d (%s); log.jsonl has the numbers", step, error)


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def gpu_gauges() -> dict[str, float]:
    """Peak memory of this process and utilisation of its GPU; {} without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    from sft.model.hardware import gpu_stats

    values = {"gpu/memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    stats = gpu_stats() or {}
    if "memory_used" in stats:
        values["gpu/memory_used_gib"] = stats["memory_used"] / 2**30
    if "utilisation" in stats:
        values["gpu/utilisation"] = stats["utilisation"]
    return values
