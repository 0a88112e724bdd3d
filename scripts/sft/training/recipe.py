"""How a window is computed: the budget of a micro-batch, the head, the precision. What changes speed, not the step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from sft.config.schema import TrainSection
from sft.step.microbatch import loss_sum
from sft.step.window import Collator, Kind, cut

AT_ONCE = 256  # rows that are cut together when evaluating


@dataclass
class Recipe:
    """tokens: of a micro-batch, padding included; lowered when memory runs out. rows: its cap, None for none.

    apart: rows kept apart without padding. autocast: the 16-bit type to compute in, None for the weights' own.
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
        """The precision to compute in."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=self.autocast)


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
            window = {name: tensor.to(recipe.device) for name, tensor in flat.items()}
            for micro in cut(window, tokens=recipe.tokens, rows=recipe.rows, apart=recipe.apart):
                loss, count = loss_sum(model, micro, logits=recipe.logits, tile=recipe.tile)
                found += torch.stack([loss.double(), torch.tensor(count, device=loss.device, dtype=torch.float64)])
    return found
