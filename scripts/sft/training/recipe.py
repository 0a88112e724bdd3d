"""How a window is computed: the budget of a micro-batch, the head, the precision. What changes speed, not the step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from sft.config.schema import TrainSection
from sft.step.batch import Batch, Collator, Kind, split_micro_batches
from sft.step.step import finer, loss_sum, offloading, out_of_memory, release

log = logging.getLogger("sft.training")
AT_ONCE = 256  # rows that are cut together when evaluating


@dataclass
class Recipe:
    """tokens: of a micro-batch, padding included; lowered when memory runs out. rows: its cap, None for none.

    evaluating: what evaluation was lowered to when memory ran out there, None where it never did. apart: rows kept
    apart without padding. autocast: the 16-bit type to compute in, None for the weights' own.
    offload: see `step.offload`.
    """

    kind: Kind
    device: str
    tokens: int
    rows: int | None
    apart: bool
    logits: Any
    tile: int
    label_smoothing: float
    autocast: torch.dtype | None
    evaluating: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        self.asked = self.budget

    @property
    def budget(self) -> list[Any]:
        """All that decides how a window is cut: tokens, rows, padding-free or not."""
        return [self.tokens, self.rows, self.apart]

    def lower(self, tokens: int) -> None:
        """Keeps the budget that fitted."""
        self.tokens = tokens

    def computing(self) -> AbstractContextManager[object]:
        """The precision to compute in, and where what autograd keeps waits."""
        found = contextlib.ExitStack()
        if self.autocast is not None:
            found.enter_context(torch.autocast(torch.device(self.device).type, dtype=self.autocast))
        if self.offload:
            found.enter_context(offloading())
        return found


def compute_dtype(train: TrainSection) -> torch.dtype:
    """The 16-bit type that the resolved config asks for, else fp32."""
    if train.bf16 is True:
        return torch.bfloat16
    return torch.float16 if train.fp16 is True else torch.float32


def losses(model: torch.nn.Module, features: Sequence[Any], recipe: Recipe) -> torch.Tensor:
    """Sum of the loss over the labelled tokens of `features`, and their number: fp64 [2]. Label smoothing left out."""
    found = torch.zeros(2, dtype=torch.float64, device=recipe.device)
    if not features:
        return found
    rows = sorted(features, key=lambda row: (len(row["input_ids"]), len(row["labels"])))
    with torch.no_grad(), recipe.computing():
        for start in range(0, len(rows), AT_ONCE):
            flat = Collator(recipe.kind)(rows[start : start + AT_ONCE])
            found += _of_window(model, {name: tensor.to(recipe.device) for name, tensor in flat.items()}, recipe)
    return found


def _of_window(model: torch.nn.Module, window: Batch, recipe: Recipe) -> torch.Tensor:
    """The sum and the number for one window, from its start again with half the budget when memory runs out."""
    while True:
        tokens = min(recipe.evaluating or recipe.tokens, recipe.tokens)
        micros = split_micro_batches(window, tokens=tokens, rows=recipe.rows, apart=recipe.apart)
        try:
            taken = [loss_sum(model, micro, logits=recipe.logits, tile=recipe.tile) for micro in micros]
            loss = torch.stack([loss.double() for loss, _ in taken]).sum()
            return torch.stack([loss, loss.new_tensor(sum(count for _, count in taken))])
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        release()
        recipe.evaluating = finer(micros, tokens)
        log.warning("out of memory while evaluating: going on in micro-batches of at most %d tokens", recipe.evaluating)
