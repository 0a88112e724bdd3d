"""A LoRA layer's update as one function: what it computes, what it stores, and its backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEVELS = 1 << 16  # a dropout probability is rounded to a multiple of 1 / LEVELS


class LoraUpdate(torch.autograd.Function):
    """`result + scaling * dropout(x) @ a.T @ b.T` (Hu et al., 2021), computed in the precision of `result`.

    result [..., out], x [..., in], a [rank, in], b [out, rank]; gradients of a and b in their own precision. For the
    backward pass x is stored, `dropout(x) @ a.T`, and where there is dropout a mask of x's size.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float) -> Tensor:
        dtype = result.dtype
        with torch.autocast(result.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            mask, scaling = keep_mask(rows, dropout), scaling / (1 - _rounded(dropout))
            low_a, low_b = a.to(dtype), (b * scaling).to(dtype)
            hidden = (rows if mask is None else rows * mask) @ low_a.t()
            out = torch.empty(result.shape, dtype=dtype, device=result.device)  # no view: Falcon adds to it in place
            torch.addmm(result.reshape(-1, out.shape[-1]), hidden, low_b.t(), out=out.view(-1, out.shape[-1]))
        ctx.save_for_backward(rows, mask, low_a, low_b, hidden)
        ctx.scaling, ctx.like = scaling, (x.shape, x.dtype, a.dtype, b.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, mask, low_a, low_b, hidden = ctx.saved_tensors
        shape, x_dtype, a_dtype, b_dtype = ctx.like
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_hidden, grad_x = grad @ low_b, None
        grad_a = (grad_hidden.t() @ (rows if mask is None else rows * mask)).to(a_dtype)
        grad_b = (grad.t() @ hidden).to(b_dtype) * ctx.scaling
        if ctx.needs_input_grad[1]:
            grad_x = grad_hidden @ low_a
            grad_x = (grad_x if mask is None else grad_x.mul_(mask)).view(shape).to(x_dtype)
        return grads[0], grad_x, grad_a, grad_b, None, None


def keep_mask(like: Tensor, dropout: float) -> Tensor | None:
    """1 where a number of `like` is kept and 0 where it is dropped, in its shape and type; None where all are kept.

    Four numbers share one draw of 64 bits; `Tensor.bernoulli_` takes 4 times as long on a CPU.
    """
    lowest = round(dropout * LEVELS) - LEVELS // 2
    if lowest == -LEVELS // 2:
        return None
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    lanes = draws.view(torch.int16)[: like.numel()].view(like.shape)
    return lanes.clamp_(lowest - 1, lowest).sub_(lowest - 1).to(like.dtype)


def _rounded(dropout: float) -> float:
    return round(dropout * LEVELS) / LEVELS
