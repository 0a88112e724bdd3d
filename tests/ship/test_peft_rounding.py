"""Decision 0011 says how peft rounds; this holds it to the installed peft."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(128, 128, bias=False)


@pytest.mark.parametrize(("safe", "roundings"), [(False, 1), (True, 2)])
def test_peft_rounds_once_unless_asked_for_a_safe_merge(safe: bool, roundings: int) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Layer().bfloat16(), LoraConfig(r=8, lora_alpha=16, target_modules=["q"]))
    layer = model.base_model.model.q
    for factor in (layer.lora_A["default"], layer.lora_B["default"]):
        factor.weight.data.normal_(0, 0.02)
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    merged = model.merge_and_unload(safe_merge=safe).q.weight
    assert torch.equal(merged, exact.bfloat16()) is (roundings == 1)
