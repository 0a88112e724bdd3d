"""What the rows' own answers cost a model: the mean loss over the labelled tokens, as in training."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from sft.config.schema import Config
from sft.generation.serving import Served
from sft.step import attention
from sft.step.microbatch import loss_sum, out_of_memory
from sft.step.window import Collator, MicroBatch, cut

log = logging.getLogger("sft.generation")
LOSS_TOKENS = 4096
Row = dict[str, Any]


def losses(served: Served, rows: Sequence[Row], config: Config) -> dict[str, float]:
    """Mean cross-entropy over the rows' labelled tokens (as in training), and its exponential, the perplexity."""
    encoded = [served.encoder.encode(row) for row in rows]
    features = [
        {"input_ids": one.input_ids, "labels": one.labels}
        for one in sorted(encoded, key=lambda one: -len(one.input_ids))
        if one.dropped is None
    ]
    if left_out := len(rows) - len(features):
        log.warning(
            "%d of %d rows have no loss (too long, or no label left): `make preview` shows them", left_out, len(rows)
        )
    apart = served.kind == "causal" and attention.keeps_rows_apart(served.model)
    collate, tokens = Collator(served.kind), LOSS_TOKENS
    total, count, at = 0.0, 0, 0
    while at < len(features):
        batch = {name: value.to(served.device) for name, value in collate(features[at : at + 64]).items()}
        try:
            sums = [_loss(served, micro, config) for micro in cut(batch, tokens=tokens, apart=apart)]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or tokens < 16:
                raise
            tokens //= 2
            continue
        total, count, at = total + sum(s for s, _ in sums), count + sum(n for _, n in sums), at + 64
    if not count:
        return {}
    mean = total / count
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}


def _loss(served: Served, micro: MicroBatch, config: Config) -> tuple[float, int]:
    with torch.no_grad():
        value, count = loss_sum(served.model, micro, logits=config.train.logits, tile=config.train.logits_tile)
    return float(value), count
