"""How the rows of one optimizer step are shared out over micro-batches."""

from __future__ import annotations

import math
from typing import Literal

from sft.config.verdict import unequal_batches

EFFECTIVE_BATCH = 16


def batch_plan(
    effective_batch: int | Literal["auto"],
    batch_size: int | Literal["auto"],
    grad_accum: int | Literal["auto"],
    measured: int | None,
) -> tuple[int, int, int]:
    """(rows of a step, most rows of a micro-batch, micro-batches of a step), from what is given.

    Both given: their product is the step. grad_accum alone: ceil(effective / grad_accum). batch_size alone: it caps a
    micro-batch. Neither: `measured` rows caps it, evened out over the micro-batches. A part alone that is larger than
    an `auto` step makes the step as large.
    Raises ConfigError when all three are given and unequal.
    """
    if batch_size != "auto" and grad_accum != "auto":
        product = batch_size * grad_accum
        if effective_batch not in ("auto", product):
            raise unequal_batches(int(effective_batch), batch_size, grad_accum, where="the section train")
        return product, batch_size, grad_accum
    given = [part for part in (batch_size, grad_accum) if part != "auto"]
    effective = max([EFFECTIVE_BATCH, *given]) if effective_batch == "auto" else effective_batch
    if grad_accum != "auto":
        batch = math.ceil(effective / grad_accum)
    elif batch_size != "auto":
        batch = min(batch_size, effective)
    else:
        batch = math.ceil(effective / math.ceil(effective / max(1, min(measured or 1, effective))))
    return effective, batch, math.ceil(effective / batch)


def agree(effective: int, batch: int, accum: int) -> bool:
    """Whether three settled numbers fit together, where the last micro-batch of a step may be smaller."""
    return batch * accum == effective or accum == math.ceil(effective / batch)
