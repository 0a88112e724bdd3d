"""What the quick start offers for a card, the upper bound, and RAM."""

from __future__ import annotations

import pytest

from sft.config.schema import Config
from sft.memory import estimate, shapes
from sft.memory.devices import Device
from sft.memory.plan import make_plan
from tests.memory.cases import changed, description


def _name(size: str) -> str:
    return f"Qwen/Qwen2.5-{size}-Instruct"


def test_a_card_is_offered_the_default_model_first_and_only_what_fits() -> None:
    assert estimate.models_that_fit(1) == []
    assert estimate.models_that_fit(7) == [_name("3B"), _name("1.5B"), _name("0.5B")]
    assert estimate.models_that_fit(3) == [_name("1.5B"), _name("0.5B")]
    assert estimate.models_that_fit(24) == [_name(size) for size in ("3B", "1.5B", "0.5B", "7B", "14B")]


OFFERED = [
    pytest.param(name, marks=[] if name == _name("0.5B") else pytest.mark.slow) for name in estimate.QUICK_START_MODELS
]


@pytest.mark.parametrize("name", OFFERED)
def test_the_quick_starts_table_holds_what_the_planner_traces(name: str) -> None:
    base = Config()
    config = changed(base, model=changed(base.model, name=name), train=changed(base.train, micro_batch_tokens=512))
    plan = make_plan(config, shapes.shipped_models()[name], Device("cuda", "a card", 80), suggest=False)
    assert plan.training.peak == pytest.approx(estimate.QUICK_START_MODELS[name], abs=0.02)


def test_the_upper_bound_is_above_the_trace_and_infinite_where_a_size_is_missing() -> None:
    base = Config()
    config = changed(
        base,
        tuning=changed(base.tuning, mode="full"),
        model=changed(base.model, max_seq_len=1024),
        eval=changed(base.eval, batch_size=2),
    )
    model = description("qwen2")
    plan = make_plan(config, model, Device("cpu", "cpu", 1000))
    bound = estimate.upper_bound(model, config, plan.parameters, 1024)
    assert max(phase.allocated for phase in plan.phases.values()) < bound < 20
    assert estimate.upper_bound({"model_type": "strange"}, config, 10, 10) == float("inf")


def test_on_a_cpu_the_weights_are_in_ram_and_full_tuning_has_four_copies() -> None:
    gib = 2**30 // 4  # parameters of a GiB in fp32
    assert estimate.ram_needed(gib, "qlora", "cuda") == 2.0
    assert estimate.ram_needed(gib, "lora", "cpu") == 1.5
    assert estimate.ram_needed(gib, "full", "cpu") == 4.5
