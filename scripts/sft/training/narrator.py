"""What a person sees while a run trains: how far it is, the loss, the speed, the time left, each evaluation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger("sft.training")
Report = Callable[[int, int, str], None]  # steps done, steps in all, what to show beside them


class Narrator(TrainerCallback):  # type: ignore[misc]
    """Tells `report` of every step, for a bar; without one (no terminal), logs a line at each log interval."""

    def __init__(self, report: Report | None) -> None:
        self.report = report
        self._shown = ""
        self._began: tuple[float, int] | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._began is None:
            self._began = (time.monotonic(), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.report is not None and state.is_world_process_zero:
            self.report(state.global_step, state.max_steps, self._shown)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            log.info("step %d: %s", state.global_step, evaluation_line(logs))
        if "loss" not in logs:
            return
        self._shown = f"loss {logs['loss']:.4f}  {logs['tokens_per_second']:,.0f} tok/s"
        if self.report is not None:
            self.report(state.global_step, state.max_steps, self._shown)
        else:
            left = self._left(state)
            log.info(
                "step %d/%d  %s  lr %.2e%s",
                state.global_step,
                state.max_steps,
                self._shown,
                logs["learning_rate"],
                left,
            )

    def _left(self, state: TrainerState) -> str:
        if self._began is None or state.global_step <= self._began[1]:
            return ""
        pace = (time.monotonic() - self._began[0]) / (state.global_step - self._began[1])
        return f"  {clock(pace * (state.max_steps - state.global_step))} left"


def evaluation_line(logs: Mapping[str, Any]) -> str:
    """An evaluation's metrics on one line, the loss first."""
    shown = {key[5:]: value for key, value in logs.items() if key.startswith("eval_") and key != "eval_seconds"}
    return "eval " + "  ".join(f"{name} {value:.4f}" for name, value in shown.items())


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
