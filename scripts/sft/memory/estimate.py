"""Memory by formula, where nothing is traced: presumed overhead, an upper bound, what the quick start offers.

Imports no torch: `make check` and the quick start use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.config.schema import PAIRED, Config

GIB = float(2**30)
# What a tensor trace cannot see. Presumed for CUDA: no consumer card has been measured yet (docs/MEMORY.md).
# CONTEXT, GiB: the CUDA context with cuBLAS's workspaces; on a CPU, Python with torch (0.40-0.53) and its kernels.
# FRAGMENTATION: what PyTorch's caching allocator holds beyond the allocated bytes, as a share of them; on a CPU, blocks
# that glibc does not return, as a share of the tensors that come and go (measured on SmolLM2-135M, docs/MEMORY.md).
CONTEXT = {"cuda": 0.6, "cpu": 0.82}
FRAGMENTATION = {"cuda": 0.06, "cpu": 0.29}
OVERHEAD_SOURCE = {
    "cuda": "of it, 6 % and the context are presumed",
    "cpu": "of it, 29 % of activations and 0.82 for Python",
}
LIBRARIES_RAM = {"cuda": 2.0, "cpu": 0.5}  # GiB of RAM for Python and torch; presumed with CUDA's libraries
COME_AND_GO = ("activations", "logits", "dequantised", "gathered")
MARGIN = 0.1  # share of a card left free when the quick start proposes a model: the desktop, a browser
# GiB of a QLoRA step with the default config and one row of 512 tokens, overhead included, as `plan` traces it
# (tests/memory/test_estimate.py). In the order in which they are offered: a good default, smaller ones, larger ones.
QUICK_START_MODELS = {
    "Qwen/Qwen2.5-3B-Instruct": 3.44,
    "Qwen/Qwen2.5-1.5B-Instruct": 2.30,
    "Qwen/Qwen2.5-0.5B-Instruct": 1.43,
    "Qwen/Qwen2.5-7B-Instruct": 7.14,
    "Qwen/Qwen2.5-14B-Instruct": 12.10,
    "Qwen/Qwen2.5-32B-Instruct": 22.64,
}


def with_overhead(parts: Mapping[str, float], kind: str) -> float:
    """GiB of a device (`cuda` or `cpu`) that tensors take; parts: their GiB by kind (`trace.PARTS`)."""
    total = sum(parts.values())
    fragmented = sum(parts.get(part, 0.0) for part in COME_AND_GO) if kind == "cpu" else total
    return total + fragmented * FRAGMENTATION[kind] + CONTEXT[kind]


def models_that_fit(gib: float) -> list[str]:
    """The quick start's models that QLoRA trains on a card of `gib` GiB, the recommended one first."""
    return [name for name, needed in QUICK_START_MODELS.items() if needed <= gib * (1 - MARGIN)]


def ram_needed(parameters: int, mode: str, device: str) -> float:
    """GiB of the machine's own memory that a run takes, roughly: the libraries and, on a CPU, fp32 weights.

    Full fine-tuning adds gradients and two optimizer moments per weight.
    """
    copies = 0 if device == "cuda" else 4 if mode == "full" else 1
    return LIBRARIES_RAM[device] + 4 * copies * parameters / GIB


def upper_bound(description: Mapping[str, Any], config: Config, parameters: int, longest: int) -> float:
    """GiB that no phase of a run exceeds, from the sizes in config.json; infinite where one of them is missing.

    Counts fp32 weights, gradients, AdamW's moments and the two copies of `train.ewc`; for each token of a micro-batch
    32 hidden and 12 feed-forward numbers and its attention scores in every layer, and four numbers per logit; and the
    KV cache of a batch of answers. longest: tokens of the longest row.
    """

    def size(*names: str) -> float:
        return next(
            (float(description[name]) for name in names if isinstance(description.get(name), int)), float("inf")
        )

    hidden = size("hidden_size", "n_embd", "d_model")
    inner = [description.get(name) or 0 for name in ("intermediate_size", "ffn_dim", "d_ff", "n_inner")]
    widest = max(4 * hidden, *map(float, inner))
    sides = 2 if description.get("is_encoder_decoder") or config.train.objective in PAIRED else 1
    layers = sides * size("num_hidden_layers", "n_layer", "num_layers")
    heads = size("num_attention_heads", "n_head", "num_heads")
    budget = config.train.micro_batch_tokens
    tokens = sides * max(longest, budget if isinstance(budget, int) else min(4096, 16 * longest))
    per_token = layers * (32 * hidden + 12 * widest + 2 * heads * longest) + 4 * size("vocab_size")
    answers = config.eval.batch_size * (config.generation.max_new_tokens + longest) * layers * 4 * hidden
    copies = 24.0 if config.train.ewc.strength else 16.0
    return (copies * parameters + 4.0 * (tokens * per_token + answers)) / GIB
