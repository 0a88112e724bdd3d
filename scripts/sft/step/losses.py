"""Losses over logits: sums of cross-entropy in fp32, and the gradient of such a sum formed in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Transform:
    """What a model does to its head's output: `softcap * tanh(scale * z / softcap)`; identity by default.

    Gemma 2 caps (`final_logit_softcapping`), Cohere and Granite scale (`logit_scale`, `logits_scaling`).
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision that losses are summed in: fp32, or fp64 for a model in fp64."""
    return torch.promote_types(dtype, torch.float32)


def cross_entropy_sum(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum over positions of the cross-entropy. logits [N, V] of any precision, targets [N] without ignored ones.

    With smoothing e the target is (1 - e) on the token and e spread evenly over the vocabulary (Szegedy et al., 2016).
    """
    return functional.cross_entropy(logits.to(wide(logits.dtype)), targets, reduction="sum", label_smoothing=smoothing)


def tile_gradient_(raw: Tensor, targets: Tensor, transform: Transform, smoothing: float) -> Tensor:
    """Sum of cross-entropy over one tile; overwrites `raw` [n, V] (fp32 or fp64) with that sum's gradient to it."""
    logits = transform(raw) if transform != Transform() else raw
    bend = None
    if transform.softcap:
        bend = (1 - (logits / transform.softcap).square()) * transform.scale
    picked = logits.gather(1, targets[:, None])[:, 0]
    mean = logits.mean(dim=1) if smoothing else 0.0
    top = logits.amax(dim=1, keepdim=True)
    torch.sub(logits, top, out=raw).exp_()
    total = raw.sum(dim=1, keepdim=True)
    loss = (top + total.log())[:, 0] - (1 - smoothing) * picked - smoothing * mean
    raw.div_(total)
    if smoothing:
        raw.sub_(smoothing / raw.shape[1])
    raw.scatter_add_(1, targets[:, None], torch.full_like(picked, smoothing - 1)[:, None])
    if bend is not None:
        raw.mul_(bend)
    elif transform.scale != 1.0:
        raw.mul_(transform.scale)
    return loss.sum()
