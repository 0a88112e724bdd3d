"""Stand-ins for what a trace cannot run: attention kernels by what they allocate, and an optimizer that is followed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sft.config.schema import TrainSection
from sft.memory.live import Live
from sft.memory.memo import moments
from sft.step import attention as rows

NAME = "sft_traced"
_lengths: list[int] = []
_device = ["cuda"]


def choose(device: str, description: Mapping[str, Any]) -> tuple[str, bool]:
    """The attention to draw the model with, and whether rows go through it padding-free, as training would choose.

    description: the model's config.json. An Ampere card or newer is assumed where the device is a GPU.
    """
    if not rows.serves(description):
        return rows.fallback(description), False
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    _device[:] = [device]
    return NAME, True


def rows_are(lengths: Sequence[int]) -> None:
    """The lengths of the rows that the next trace packs."""
    _lengths[:] = lengths


def optimizer(trained: list[nn.Parameter], train: TrainSection, live: Live, *, device: str) -> Any:
    """An optimizer with its state in place, where its step allocates something worth following; else None.

    Where it is None (`memo.moments`) state is beside the trace: on a GPU AdamW is fused and works in place.
    """
    if moments(train.optim, device) is not None:
        return None
    live.default = "optimizer"
    try:
        made = torch.optim.AdamW(trained, lr=1e-4, weight_decay=train.weight_decay)
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        made.step()
        made.zero_grad()
        return made
    finally:
        live.default = "activations"


def _mask(batch_size: int, q_length: int, kv_length: int, *_: Any, **__: Any) -> Tensor | None:
    """None for packed rows, whose boundaries take nothing; else the mask of padded rows, as SDPA takes it."""
    return torch.empty((batch_size, 1, q_length, kv_length), dtype=torch.bool) if batch_size > 1 else None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`step.attention.rows_attention` on fake tensors: [B, heads, T, width] to [B, T, heads, width]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.shape[0] > 1 or query.shape[2] != key.shape[2]:
        return _padded(module, query, key, value, attention_mask, dropout, scaling)
    if _device[0] == "cuda":
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        out: Tensor = _Flash.apply(q, k, v)  # type: ignore[no-untyped-call]
        return out[None], None
    parts = [
        sdpa_attention_forward(module, q, k, v, None, dropout=dropout, scaling=scaling, is_causal=True)[0]
        for q, k, v in zip(*(torch.split(t, _lengths, dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=1), None


def _padded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, None]:
    """Padded rows, or a cache: transformers' SDPA; on a GPU its fused kernel, for which shared keys are spread out."""
    if _device[0] == "cpu":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: Tensor = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)[0]
        return out, None
    shared = query.shape[1] // key.shape[1]
    spread = [each.repeat_interleave(shared, 1) for each in (key, value)] if shared > 1 and mask is not None else []
    made = torch.empty((query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), dtype=query.dtype)
    del spread
    return made, None


class _Flash(torch.autograd.Function):
    """What FlashAttention 2 for rows of different lengths allocates (varlen_attn): [T, heads, width] each.

    Kept for the backward pass: its inputs, its output and one fp32 a row and head. There: the gradients, the query's
    summed in fp32, those of shared keys and values once a query head before they are added up.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype)
        sums = torch.empty((query.shape[1], query.shape[0]), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, sums = ctx.saved_tensors
        summed = [torch.empty(query.shape, dtype=torch.float32), torch.empty_like(sums)]
        shared = query.shape[1] != key.shape[1]
        wide = [torch.empty_like(query), torch.empty_like(query)] if shared else []
        grads = tuple(torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value))
        del summed, wide
        return grads  # type: ignore[return-value]
