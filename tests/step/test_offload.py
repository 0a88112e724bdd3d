"""What autograd keeps comes back bit for bit, with checkpointing and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sft.model import adapters
from sft.step import step
from sft.step.batch import Collator
from sft.step.step import StepConfig, forward_backward


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_bits(tiny_qwen2: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    model.train()
    adapters.set_checkpointing(model, checkpointing)
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (30, 17)]
    monkeypatch.setattr(step, "SMALL", 64)
    sent, stays = list[int](), step.stays_on_gpu
    monkeypatch.setattr(step, "stays_on_gpu", lambda tensor: stays(tensor) or bool(sent.append(tensor.numel())))
    found = []
    for offload in (False, True):
        model.zero_grad()
        forward_backward(model, Collator("causal")(rows), StepConfig(micro_batch_tokens=64, offload=offload))
        found.append([weight.grad.clone() for weight in model.parameters()])
    assert len(sent) > 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_strides_come_back_and_what_is_expanded_is_kept_once() -> None:
    padded = torch.randn(1, 1, 600, 608)[..., :597].expand(2, 4, 600, 597)
    turned = torch.randn(512, 4, 300).transpose(0, 1)
    hooks = step.offload_activations()
    for tensor in (padded, turned):
        *_, kept = packed = hooks.pack_hook(tensor)
        found = hooks.unpack_hook(packed)
        assert torch.equal(found, tensor) and found.stride() == tensor.stride()
        assert kept.data_ptr() != tensor.data_ptr() and kept.numel() <= 600 * 4 * 512
    half = torch.randn(1, 600, 2048)[..., 1024:]  # of a fused projection: with its strides it would take the whole
    *_, kept = packed = hooks.pack_hook(half)
    assert torch.equal(hooks.unpack_hook(packed), half) and kept.untyped_storage().nbytes() == half.numel() * 4


def test_a_view_of_a_weight_stays_as_the_weight_does() -> None:
    weight = torch.nn.Parameter(torch.randn(1024, 1024))
    assert (
        step.stays_on_gpu(weight) and step.stays_on_gpu(weight.t()) and not step.stays_on_gpu(weight.detach().clone())
    )
