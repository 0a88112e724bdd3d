"""What happens after each step: log, evaluate, save, stop. All of it at the step boundary, evaluation before saving,
so that a checkpoint always knows the evaluation of its own step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.config.schema import EarlyStoppingSection
from sft.training.numbers import learnt_by_heart
from sft.training.plan import Plan
from sft.training.signals import SignalHandler


class Flow(TrainerCallback):  # type: ignore[misc]
    """Takes the place of the library's own flow, which saves a step before the evaluation that ends its epoch."""

    def __init__(self, plan: Plan, watch: SignalHandler, early: EarlyStoppingSection) -> None:
        self.plan, self.watch, self.early = plan, watch, early

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        step, plan = state.global_step, self.plan
        last = step >= plan.total_steps
        stopping = self.watch.asked_to_stop()
        control.should_log = step == 1 or last or stopping or step % plan.log_every == 0
        control.should_evaluate = plan.due(plan.evaluate, plan.eval_steps, step)
        control.should_save = stopping or self.watch.asked_to_save() or plan.due(plan.save, plan.save_steps, step)
        control.should_training_stop = last or stopping
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.exhausted(state):
            control.should_training_stop = control.should_save = True
        return control

    def exhausted(self, state: TrainerState) -> bool:
        """Whether early stopping has had enough. Worked out from the logged evaluations, so that resuming is exact."""
        if not self.early.enabled or self.plan.watched is None:
            return False
        if self.early.enabled == "overfitting" and not learnt_by_heart(state.log_history, self.early.min_delta):
            return False
        key = f"eval_{self.plan.watched}"
        values = [float(entry[key]) for entry in state.log_history if key in entry]
        return no_better_for(values, self.early.min_delta, greater=self.plan.greater_is_better) >= self.early.patience

    def complete(self, state: TrainerState) -> bool:
        """Whether a run in this state has no step left to take."""
        return state.global_step >= self.plan.total_steps or self.exhausted(state)


def no_better_for(values: Sequence[float], min_delta: float, *, greater: bool) -> int:
    """How many values since the last one that beat the best before it by more than `min_delta`."""
    best, waited = None, 0
    for value in values:
        gain = float("inf") if best is None else (value - best if greater else best - value)
        if gain > min_delta:
            best, waited = value, 0
        else:
            waited += 1
    return waited
