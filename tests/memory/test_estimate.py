"""The closed form against traced peaks, its exact counts, and what it proposes for a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft.config.schema import Config
from sft.errors import ModelError
from sft.memory import estimate, shapes
from tests.memory.table import CASES, TRACED

DEFAULTS = Config()
TUNING = estimate.changed(DEFAULTS.tuning, lora=estimate.changed(DEFAULTS.tuning.lora, dropout=0.0))


def _name(size: str) -> str:
    return f"Qwen/Qwen2.5-{size}-Instruct"


def _step(size: str, tokens: int, tuning: Any = TUNING, device: str = "cuda", **train: Any) -> estimate.Estimate:
    section = estimate.changed(DEFAULTS.train, **train)
    return estimate.step(shapes.of_known(_name(size), tuning), tuning, section, tokens=tokens, device=device)


@pytest.mark.parametrize("size", TRACED)
def test_it_meets_the_traced_peaks_within_two_percent(size: str) -> None:
    for (tokens, logits), traced in zip(CASES, TRACED[size], strict=True):
        found = _step(size, tokens, logits=logits)
        assert found.allocated == pytest.approx(traced, rel=0.02)
        assert sum(found.parts.values()) == pytest.approx(found.allocated)
        assert found.peak > found.allocated + 0.6


def test_parameters_are_counted_exactly() -> None:
    counted = shapes.of_known(_name("0.5B"), TUNING)
    assert counted.total == 494_032_768  # as in the model's safetensors
    assert counted.linear == 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)
    assert counted.adapted == 24 * (2 * 1792 + 2 * 1024 + 3 * 5760)
    assert shapes.of_known(_name("7B"), TUNING).total == 7_615_616_512


def test_adapters_are_counted_as_peft_makes_them(tiny_qwen2: Path, tiny_gpt2: Path, tiny_t5: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from sft.model.adapters import targets

    for folder, maker in (
        (tiny_qwen2, AutoModelForCausalLM),
        (tiny_gpt2, AutoModelForCausalLM),
        (tiny_t5, AutoModelForSeq2SeqLM),
    ):
        counted = shapes.count(json.loads((folder / "config.json").read_text()), TUNING)
        model = maker.from_pretrained(folder)
        assert counted.total == sum(p.numel() for p in model.parameters())
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets(model, TUNING), fan_in_fan_out=False))
        assert 4 * counted.adapted == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_every_setting_moves_the_peak_its_own_way() -> None:
    at = _step("1.5B", 2048).peak
    assert _step("1.5B", 2048, logits="full").peak > at + 3
    assert _step("1.5B", 2048, gradient_checkpointing=False).peak > at + 3
    assert _step("1.5B", 4096).peak > at
    assert _step("1.5B", 2048, logits_tile=2048).peak > at
    for mode in ("lora", "full"):
        assert _step("1.5B", 2048, tuning=estimate.changed(TUNING, mode=mode)).peak > at + 1.5
    full = _step("0.5B", 512, tuning=estimate.changed(TUNING, mode="full"))
    assert full.parts["weights"] + full.parts["optimizer"] == pytest.approx(12 * 494_032_768 / 2**30)
    assert _step("1.5B", 2048, tuning=DEFAULTS.tuning).peak > at  # dropout keeps its inputs and masks


def test_the_seeds_cases_fit_their_cards() -> None:
    assert _step("3B", 512).peak <= 6.5
    assert _step("7B", 2048).peak <= 22


def test_a_card_is_offered_the_default_model_first_and_only_what_fits() -> None:
    assert estimate.that_fit(1) == []
    assert estimate.largest_that_fits(1) is None
    assert estimate.that_fit(7) == [_name("3B"), _name("1.5B"), _name("0.5B")]
    assert estimate.that_fit(3) == [_name("1.5B"), _name("0.5B")]
    assert estimate.that_fit(24) == [_name(size) for size in ("3B", "1.5B", "0.5B", "7B", "14B")]
    assert estimate.largest_that_fits(24) == _name("14B")


def test_a_family_without_attention_is_counted() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "state_size": 8}
    assert shapes.count({"model_type": "mamba", **sizes}, TUNING).attention == 0


def test_a_family_that_transformers_has_not_is_said() -> None:
    with pytest.raises(ModelError, match="cannot build my/model"):
        shapes.count({"model_type": "never-heard-of"}, TUNING, name="my/model")
