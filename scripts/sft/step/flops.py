"""Floating-point operations of one training step: the formula of each mode, and what was counted while it ran.

A product of [m, k] and [k, n] is 2mkn operations. For each computed token (padding included), by mode:

    frozen base, no checkpointing   4N + 6N_lora +  7 S d L + 4 rho V h
    frozen base, checkpointing      6N + 8N_lora +  9 S d L + 4 rho V h
    full, no checkpointing          6N           +  7 S d L + 6 rho V h
    full, checkpointing             8N           +  9 S d L + 6 rho V h

N the weights of the blocks' linear layers, each used once a token: forward 2N, gradient of the input 2N, gradient of
the weight 2N where it is trained, 2N more for the recomputed forward. S the length of a token's own row, so
sum(s^2) / sum(s); d L the width of attention times layers. Causal attention is counted as half a square: 2 S d forward
and 5 S d backward (five products to the forward's two: FlashAttention-2, Dao 2023). rho the labelled share; V h the
head, whose gradient is formed in the forward pass, so that it is never recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sft.step import unwrap


@dataclass(frozen=True)
class Shape:
    """Weights of the blocks' linear layers, of adapters on them, attention's width times layers, the head's weights."""

    linear: int
    lora: int
    attention: int
    head: int


def a_token(shape: Shape, lengths: Sequence[int], labelled: float, *, frozen: bool, checkpointing: bool) -> float:
    """Operations a computed token. lengths: of the rows in the batch; labelled: share of computed tokens."""
    again = 2 if checkpointing else 0
    own = sum(length**2 for length in lengths) / sum(lengths)
    blocks = (4 if frozen else 6) + again
    lora, attention = (6 + again) * shape.lora, (7 + again) * own * shape.attention
    return blocks * shape.linear + lora + attention + (4 if frozen else 6) * labelled * shape.head


def shape_of(model: nn.Module) -> Shape:
    """Read off a decoder (with or without peft): every matrix outside of the embeddings and the head is a block's."""
    base: Any = unwrap(model)
    head = base.get_output_embeddings().weight
    edges = {id(head), *(id(m.weight) for m in base.modules() if isinstance(m, nn.Embedding))}
    linear = lora = 0
    for name, weight in model.named_parameters():
        state = getattr(weight, "quant_state", None)
        size = state.shape.numel() if state is not None else weight.numel()
        if "lora_" in name:
            lora += size
        elif id(weight) not in edges and (weight.ndim == 2 or state is not None):
            linear += size
    config = base.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = width * config.num_attention_heads * config.num_hidden_layers
    return Shape(linear, lora, attention, head.numel())


def counted(step: Callable[[], object]) -> tuple[float, float]:
    """(all operations, those of attention among them) of what `step` runs, as torch.utils.flop_counter has them.

    The counter takes attention as a whole square, whatever is masked; a causal kernel does half of it, so half of its
    count stands here. It does not know the CPU's kernel, which is counted by the same two functions as the GPU's.
    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def every_head(query: Any, *shared: Any) -> list[Any]:  # torch 2.11 counts no heads that share their keys
        return [(one[0], query[1], *one[2:]) for one in shared]

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, *every_head(query, key, value)))  # type: ignore[no-untyped-call]

    def backward(upstream: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        count = sdpa_backward_flop_count(upstream, query, *every_head(query, key, value))  # type: ignore[no-untyped-call]
        return int(count)

    ops = torch.ops.aten
    cpu = {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        step()
    found = counter.get_flop_counts()["Global"]
    attention = sum(count for name, count in found.items() if "attention" in str(name)) / 2
    return counter.get_total_flops() - attention, attention
