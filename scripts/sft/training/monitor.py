"""What a run's losses show: no gradient, an exploding loss, overfitting, no more improvement.

Each warning is given once, when its condition begins. The monitor's state follows from the logged entries alone, so a
resumed run replays them and continues exactly.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from sft.config.schema import EarlyStoppingSection

log = logging.getLogger("sft.training")
NO_GRADIENT_STEPS = 20
GAP = 0.1  # nats of evaluation loss above training loss that count as overfitting (the guides' figure)
RISE = 0.01  # nats above its best from which evaluation loss has risen


class LossMonitor:
    """Follows the logged entries of a run.

    metric: the one that early stopping watches, None for none. `stop_early` says whether it ends the run.
    """

    def __init__(self, metric: str | None, greater_is_better: bool, early: EarlyStoppingSection) -> None:
        self.metric, self.sign, self.early = metric, 1 if greater_is_better else -1, early
        self.stop_early = False
        self._without_gradient = 0  # steps in a row
        self._recent: deque[float] = deque(maxlen=3)
        self._losses = 0
        self._lowest = self._lowest_mean = math.inf
        self._exploding = self._overfitting = False  # whether each was warned of
        self._train_losses: list[float] = []  # logged since the last evaluation
        self._best: tuple[float, float, int] | None = None  # lowest evaluation loss, training loss then, step
        self._best_metric: float | None = None
        self._waited = 0  # evaluations without an improvement

    def gradient(self, norm: float) -> None:
        """Counts steps in a row whose gradient is zero."""
        self._without_gradient = 0 if norm else self._without_gradient + 1
        if self._without_gradient == NO_GRADIENT_STEPS:
            log.warning(
                "no gradient for %d steps: nothing is being trained. Are all labels masked (make preview), is the"
                " learning rate 0, are the adapters on layers that are used?",
                NO_GRADIENT_STEPS,
            )

    def gap(self, eval_loss: float) -> dict[str, float]:
        """`eval_gap`: evaluation loss minus the mean training loss since the last evaluation; {} without any."""
        losses = self._train_losses or list(self._recent)[-1:]
        return {"eval_gap": eval_loss - fmean(losses)} if losses else {}

    def add(self, entry: Mapping[str, Any]) -> str | None:
        """Takes a logged entry into account; returns what the user should be warned of."""
        if "loss" in entry:
            return self._training(float(entry["loss"]), entry["step"])
        if "eval_loss" not in entry:
            return None
        warning, overfits = None, False
        if "eval_gap" in entry:
            loss, train_loss = entry["eval_loss"], entry["eval_loss"] - entry["eval_gap"]
            best, best_train, best_step = self._best or (loss, train_loss, entry["step"])
            if loss > best + RISE and train_loss < best_train and not self._overfitting:
                self._overfitting = True
                warning = (
                    f"overfitting: evaluation loss rose from {best:.4f} at step {best_step} to {loss:.4f}, while"
                    f" training loss fell to {train_loss:.4f}. Try fewer epochs or more rows; train.early_stopping"
                    " decides when that ends a run"
                )
            overfits = loss > best + self.early.min_delta and entry["eval_gap"] > GAP and train_loss < best_train
            if self._best is None or loss < best:
                self._best = (loss, train_loss, entry["step"])
        self._train_losses = []
        self._early_stopping(entry, overfits)
        return warning

    def _training(self, loss: float, step: int) -> str | None:
        """An explosion: the mean of the last three losses is above twice the lowest such mean, and half a nat."""
        self._recent.append(loss)
        self._train_losses.append(loss)
        self._losses += 1
        self._lowest = min(self._lowest, loss)
        if self._losses < 3:
            return None
        mean = fmean(self._recent)
        self._lowest_mean = min(self._lowest_mean, mean)
        was, self._exploding = self._exploding, self._losses >= 6 and mean > 2 * self._lowest_mean + 0.5
        if was or not self._exploding:
            return None
        return (
            f"the loss explodes: {loss:.3f} at step {step}, it was {self._lowest:.3f}. Try a lower train.learning_rate,"
            " or more train.warmup_ratio"
        )

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
