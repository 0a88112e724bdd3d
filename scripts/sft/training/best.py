"""The best checkpoint of a run: which evaluation made it, and what takes its place where its files are damaged."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft import files
from sft.runs import Run
from sft.training.checkpoint import folder_of
from sft.training.plan import Plan

log = logging.getLogger("sft.training")
History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Best:
    """An evaluation: its step, and the value of the metric that is watched."""

    step: int
    value: float


def ranked(history: History, plan: Plan) -> list[Best]:
    """The logged evaluations that may be best (enough answers stop), the best one first, of equal ones the older."""
    key = f"eval_{plan.watched}"
    found = [
        Best(entry["step"], float(entry[key]))
        for entry in history
        if key in entry and entry.get("eval_stop_rate", 1.0) >= plan.min_stop_rate
    ]
    found = [one for one in found if math.isfinite(one.value)]
    return sorted(found, key=lambda one: -one.value if plan.greater_is_better else one.value)


def standing(
    history: Sequence[Mapping[str, Any]], plan: Plan, run: Run, *, now: int
) -> tuple[Best | None, Best | None]:
    """The best evaluation whose weights are still there, and the better one that was lost, if any; the loss is said.

    now: the step whose weights the model has, which need no checkpoint.
    """
    order = ranked(history, plan)
    kept = next((one for one in order if one.step == now or not files.manifest_problem(folder_of(run, one.step))), None)
    if not order or kept == order[0]:
        return kept, None
    lost, name = order[0], f"checkpoint-{order[0].step}"
    log.warning(
        "the best checkpoint, %s (%s %.4f), cannot be used: %s. %s",
        name,
        plan.watched,
        lost.value,
        files.manifest_problem(folder_of(run, lost.step)),
        f"The best that is left is step {kept.step} ({kept.value:.4f})" if kept else "No other evaluated one is left",
    )
    return kept, lost
