"""What a run writes down while it goes on: outputs/<run>/log.jsonl, and the same numbers for TensorBoard.

On a resume, lines of steps after the checkpoint are taken out, and TensorBoard is told to forget those steps: no curve
overlaps itself.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft import files

log = logging.getLogger("sft.training")
# names in the trainer's log -> names in ours
NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "input_wait": "train/input_wait",
    "epoch": "train/epoch",
    "windows_skipped": "train/windows_skipped",
}
Entry = dict[str, Any]


def named(logs: Mapping[str, Any]) -> dict[str, float]:
    """The trainer's log line under our names; `eval_x` is `eval/x`."""
    found = {NAMES[key]: value for key, value in logs.items() if key in NAMES}
    found |= {f"eval/{key[5:]}": value for key, value in logs.items() if key.startswith("eval_")}
    return {key: float(value) for key, value in found.items()}


class JsonLines:
    """log.jsonl: one object a line, `step` first."""

    def __init__(self, path: Path, after_step: int) -> None:
        self.path = path
        kept = [entry for entry in read(path) if entry["step"] <= after_step]
        files.write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._append({"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        self._append({"step": step, name: text})

    def _append(self, entry: Entry) -> None:
        files.append(self.path, json.dumps(entry, ensure_ascii=False) + "\n")

    def keep(self) -> None:
        """Puts the lines on the disk: a checkpoint never knows more than the log beside it."""
        if self.path.exists():
            files.sync(self.path)

    def close(self) -> None:
        """Nothing is held open."""


class Board:
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

    def settings(self, values: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """The HParams tab: what was set, and what came of it; in the run's own folder."""
        from torch.utils.tensorboard.summary import hparams

        flat = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()
        }
        parts: Any = hparams(flat, dict(results))  # type: ignore[no-untyped-call]
        events: Any = self.writer._get_file_writer()  # type: ignore[no-untyped-call]
        for part in parts:
            events.add_summary(part)
        for name, value in results.items():
            self.writer.add_scalar(name, value)
        self.writer.flush()

    def keep(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Logbook(TrainerCallback):  # type: ignore[misc]
    """Writes each of the trainer's log lines to every book.

    gauges: further numbers at that moment (memory, utilisation). samples: the answers of the last evaluation, as text.
    """

    def __init__(
        self, books: list[Any], gauges: Callable[[], dict[str, float]], samples: Callable[[], str | None]
    ) -> None:
        self.books, self.gauges, self.samples = books, gauges, samples

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        values = named(logs) | (self.gauges() if "loss" in logs else {})
        self._each(state.global_step, lambda book: book.numbers(state.global_step, values))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        text = self.samples()
        if state.is_world_process_zero and text:
            self._each(state.global_step, lambda book: book.text(state.global_step, "eval/samples", text))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._each(state.global_step, lambda book: book.keep())

    def _each(self, step: int, do: Callable[[Any], object]) -> None:
        """`do` with every book. The curves are given up where their disk refuses; log.jsonl's refusal ends the run."""
        for book in list(self.books):
            try:
                do(book)
            except OSError as error:
                self.books.remove(book)
                log.warning("TensorBoard's curves end at step %d (%s); log.jsonl has the numbers", step, error)

    def close(self) -> None:
        self._each(0, lambda book: book.close())


def read(path: Path) -> list[Entry]:
    """The entries of a log.jsonl; what a crash cut short or left as rubbish is passed over."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def gpu_gauges() -> dict[str, float]:
    """Peak memory of this process and utilisation of its GPU; nothing where there is none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    from sft.model.hardware import gpu_stats

    found = {"gpu/memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    stats = gpu_stats() or {}
    if "memory_used" in stats:
        found["gpu/memory_used_gib"] = stats["memory_used"] / 2**30
    if "utilisation" in stats:
        found["gpu/utilisation"] = stats["utilisation"]
    return found
