"""Activations that wait for the backward pass in the machine's memory (`train.activation_offload`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALL = 2**20  # bytes: what is smaller stays, for it is not worth the way
GAPS = 1.25  # times the room of the numbers that strides may take up and still be kept


def offloading() -> saved_tensors_hooks:
    """A context in which what autograd keeps leaves a GPU for pinned memory, and comes back when it is needed.

    As `torch.autograd.graph.save_on_cpu`, but that weights stay, which are on the GPU anyway, and strides come back:
    attention's kernels want the padding of a mask's rows, and an expanded mask is kept once. The same bits come back.
    Strides that take up much more room than the numbers do (half of a fused projection) are not kept.
    """

    def away(tensor: Tensor) -> Tensor | tuple[torch.device, torch.Size, Tensor]:
        once = tensor[tuple(slice(None) if step else slice(0, 1) for step in tensor.stride())]
        if stays(tensor) or stays(once):
            return tensor
        spans = 1 + sum((size - 1) * step for size, step in zip(once.shape, once.stride(), strict=True))
        like = once if once.numel() <= spans <= GAPS * once.numel() else torch.empty(once.shape, device="meta")
        kept = torch.empty_strided(once.shape, like.stride(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, tensor.shape, kept.copy_(once, non_blocking=tensor.is_cuda)

    def back(found: Tensor | tuple[torch.device, torch.Size, Tensor]) -> Tensor:
        if isinstance(found, Tensor):
            return found
        device, shape, kept = found
        there = torch.empty_strided(kept.shape, kept.stride(), dtype=kept.dtype, device=device)
        return there.copy_(kept, non_blocking=True).expand(shape)

    return saved_tensors_hooks(away, back)


def stays(tensor: Tensor) -> bool:
    """Whether it is left on the GPU: weights, and what is small."""
    whole = tensor if tensor._base is None else tensor._base
    return isinstance(whole, nn.Parameter) or tensor.numel() * tensor.element_size() < SMALL
