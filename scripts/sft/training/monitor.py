"""What a run's numbers show: speed, no gradient, an exploding loss, overfitting, no more improvement.

Each warning is given once, when its condition begins. The monitor's state follows from the logged entries alone, so a
resumed run replays them and continues exactly.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any, NamedTuple

from sft.config.schema import EarlyStoppingSection

log = logging.getLogger("sft.training")
NO_GRADIENT_STEPS = 20
GAP = 0.1  # nats of evaluation loss above training loss that count as overfitting (the guides' figure)
RISE = 0.01  # nats above its best from which evaluation loss has risen


class Evaluation(NamedTuple):
    """One evaluation: its loss, and the mean training loss logged since the one before."""

    step: int
    loss: float
    train_loss: float


class LossMonitor:
    """Follows the logged entries of a run.

    metric: the one that early stopping watches, None for none. `stop_early` says whether it ends the run.
    """

    def __init__(self, metric: str | None, greater_is_better: bool, early: EarlyStoppingSection) -> None:
        self.metric, self.sign, self.early = metric, 1 if greater_is_better else -1, early
        self.stop_early = False
        self._still = 0  # steps in a row without a gradient
        self._recent: deque[float] = deque(maxlen=3)
        self._losses = 0
        self._lowest = self._lowest_mean = math.inf
        self._exploding = False
        self._train_losses: list[float] = []  # logged since the last evaluation
        self._best: Evaluation | None = None
        self._previous: Evaluation | None = None
        self._diverged = self._wide_gap = False  # whether each was seen before
        self._best_metric: float | None = None
        self._waited = 0  # evaluations without an improvement

    def gradient(self, norm: float) -> None:
        """Counts steps in a row whose gradient is zero."""
        self._still = 0 if norm else self._still + 1
        if self._still == NO_GRADIENT_STEPS:
            log.warning(
                "no gradient for %d steps: nothing is being trained. Are all labels masked (make preview), is the"
                " learning rate 0, are the adapters on layers that are used?",
                NO_GRADIENT_STEPS,
            )

    def gap(self, eval_loss: float) -> dict[str, float]:
        """`eval_gap`: evaluation loss minus the mean training loss since the last evaluation; {} without any."""
        losses = self._train_losses or list(self._recent)[-1:]
        return {"eval_gap": eval_loss - fmean(losses)} if losses else {}

    def add(self, entry: Mapping[str, Any]) -> list[str]:
        """Takes a logged entry into account; returns what the user should be warned of."""
        if "loss" in entry:
            return self._training(float(entry["loss"]), entry["step"])
        if "eval_loss" not in entry:
            return []
        warnings: list[str] = []
        overfits = False
        if "eval_gap" in entry:
            now = Evaluation(entry["step"], entry["eval_loss"], entry["eval_loss"] - entry["eval_gap"])
            warnings, overfits = self._evaluation(now)
        self._train_losses = []
        self._early_stopping(entry, overfits)
        return warnings

    def _training(self, loss: float, step: int) -> list[str]:
        """An explosion: the mean of the last three losses is above twice the lowest such mean, and half a nat."""
        self._recent.append(loss)
        self._train_losses.append(loss)
        self._losses += 1
        self._lowest = min(self._lowest, loss)
        if self._losses < 3:
            return []
        mean = fmean(self._recent)
        self._lowest_mean = min(self._lowest_mean, mean)
        was, self._exploding = self._exploding, self._losses >= 6 and mean > 2 * self._lowest_mean + 0.5
        if was or not self._exploding:
            return []
        return [
            f"the loss explodes: {loss:.3f} at step {step}, it was {self._lowest:.3f}. Try a lower train.learning_rate,"
            " or more train.warmup_ratio"
        ]

    def _evaluation(self, now: Evaluation) -> tuple[list[str], bool]:
        """Warnings of overfitting, and whether evaluation loss has risen above its best while training loss fell."""
        warnings: list[str] = []
        best, previous = self._best or now, self._previous
        if previous is not None:
            rose = now.loss > max(previous.loss, best.loss + RISE) and now.train_loss < previous.train_loss
            if rose and not self._diverged:
                warnings.append(
                    f"overfitting: evaluation loss rose to {now.loss:.4f} while training loss fell to"
                    f" {now.train_loss:.4f}; it was best at step {best.step} ({best.loss:.4f});"
                    " train.early_stopping decides when that ends a run"
                )
            self._diverged = self._diverged or rose
        gap = now.loss - now.train_loss
        if previous is not None and gap > GAP and not self._wide_gap:
            warnings.append(
                f"evaluation loss is {gap:.3f} above training loss (more than {GAP}): the model is starting to overfit."
                " Try fewer epochs, more rows or more dropout"
            )
        self._wide_gap = self._wide_gap or gap > GAP
        overfits = now.loss > best.loss + self.early.min_delta and gap > GAP and now.train_loss < best.train_loss
        self._previous = now
        self._best = now if now.loss < best.loss or self._best is None else best
        return warnings, overfits

    def _early_stopping(self, entry: Mapping[str, Any], overfits: bool) -> None:
        """Counts evaluations since the watched metric last improved by more than `min_delta`."""
        value = entry.get(f"eval_{self.metric}")
        if value is None or not self.early.enabled:
            return
        best = self._best_metric
        if math.isfinite(value) and (best is None or self.sign * (value - best) > self.early.min_delta):
            self._best_metric, self._waited = value, 0
        else:
            self._waited += 1
        exhausted = self._waited >= self.early.patience
        self.stop_early = exhausted and (overfits or self.early.enabled is True)


class Throughput:
    """Tokens, labelled tokens and seconds of all steps since the run's first start, and the seconds spent loading."""

    def __init__(self) -> None:
        self.tokens = self.labelled = 0
        self.seconds = self.waited = 0.0
        self._began = 0.0
        self._logged = (0, 0.0, 0.0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as time spent waiting for a batch."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def begin_step(self) -> None:
        self._began = time.monotonic()

    def count(self, tokens: int, labelled: int) -> None:
        """Adds a step's tokens, over all ranks."""
        self.tokens += tokens
        self.labelled += labelled

    def end_step(self) -> None:
        self.seconds += time.monotonic() - self._began

    def since_last_entry(self) -> dict[str, float]:
        """Tokens a second of the steps since the last call, and the share of the time that loading batches took."""
        now = (self.tokens, self.seconds, self.waited)
        tokens, seconds, waited = (new - old for new, old in zip(now, self._logged, strict=True))
        self._logged = now
        return {
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "input_wait": waited / max(seconds + waited, 1e-9),
        }

    def state(self) -> dict[str, float]:
        """What a checkpoint stores of it."""
        return {"tokens": self.tokens, "labelled": self.labelled, "seconds": self.seconds}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` returned."""
        self.tokens, self.labelled = int(state["tokens"]), int(state["labelled"])
        self.seconds = float(state["seconds"])
        self._logged = (self.tokens, self.seconds, self.waited)
