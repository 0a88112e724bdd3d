"""One training step: the window cut into micro-batches, attention that keeps rows apart, the head and its loss."""

from __future__ import annotations

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP and peft wrappers."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    get = getattr(model, "get_base_model", None)
    found = get() if callable(get) else model
    assert isinstance(found, nn.Module)
    return found
