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
from typing import TYPE_CHECKING, Any

from sft import files

if TYPE_CHECKING:
    from sft.training.checkpoint import Progress

log = logging.getLogger("sft.training")
# keys of the loop's history -> keys of log.jsonl and tags of TensorBoard
NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "epoch": "train/epoch",
    "windows_skipped": "train/windows_skipped",
}
SECONDS_PER_LINE = 30.0  # of progress where there is no bar
Report = Callable[[int, int, str], None]  # steps done, steps in all, what to show beside them


def public_names(entry: Mapping[str, Any]) -> dict[str, float]:
    """An entry of the loop's history under the public names; `eval_x` is `eval/x`."""
    values = {NAMES[key]: value for key, value in entry.items() if key in NAMES}
    values |= {f"eval/{key[5:]}": value for key, value in entry.items() if key.startswith("eval_")}
    return {key: float(value) for key, value in values.items()}


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


class Loggers:
    """Logs a run from the step after `after_step` on.

    path: its log.jsonl, one JSON object a line, in which a number that is not finite is null; None on other ranks than
    0, which log nothing. curves: the folder for TensorBoard, None for no curves. gpu: whether to add its memory and
    utilisation. report: called after each step, for a progress bar; without one, lines are logged.
    """

    def __init__(
        self,
        path: Path | None = None,
        curves: Path | None = None,
        *,
        after_step: int = 0,
        total_steps: int = 0,
        gpu: bool = False,
        report: Report | None = None,
    ) -> None:
        self.path, self.total_steps, self.gpu, self.report = path, total_steps, gpu, report
        self.writer: Any = None
        self._start = (time.monotonic(), 0, 0, 0.0)  # when this process began to train; steps, tokens, seconds before
        self._line = -math.inf  # when the last line of progress was logged
        if path is None:
            return
        files.write_text(path, "".join(_json_line(entry) for entry in read(path) if entry["step"] <= after_step))
        if curves is not None:
            from torch.utils.tensorboard import SummaryWriter

            try:
                self.writer = SummaryWriter(str(curves), purge_step=after_step + 1 if after_step else None)
            except OSError as error:
                log.warning("no TensorBoard curves (%s); log.jsonl has the numbers", error)

    def entry(self, step: int, entry: Mapping[str, Any]) -> None:
        """Logs an entry of the loop's history."""
        if self.path is None:
            return
        values = public_names(entry) | (gpu_gauges() if self.gpu and "loss" in entry else {})
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        files.append(self.path, _json_line({"step": step, **finite}))
        self._to_tensorboard(step, lambda writer: [writer.add_scalar(name, values[name], step) for name in values])
        log.debug("step %d: %s", step, "  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def text(self, step: int, name: str, text: str) -> None:
        """Logs sample answers, as Markdown."""
        if self.path is not None:
            files.append(self.path, _json_line({"step": step, name: text}))
            self._to_tensorboard(step, lambda writer: writer.add_text(name, text, step))

    def begin(self, progress: Progress) -> None:
        """Training begins, or goes on, after `progress`: speed and time left count from here."""
        self._start = (time.monotonic(), progress.global_step, progress.tokens, progress.seconds)
        self.busy(progress.global_step, "the first step")

    def busy(self, step: int, doing: str) -> None:
        """Shows on the progress bar what takes longer than a step."""
        if self.report is not None:
            self.report(step, self.total_steps, f"step {step}/{self.total_steps}  {doing}")

    def step(self, progress: Progress) -> None:
        """A step has ended: moves the bar, or logs a line for the first step, the last one and now and then between."""
        now, step, (since, steps, tokens, seconds) = time.monotonic(), progress.global_step, self._start
        speed = (progress.tokens - tokens) / max(progress.seconds - seconds, 1e-9)
        left = (now - since) / (step - steps) * (self.total_steps - step)
        shown = f"step {step}/{self.total_steps}  loss {progress.last_loss:.4f}  {speed:,.0f} tokens/s"
        shown += f"  {clock(left)} left"
        if self.report is not None:
            self.report(step, self.total_steps, shown)
        elif step == self.total_steps or now - self._line >= SECONDS_PER_LINE:
            self._line = now
            log.info(shown)

    def sync(self) -> None:
        """Called before a checkpoint is written: it must never know more than the log beside it."""
        if self.path is not None and self.path.exists():
            files.sync(self.path)

    def close(self, step: int, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """Writes TensorBoard's HParams tab, settings against results, and ends its file."""

        def end(writer: Any) -> None:
            writer.add_hparams(dict(settings), dict(results), run_name=".")
            writer.close()

        self._to_tensorboard(step, end)

    def _to_tensorboard(self, step: int, write: Callable[[Any], object]) -> None:
        """Writes to TensorBoard; its curves end where its disk refuses, while log.jsonl's refusal ends the run."""
        if self.writer is None:
            return
        try:
            write(self.writer)
            self.writer.flush()
        except OSError as error:
            self.writer = None
            log.warning("TensorBoard's curves end at step %d (%s); log.jsonl has the numbers", step, error)


def _json_line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    hours, minutes, rest = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def gpu_gauges() -> dict[str, float]:
    """Peak memory of this process and utilisation of its GPU; {} without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    from sft.model.hardware import gpu_stats

    stats = gpu_stats() or {}
    values = {"memory_gib": torch.cuda.max_memory_allocated() / 2**30, "utilisation": stats.get("utilisation")}
    values["memory_used_gib"] = stats["memory_used"] / 2**30 if stats else None
    return {f"gpu/{name}": value for name, value in values.items() if value is not None}
