"""What a run's numbers say: not finite, no gradient, exploding, overfitting. Each is said once, when it begins."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.errors import RunError
from sft.runs import Run
from sft.training import distributed

log = logging.getLogger("sft.training")
History = Sequence[Mapping[str, Any]]
STILL, GAP = 20, 0.1  # steps without a gradient; evaluation loss above training loss, in nats (the guides' figure)
RISE = 0.01  # nats above its best before evaluation loss has risen


class Numbers(TrainerCallback):  # type: ignore[misc]
    """Judges losses and gradients. `skipped` has the windows that were dropped: {"step", "what", "rows"}.

    alone: the ids among those given whose loss is not finite when they are computed alone.
    """

    def __init__(self, on_nan: str, run: Run, alone: Callable[[list[str]], list[str]]) -> None:
        self.on_nan, self.run, self.alone = on_nan, run, alone
        self.skipped: list[dict[str, Any]] = []
        self.last = 0.0
        self._still = 0

    def finite(self, value: float, what: str, step: int, ids: list[str]) -> bool:
        """Whether `value` is finite; if not, and the config says `skip`, the window is counted as dropped.

        Raises RunError under `stop`, with the ids of the step's rows over all ranks.
        """
        if math.isfinite(value):
            return True
        rows = [name for share in distributed.all_gather(ids) for name in share]
        alone = [name for share in distributed.all_gather(self.alone(ids)) for name in share]
        where = f"the rows of this step: {', '.join(rows)}"
        if alone and len(alone) < len(rows):
            where += f"; not finite by themselves: {', '.join(alone)}"
        if self.on_nan == "skip":
            self.skipped.append({"step": step, "what": f"{what} is {value}", "rows": rows})
            log.warning("step %d is skipped, window %d so far: the %s is %s (%s)",
                        step, len(self.skipped), what, value, where)  # fmt: skip
            return False
        kept = [path.name for path in self.run.checkpoints()]
        raise RunError(
            f"the {what} is {value} at step {step}: nothing can be learnt from here on",
            where=where,
            fix="look at those rows (make preview), lower train.learning_rate, use bf16 instead of fp16, or"
            " --set train.on_nan=skip; " + (f"{kept[-1]} is from before" if kept else "there is no checkpoint yet"),
        )

    def gradient(self, norm: float) -> None:
        """Counts the steps in a row whose gradient is nothing at all."""
        self._still = 0 if norm else self._still + 1
        if self._still == STILL:
            log.warning(
                "no gradient for %d steps: nothing is learnt. Are the labels masked (make preview), the rate 0,"
                " the adapters on layers that are used?",
                STILL,
            )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        losses = [float(entry["loss"]) for entry in state.log_history if "loss" in entry]
        if state.log_history and "loss" in state.log_history[-1] and exploded(losses) and not exploded(losses[:-1]):
            log.warning(
                "the loss explodes: %.3f at step %d, it was %.3f. A lower train.learning_rate, or more"
                " train.warmup_ratio, would help",
                losses[-1],
                state.global_step,
                min(losses),
            )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for line in overfitting(state.log_history):
            log.warning(line)


def exploded(losses: Sequence[float]) -> bool:
    """Whether the last three logged losses are, on average, above twice the lowest three in a row, and half a nat."""
    if len(losses) < 6:
        return False
    threes = [fmean(losses[end - 3 : end]) for end in range(3, len(losses) + 1)]
    return threes[-1] > 2 * min(threes) + 0.5


def gap(history: History, eval_loss: float) -> dict[str, float]:
    """`eval_gap`: evaluation loss less the mean training loss logged since the evaluation before; {} without any."""
    last = max((index for index, entry in enumerate(history) if "eval_loss" in entry), default=-1)
    losses = [float(entry["loss"]) for entry in history[last + 1 :] if "loss" in entry]
    losses = losses or [float(entry["loss"]) for entry in history if "loss" in entry][-1:]
    return {"eval_gap": eval_loss - fmean(losses)} if losses else {}


def overfitting(history: History) -> list[str]:
    """What the evaluations so far say about learning by heart, of the newest one."""
    seen = [entry for entry in history if "eval_loss" in entry and "eval_gap" in entry]
    if len(seen) < 2:
        return []
    now = seen[-1]
    best = min(seen[:-1], key=lambda entry: float(entry["eval_loss"]))
    said = []
    if _parted(seen) and not any(_parted(seen[:end]) for end in range(2, len(seen))):
        said.append(
            f"overfitting: evaluation loss rose to {now['eval_loss']:.4f} while training loss fell to"
            f" {now['eval_loss'] - now['eval_gap']:.4f};"
            f" it was best at step {best['step']} ({best['eval_loss']:.4f});"
            " train.early_stopping says when that ends a run"
        )
    if now["eval_gap"] > GAP and all(entry["eval_gap"] <= GAP for entry in seen[:-1]):
        said.append(
            f"evaluation loss is {now['eval_gap']:.3f} above training loss (more than {GAP}): the rows begin to be"
            " learnt by heart. Fewer epochs, more rows or more dropout would help"
        )
    return said


def learnt_by_heart(history: History, min_delta: float) -> bool:
    """Whether evaluation loss is now over `min_delta` (nats) above its best, training loss below what it was then, and
    the two `GAP` apart.
    """
    seen = [entry for entry in history if "eval_loss" in entry and "eval_gap" in entry]
    if not seen:
        return False
    now, best = seen[-1], min(seen, key=lambda entry: float(entry["eval_loss"]))
    fell = now["eval_loss"] - now["eval_gap"] < best["eval_loss"] - best["eval_gap"]
    return bool(now["eval_loss"] > best["eval_loss"] + min_delta and now["eval_gap"] > GAP and fell)


def _parted(seen: History) -> bool:
    """Whether, at the last evaluation, evaluation loss rose, `RISE` above its best, while training loss fell."""
    before, now = seen[-2], seen[-1]
    train = [entry["eval_loss"] - entry["eval_gap"] for entry in (before, now)]
    best = min(float(entry["eval_loss"]) for entry in seen)
    return bool(now["eval_loss"] > max(float(before["eval_loss"]), best + RISE) and train[1] < train[0])
