"""What a layer is: linear or not, how wide, the head or not. By class and by what the model says, never by name."""

from __future__ import annotations

from typing import Any


def head(model: Any) -> Any:
    """The module that turns hidden states into logits, None where the model says none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def is_linear(module: Any) -> bool:
    """Whether this is a linear layer: nn.Linear, bitsandbytes' kinds (they derive from it), or GPT-2's Conv1D."""
    from torch import nn

    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: Any) -> bool:
    """Whether this is GPT-2's Conv1D, which stores its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def widths(layer: Any) -> tuple[int, int]:
    """(input, output) features of a linear layer, also of a 4-bit one and of Conv1D."""
    return (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else (layer.nx, layer.nf)


def hits(target: str, name: str) -> bool:
    """Whether peft's target `target` means the layer called `name`."""
    return name == target or name.endswith("." + target)


def last(name: str) -> str:
    """The last part of a dotted name."""
    return name.rpartition(".")[2]
