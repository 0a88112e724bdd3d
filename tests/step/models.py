"""Models and step batches that the step's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sft.step import attention
from sft.step.batch import Collator

LENGTHS = (9, 3, 14, 5, 5, 11, 2, 7)


def load(folder: Path, *, attn: str = attention.NAME, dtype: torch.dtype = torch.float64, seq2seq: bool = False) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    attention.register()
    family = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = family.from_pretrained(folder, dtype=dtype, attn_implementation=attn)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model.train()


def rows(lengths: tuple[int, ...] = LENGTHS, *, seed: int = 0, vocabulary: int = 250) -> list[dict[str, Any]]:
    """Rows whose first third is not in the loss; the second row has no label at all."""
    drawn = torch.Generator().manual_seed(seed)
    examples = []
    for index, length in enumerate(lengths):
        ids = torch.randint(1, vocabulary, (length,), generator=drawn).tolist()
        prompt = length if index == 1 else length // 3
        examples.append({"id": f"r{index}", "input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return examples


def seq2seq_rows(lengths: tuple[int, ...] = LENGTHS, *, seed: int = 0) -> list[dict[str, Any]]:
    drawn = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        source = torch.randint(3, 60, (length,), generator=drawn).tolist()
        target = torch.randint(3, 60, (length // 2 + 1,), generator=drawn).tolist()
        examples.append({"input_ids": source, "labels": [*target, 1]})
    return examples


def batch(lengths: tuple[int, ...] = LENGTHS, *, seed: int = 0) -> dict[str, torch.Tensor]:
    return Collator("causal")(rows(lengths, seed=seed))


def gradients(model: Any) -> torch.Tensor:
    """All gradients of the model, one after another; clears them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    joined = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    model.zero_grad(set_to_none=True)
    return joined.detach().clone()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())
