"""Activations that wait for the backward pass in the machine's memory (`train.activation_offload`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALL = 2**20  # bytes: what is smaller stays, for it is not worth the way


def offloading() -> saved_tensors_hooks:
    """A context in which what autograd keeps leaves a GPU for pinned memory, and comes back when it is needed.

    As `torch.autograd.graph.save_on_cpu`, but that weights stay, which are on the GPU anyway. The same bits come back.
    """

    def away(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if stays(tensor):
            return tensor
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, kept.copy_(tensor, non_blocking=tensor.is_cuda)

    def back(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[1].to(kept[0], non_blocking=True)

    return saved_tensors_hooks(away, back)


def stays(tensor: Tensor) -> bool:
    """Whether it is left on the GPU: weights, and what is small."""
    return isinstance(tensor, nn.Parameter) or tensor.numel() * tensor.element_size() < SMALL
