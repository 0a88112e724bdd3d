"""Is the merged model the trained one: loss, first choices and KL of adapter and merged model on held-out rows.

The two run one after the other, each with the memory of one layer (see disk_model); of the first the logits of a small
sample are kept. Sums are float32 in both, so that what differs is what the merge wrote.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.config.schema import Config
from sft.errors import ModelError
from sft.model.files import ModelFiles
from sft.ship import disk_model
from sft.ship.sample import Sample

if TYPE_CHECKING:
    import torch

log = logging.getLogger("sft.ship")
TOLERANCE = 1e-3  # of float32 logits, of their largest
KL_LIMIT = 0.05  # nats a token, of 16-bit weights, whose rounding alone costs about 1e-4
LOSS_LIMIT = 0.02  # nats a token that the held-out loss may rise


@dataclass(frozen=True)
class Agreement:
    """Adapter against merged, on `tokens` tokens of `rows` of the `of` held-out rows in `source`.

    loss_*: nats a labelled token. top1: share of equal first choices. kl: mean, nats a token. largest: difference of
    logits.
    """

    source: str
    rows: int
    of: int
    tokens: int
    loss_adapter: float
    loss_merged: float
    top1: float
    kl: float
    largest: float


def compare(
    files: ModelFiles, merged: ModelFiles, config: Config, adapter: Path, dtype: str, sample: Sample
) -> Agreement:
    """Runs both over the sample. Raises ModelError where they differ by more than rounding does."""
    rows = {key: merged.config[key] for key in ("vocab_size",) if key in merged.config}
    before = logits(files, rows, config, adapter, sample)
    after = logits(merged, {}, config, None, sample)
    largest, kl, top1 = difference(before, after)
    found = Agreement(
        sample.source,
        len(sample.rows),
        sample.of,
        sample.tokens,
        sample.loss(before),
        sample.loss(after),
        top1,
        kl,
        largest,
    )
    log.info(
        f"adapter against merged, {found.tokens} held-out tokens: loss {found.loss_adapter:.4f} and"
        f" {found.loss_merged:.4f}, same first choice in {top1:.2%}, KL {kl:.2g}"
    )
    scale = max(1.0, float(max(part.abs().max() for part in before)))
    if (largest > TOLERANCE * scale) if dtype == "fp32" else (kl > KL_LIMIT):
        raise ModelError(
            f"the merged model is not the trained one: logits differ by up to {largest:.3g}, KL {kl:.3g}",
            where=str(adapter),
            mend="nothing was written; if fp16 or bf16 was asked for, try --dtype fp32, else report this",
        )
    if found.loss_merged > found.loss_adapter + LOSS_LIMIT:
        raise ModelError(
            f"the merge harms: the held-out loss rises from {found.loss_adapter:.4f} to {found.loss_merged:.4f}",
            where=sample.source,
            mend="nothing was written; try --dtype fp32",
        )
    return found


def logits(
    files: ModelFiles, settings: dict[str, Any], config: Config, adapter: Path | None, sample: Sample
) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of each row, float32."""
    import torch

    model = disk_model.open_model(files, settings, trust_remote_code=config.model.trust_remote_code, adapter=adapter)
    with torch.no_grad():
        found: torch.Tensor = model(**sample.batch(files.config)).logits

    return [found[index, :length] for index, length in enumerate(sample.lengths)]


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> tuple[float, float, float]:
    """Largest absolute difference, mean KL(one || other) a token in nats, share of equal first choices."""
    largest = total = same = 0.0
    count = 0
    for first, second in zip(one, other, strict=True):
        log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        same += float((first.argmax(-1) == second.argmax(-1)).sum())
        largest = max(largest, float((first - second).abs().max()))
        count += first.shape[0]
    return largest, max(0.0, total / count), same / count
