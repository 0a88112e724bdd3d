"""The written rules behind `auto`, each with expectations written out by hand."""

from __future__ import annotations

import contextlib
import itertools
import logging
from typing import Any

import pytest

from sft.config import auto
from sft.config.auto import Facts, batch_plan, resolve
from sft.config.schema import Config
from sft.errors import ConfigError

CPU = Facts("cpu")
AMPERE = Facts("cuda", (8, 0))
ADA = Facts("cuda", (8, 9))
TURING = Facts("cuda", (7, 5))


def resolve_with(facts: Facts, mode: str = "qlora", max_seq_len: int = 512, **train: Any) -> auto.Resolved:
    return resolve(
        Config.model_validate({"train": train, "tuning": {"mode": mode}, "model": {"max_seq_len": max_seq_len}}), facts
    )


@pytest.mark.parametrize(
    ("facts", "bf16", "fp16", "expected"),
    [
        (CPU, "auto", "auto", (True, False)),
        (AMPERE, "auto", "auto", (True, False)),
        (ADA, "auto", "auto", (True, False)),
        (TURING, "auto", "auto", (False, True)),
        (Facts("cuda", None), "auto", "auto", (False, True)),
        (Facts("cuda", (7, 5), bf16_supported=True), "auto", "auto", (False, True)),
        (Facts("cuda", None, bf16_supported=True), "auto", "auto", (True, False)),
        (Facts("cuda", (8, 6), bf16_supported=False), "auto", "auto", (False, True)),
        (TURING, True, "auto", (True, False)),
        (TURING, True, False, (True, False)),
        (ADA, "auto", True, (False, True)),
        (CPU, "auto", True, (False, True)),
        (ADA, False, "auto", (False, True)),
        (CPU, False, "auto", (False, False)),
        (ADA, "auto", False, (True, False)),
        (TURING, "auto", False, (False, False)),
        (CPU, "auto", False, (True, False)),
        (ADA, False, False, (False, False)),
        (CPU, False, True, (False, True)),
    ],
)
def test_precision(facts: Facts, bf16: Any, fp16: Any, expected: tuple[bool, bool]) -> None:
    train = resolve_with(facts, bf16=bf16, fp16=fp16).config.train
    assert (train.bf16, train.fp16) == expected


def test_an_explicit_precision_that_the_hardware_lacks_is_used_with_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("sft"), "propagate", True)
    resolve_with(ADA, bf16=True), resolve_with(CPU, bf16=True)
    assert caplog.messages == []
    assert resolve_with(TURING, bf16=True).config.train.bf16 is True
    resolve_with(CPU, fp16=True), resolve_with(Facts("cuda", (7, 5), seq2seq=True))
    assert caplog.messages == [
        "train.bf16 is true, but a GPU of compute capability 7.5 has no bfloat16: it is emulated and slow",
        "train.fp16 is true on the CPU, where it is slow and may overflow: bf16 is better there",
        "fp16 overflows in some encoder-decoder models: --set train.fp16=false if the loss is NaN",
    ]


@pytest.mark.parametrize("key", ["gradient_checkpointing", "merge_at_end"])
def test_a_prefix_excludes_recomputation_and_merging(key: str) -> None:
    with pytest.raises(ConfigError, match=f"train.{key}"):
        raw = {"tuning": {"adapter": "prefix"}, "train": {key: True}}
        resolve(Config.model_validate(raw), Facts(device="cpu"))


def test_both_precisions_are_refused_by_the_schema_too() -> None:
    with pytest.raises(ValueError, match="both true"):
        resolve_with(ADA, bf16=True, fp16=True)


@pytest.mark.parametrize(
    ("mode", "parameters", "rate"),
    [
        ("qlora", 494_032_768, 2e-4),  # Qwen2.5-0.5B
        ("qlora", 1_543_714_304, 2e-4),  # 1.5B
        ("lora", 2_999_999_999, 2e-4),
        ("lora", 3_000_000_000, 1e-4),
        ("qlora", 3_085_938_688, 1e-4),  # Qwen2.5-3B
        ("qlora", 7_615_616_512, 1e-4),
        ("qlora", None, 1e-4),
        ("full", 1_300_000, 1e-4),
        ("full", 247_577_856, 1e-4),  # flan-t5-base
        ("full", 1_000_000_000, 1e-4),
        ("full", 1_543_714_304, 1e-4),
        ("full", 3_085_938_688, 2e-5),
        ("full", 7_000_000_000, 2e-5),
        ("full", 7_615_616_512, 2e-5),
        ("full", 8_030_261_248, 2e-5),
        ("full", 13_015_864_320, 1e-5),
        ("full", 14_770_033_664, 1e-5),
        ("full", 32_763_876_352, 5e-6),
        ("full", 70_553_706_496, 5e-6),
        ("full", None, 2e-5),
    ],
)
def test_learning_rate(mode: str, parameters: int | None, rate: float) -> None:
    resolved = resolve_with(Facts("cpu", parameters=parameters), mode)
    assert resolved.config.train.learning_rate == rate
    assert mode in resolved.reasons["train.learning_rate"]


@pytest.mark.parametrize(
    ("rows", "epochs"), [(1, 5), (999, 5), (1_000, 3), (9_999, 3), (10_000, 1), (52_002, 1), (None, 3)]
)
def test_epochs_by_rows(rows: int | None, epochs: float) -> None:
    assert resolve_with(Facts("cpu", train_rows=rows)).config.train.epochs == epochs


A = "auto"


@pytest.mark.parametrize(
    ("effective", "batch", "accum", "measured", "plan"),
    [
        (A, A, A, None, (16, 1, 16)),
        (A, A, A, 1, (16, 1, 16)),
        (A, A, A, 8, (16, 8, 2)),
        (A, A, A, 64, (16, 16, 1)),
        (24, A, A, 16, (24, 12, 2)),
        (17, A, A, 16, (17, 9, 2)),
        (4, A, A, 64, (4, 4, 1)),
        (A, 2, A, 64, (16, 2, 8)),
        (A, 6, A, None, (16, 6, 3)),
        (A, 32, A, None, (32, 32, 1)),
        (8, 32, A, None, (8, 32, 1)),
        (A, A, 5, None, (20, 4, 5)),
        (16, 6, 3, None, (16, 6, 3)),
        (A, A, 4, 64, (16, 4, 4)),
        (10, A, 4, None, (10, 3, 4)),
        (A, A, 32, None, (32, 1, 32)),
        (A, 3, 5, 1, (15, 3, 5)),
        (15, 3, 5, 1, (15, 3, 5)),
    ],
)
def test_batch_and_accumulation(effective: Any, batch: Any, accum: Any, measured: Any, plan: tuple[int, ...]) -> None:
    assert batch_plan(effective, batch, accum, measured) == plan


def test_every_plan_covers_its_step_and_changes_no_explicit_value() -> None:
    parts: list[Any] = [A, 1, 2, 3, 5, 8, 16, 40]
    for numbers in itertools.product(parts, parts, parts):
        for measured in (None, 1, 3, 64):
            with contextlib.suppress(ConfigError):
                plan = batch_plan(*numbers, measured)
                effective, batch, accum = plan
                assert effective <= batch * accum < effective + batch
                assert all(value in (A, resolved) for value, resolved in zip(numbers, plan, strict=True))


@pytest.mark.parametrize("numbers", [(16, 2, 4), (8, A, 32), (8, A, 5)])
def test_batch_numbers_that_cannot_all_hold_are_an_error(numbers: Any) -> None:
    with pytest.raises(ConfigError, match=f"micro-batches, but train.grad_accum is {numbers[2]}"):
        batch_plan(*numbers, None)


def test_three_unequal_batch_numbers_are_refused_by_the_schema_too() -> None:
    with pytest.raises(ValueError, match=r"batch_size 2 \* grad_accum 4 is 8, but effective_batch is 16"):
        resolve_with(CPU, effective_batch=16, batch_size=2, grad_accum=4)


@pytest.mark.parametrize(
    ("facts", "max_seq_len", "train", "expected"),
    [
        (CPU, 32, {}, (16, 16, 1, 512)),
        (CPU, 512, {}, (16, 16, 1, 1024)),
        (CPU, 8192, {}, (16, 16, 1, 1024)),
        (CPU, 512, {"batch_size": 2}, (16, 2, 8, 1024)),
        (CPU, 128, {"effective_batch": 4}, (4, 4, 1, 512)),
        (CPU, 512, {"micro_batch_tokens": 300}, (16, 16, 1, 300)),
        (ADA, 512, {}, (16, 1, 16, 512)),
        (Facts("cuda", (8, 9), measured_batch=4), 512, {}, (16, 4, 4, 2048)),
        (Facts("cuda", (8, 9), measured_batch=64), 2048, {}, (16, 16, 1, 4096)),
        (Facts("cuda", (8, 9), measured_batch=64), 512, {"grad_accum": 8}, (16, 2, 8, 1024)),
    ],
)
def test_step_size_on_a_machine(
    facts: Facts, max_seq_len: int, train: dict[str, Any], expected: tuple[int, ...]
) -> None:
    train = resolve_with(facts, max_seq_len=max_seq_len, **train).config.train
    assert (train.effective_batch, train.batch_size, train.grad_accum, train.micro_batch_tokens) == expected


@pytest.mark.parametrize(
    ("facts", "optim", "tf32", "checkpointing"),
    [
        (CPU, "adamw_torch", False, False),
        (Facts("cpu", seq2seq=True), "adafactor", False, False),
        (ADA, "adamw_torch_fused", True, True),
        (TURING, "adamw_torch_fused", False, True),
    ],
)
def test_settings_that_depend_on_the_hardware(facts: Facts, optim: str, tf32: bool, checkpointing: bool) -> None:
    train = resolve_with(facts).config.train
    assert (train.optim, train.tf32, train.gradient_checkpointing) == (optim, tf32, checkpointing)
    explicit = resolve_with(facts, optim="sgd", tf32=False, gradient_checkpointing=False).config.train
    assert (explicit.optim, explicit.tf32, explicit.gradient_checkpointing) == ("sgd", False, False)


@pytest.mark.parametrize(
    ("settings", "save_strategy", "eval_steps"),
    [
        ({}, "epoch", 100),
        ({"eval_strategy": "steps"}, "steps", 100),
        ({"eval_strategy": "steps", "eval_steps": 30}, "steps", 30),
        ({"eval_strategy": "no"}, "epoch", 100),
        ({"save_steps": 7}, "epoch", 7),
    ],
)
def test_auto_save_strategy_follows_eval_strategy(
    settings: dict[str, Any], save_strategy: str, eval_steps: int
) -> None:
    resolved = resolve_with(CPU, **settings)
    train = resolved.config.train
    assert (train.save_strategy, train.eval_steps) == (save_strategy, eval_steps)
    assert "eval_strategy" in resolved.reasons["train.save_strategy"]


@pytest.mark.parametrize("save", ["no", "steps", "epoch"])
@pytest.mark.parametrize("evaluate", ["no", "steps", "epoch"])
@pytest.mark.parametrize("best", [True, False])
def test_explicit_values_about_saving_are_never_changed(save: str, evaluate: str, best: bool) -> None:
    settings = {
        "save_strategy": save, "eval_strategy": evaluate, "load_best_model_at_end": best, "save_steps": 100,
        "eval_steps": 30, "early_stopping": {"enabled": True, "patience": 7},
    }  # fmt: skip
    resolved = resolve_with(CPU, **settings).config.train.model_dump()
    assert {key: resolved[key] for key in settings} == {
        **settings,
        "early_stopping": {**resolved["early_stopping"], "enabled": True, "patience": 7},
    }


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("loss", False),
        ("eval_loss", False),
        ("perplexity", False),
        ("rougeL", True),
        ("eval_rougeL", True),
        ("exact_match", True),
        ("stop_rate", True),
    ],
)
def test_the_direction_of_a_metric(metric: str, greater: bool) -> None:
    assert resolve_with(CPU, metric_for_best_model=metric).config.train.greater_is_better is greater
    assert (
        resolve_with(CPU, metric_for_best_model=metric, greater_is_better=True).config.train.greater_is_better is True
    )


@pytest.mark.parametrize("facts", [CPU, ADA, TURING, Facts("cuda", (9, 0), 7_000_000_000, 240, 6)])
@pytest.mark.parametrize("train", [{}, {"batch_size": 6}, {"grad_accum": 5}, {"eval_strategy": "no"}, {"max_steps": 9}])
def test_no_auto_is_left_and_resolving_again_changes_nothing(facts: Facts, train: dict[str, Any]) -> None:
    resolved = resolve_with(facts, **train)
    values = resolved.config.train.model_dump()
    assert "auto" not in values.values()
    assert Config.model_validate(resolved.config.model_dump(), strict=True) == resolved.config
    again = resolve(resolved.config, facts)
    assert again.config == resolved.config and again.reasons == {}


def test_every_resolved_value_has_its_reason() -> None:
    before, resolved = Config().train, resolve_with(ADA)
    for name in type(before).model_fields:
        changed = getattr(before, name) != getattr(resolved.config.train, name)
        assert (f"train.{name}" in resolved.reasons) == changed
    assert all(resolved.reasons.values())


def test_a_learning_rate_far_above_the_usual_one_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("sft"), "propagate", True)
    resolve_with(CPU, "lora", learning_rate=2e-3), resolve_with(CPU, "lora", learning_rate=0.5, optim="sgd")
    assert caplog.messages == []
    resolve_with(CPU, "lora", learning_rate=0.5)
    assert caplog.messages == ["train.learning_rate 0.5 is 5,000 times the usual 0.0001: it may diverge"]


@pytest.mark.parametrize(
    ("device", "mode", "dora", "chosen", "expected"),
    [
        ("cpu", "lora", False, "auto", "fused"),
        ("cpu", "qlora", False, "auto", "fused"),
        ("cpu", "lora", True, "auto", "plain"),
        ("cpu", "full", False, "auto", "plain"),
        ("cuda", "lora", False, "auto", "plain"),
        ("cpu", "lora", False, "plain", "plain"),
    ],
)
def test_lora_layers_are_fused_on_the_cpu_where_the_config_leaves_them_open(
    device: Any, mode: str, dora: bool, chosen: str, expected: str
) -> None:
    raw = {"tuning": {"mode": mode, "lora": {"use_dora": dora}}, "train": {"kernels": chosen}}
    assert resolve(Config.model_validate(raw), Facts(device)).config.train.kernels == expected
