"""The traced step against a step that really trains, on many families and none of them known by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.config.auto import Facts, resolve
from sft.config.schema import Config
from sft.memory import shapes
from sft.memory.estimate import changed
from sft.memory.live import Live
from sft.memory.trace import Steps, Traced, Tracer, micro_batch
from tests.memory.families import FAMILIES, description

GIB = 2.0**30
LENGTHS = [192, 192, 192]


def resolved(mode: str, device: str, *, dropout: float = 0.05, length: int = 512, **train: Any) -> Config:
    config = Config()
    lora = changed(config.tuning.lora, dropout=dropout)
    tuning, section = changed(config.tuning, mode=mode, lora=lora), changed(config.train, **train)
    config = changed(config, tuning=tuning, train=section, model=changed(config.model, max_seq_len=length))
    capability = (8, 0) if device == "cuda" else None
    return resolve(config, Facts(device=device, capability=capability, measured_batch=1)).config  # type: ignore[arg-type]


def really(folder: Path, config: Config) -> Traced:
    """The highest moment of the second step of a model that really trains on the CPU."""
    from sft.model import adapters, loading
    from sft.step import attention

    found = _files(folder)
    wanted = attention.implementation("cpu", found.config) or attention.fallback(found.config)
    dtype = torch.float32 if config.tuning.mode == "full" else torch.bfloat16
    model: Any = loading.load_base(
        found, config.model, config.tuning, dtype, device="cpu", train=True, attention=wanted
    )
    checkpointing = config.train.gradient_checkpointing is True
    if config.tuning.mode == "full":
        adapters.set_checkpointing(model, checkpointing)
    else:
        model = adapters.attach(model, config.tuning, gradient_checkpointing=checkpointing)
    kind = "seq2seq" if found.kind == "seq2seq" else "causal"
    apart = kind == "causal" and attention.keeps_rows_apart(model)
    micro = micro_batch(kind, LENGTHS, apart=apart)
    live = Live(rounding=1, vocabulary=4096)
    with live:
        steps = Steps(model, config, live, device="cpu")
        steps.run(micro, waiting=False)
        return steps.run(micro, waiting=False)


def _files(folder: Path) -> Any:
    from sft.config.schema import Config as Whole
    from sft.model import hub

    return hub.find(changed(Whole().model, name=str(folder)), folder, weights=True)


def saved(family: str, folder: Path) -> Path:
    """A model of the family with random weights, on disk."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**description(family))
    maker = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    maker.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_traced_on_a_gpu_from_its_config_alone(family: str) -> None:
    found = Tracer(resolved("qlora", "cuda"), description(family), device="cuda").step(LENGTHS, waiting=False)
    assert sum(found.parts.values()) == found.peak > found.standing
    assert found.parts["adapters"] * 2 <= found.parts["optimizer"] <= found.parts["adapters"] * 2.1
    assert ("weights in 4 bit" in found.parts) == (family != "falcon")  # transformers quantises no linear layer of it


CASES = [
    pytest.param(family, mode, True, id=f"{family}-{mode}", marks=[] if quick else [pytest.mark.slow])
    for family, mode, quick in (
        ("llama", "qlora", True),
        ("gpt2", "lora", True),
        ("t5", "lora", True),
        ("gemma3_text", "full", True),
        ("olmo", "qlora", False),
        ("phi3", "full", False),
        ("gpt_neox", "lora", False),
        ("falcon", "lora", False),
        ("gemma2", "qlora", False),
        ("qwen3", "full", False),
        ("opt", "lora", False),
        ("cohere", "lora", False),
    )
]


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "mode", "_"), CASES)
def test_it_is_within_three_percent_of_what_training_really_holds(
    family: str, mode: str, _: bool, checkpointing: bool, tmp_path: Path
) -> None:
    config = resolved(mode, "cpu", gradient_checkpointing=checkpointing)
    folder = saved(family, tmp_path / family)
    real = really(folder, config)
    written = json.loads((folder / "config.json").read_text())
    traced = Tracer(config, written, device="cpu").step(LENGTHS, waiting=False)
    assert traced.peak == pytest.approx(real.peak, rel=0.03), (real.parts, traced.parts)
    assert traced.standing == pytest.approx(real.standing, rel=0.01)


# Peaks in GiB of a trace by others: chunked logits at 512 and 2048 tokens, full at 512 (NF4, r 16 everywhere, AdamW).
TABLE = {"0.5B": (0.98, 1.06, 1.56), "3B": (2.76, 3.01, 3.34), "32B": (20.4, 21.9, 20.7)}


@pytest.mark.parametrize("size", ["0.5B", *(pytest.param(big, marks=pytest.mark.slow) for big in ("3B", "32B"))])
def test_it_meets_the_table_of_traces(size: str) -> None:
    model = shapes.known_models()[f"Qwen/Qwen2.5-{size}-Instruct"]
    for (logits, lengths), wanted in zip(
        (("chunked", [512, 2048]), ("full", [512])), (TABLE[size][:2], TABLE[size][2:]), strict=True
    ):
        config = resolved("qlora", "cuda", dropout=0.0, logits=logits, effective_batch=1)
        tracer = Tracer(config, model, device="cuda")
        for length, expected in zip(lengths, wanted, strict=True):
            peak = tracer.step([length], waiting=False).peak / GIB
            assert peak == pytest.approx(expected, abs=max(0.25, 0.05 * expected))
