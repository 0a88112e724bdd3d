"""One training step: the batch and its micro-batches, attention that keeps rows apart, loss, forward and backward."""

from __future__ import annotations

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP and peft wrappers."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    get_base = getattr(model, "get_base_model", None)
    base = get_base() if callable(get_base) else model
    assert isinstance(base, nn.Module)
    return base
