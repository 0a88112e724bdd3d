"""The plan as an answer: remedies together, phases beside the step, and what no plan is made of."""

from __future__ import annotations

from typing import Any

import pytest

from sft.config.schema import Config
from sft.errors import ModelError
from sft.memory import plan
from sft.memory.devices import Device
from sft.memory.estimate import changed
from tests.memory.families import description


def test_remedies_together_name_every_setting_once_and_their_peak_is_that_of_the_plan_with_them() -> None:
    model = {**description("qwen2"), "hidden_size": 512, "vocab_size": 50000}
    base = Config()
    base = changed(base, tuning=changed(base.tuning, lora=changed(base.tuning.lora, r=256)))
    made = plan.make_plan(base, model, Device("cuda", "a card", 0.7))
    assert not made.fits
    assert {remedy.setting for remedy in made.remedies} >= {"train.optim=adamw_8bit", "model.max_seq_len=128"}
    assert made.together is not None
    keys = [setting.split("=")[0] for setting in made.together.settings]
    assert len(set(keys)) == len(keys)
    tried = changed(base, train=changed(base.train, optim="paged_adamw_8bit"))
    again = plan.make_plan(tried, model, made.device, fix=False)
    (paged,) = (remedy for remedy in made.remedies if remedy.setting == "train.optim=paged_adamw_8bit")
    assert paged.saves_gib == pytest.approx(made.phases["training"].peak - again.phases["training"].peak, abs=1e-3)
    assert "optimizer" not in again.estimate.parts


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "of-our-own", "auto_map": {"AutoModelForCausalLM": "ours.Ours"}}, "no code of their own"),
        ({"hidden_size": "256"}, "expected int"),
        ({"hidden_size": -5}, "cannot build"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "stored quantised (gptq)"),
    ],
)
def test_what_no_plan_is_made_of_is_said(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError) as caught:
        plan.make_plan(Config(), {**description("qwen2"), **changes}, Device("cuda", "a card", 8))
    assert told in str(caught.value)
