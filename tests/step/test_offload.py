"""What autograd keeps comes back bit for bit, with checkpointing and without."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from sft.model import adapters
from sft.step import offload
from sft.step.microbatch import backward_window
from sft.step.window import collate


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_bits(tiny_qwen2: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    model.train()
    adapters.set_checkpointing(model, checkpointing)
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (30, 17)]
    monkeypatch.setattr(offload, "SMALL", 64)
    sent, stays = list[int](), offload.stays
    monkeypatch.setattr(offload, "stays", lambda tensor: stays(tensor) or bool(sent.append(tensor.numel())))
    found = []
    for context in (contextlib.nullcontext(), offload.offloading()):
        model.zero_grad()
        with context:
            backward_window(model, collate(rows), tokens=64, apart=False)
        found.append([weight.grad.clone() for weight in model.parameters()])
    assert len(sent) > 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
