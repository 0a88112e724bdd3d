"""The traced step against a step that really trains, on many families and none of them known by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.config.schema import Config
from sft.errors import ModelError
from sft.memory import plan, shapes
from sft.memory.devices import Device
from sft.memory.estimate import changed
from sft.memory.trace import Live, Passes, Tracer, Traces, Window, compute_dtype, micro_batch
from tests.memory.families import FAMILIES, description
from tests.memory.settings import resolved
from tests.memory.table import CASES, TRACED

GIB = 2.0**30
LENGTHS = [192, 192, 192]


def really(folder: Path, config: Config) -> Window:
    """The highest moment of the second step of a model that really trains on the CPU."""
    from sft.model import adapters, load
    from sft.step import attention

    found = _files(folder)
    wanted = attention.implementation("cpu", found.config) or attention.fallback(found.config)
    dtype = torch.float32 if config.tuning.mode == "full" else compute_dtype(config)
    model: Any = load.load_base(found, config.model, config.tuning, dtype, device="cpu", train=True, attention=wanted)
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
        passes = Passes(model, config, live, device="cpu")
        passes.step(micro, waiting=False)
        return max(passes.step(micro, waiting=False), key=lambda window: window.total)


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
    traces = Traces(resolved("qlora", "cuda"), description(family), device="cuda", root=None)
    found = traces.step(LENGTHS, waiting=False)
    assert 0.99 * found.standing < traces.standing <= found.standing
    assert sum(found.parts.values()) == found.peak > found.standing
    assert found.parts["adapters"] * 2 <= found.parts["optimizer"] <= found.parts["adapters"] * 2.1
    assert ("weights in 4 bit" in found.parts) == (family != "falcon")  # transformers quantises no linear layer of it


TRAINED = [
    pytest.param(family, mode, True, id=f"{family}-{mode}", marks=[] if quick else [pytest.mark.slow])
    for family, mode, quick in (
        ("llama", "qlora", True),
        ("gpt2", "lora", False),
        ("t5", "lora", False),
        ("gemma3_text", "full", True),
        ("stablelm", "lora", True),
        ("olmo", "qlora", False),
        ("phi3", "full", False),
        ("gpt_neox", "lora", False),
        ("falcon", "lora", False),
        ("gemma2", "qlora", False),
        ("qwen3", "full", False),
        ("opt", "lora", False),
        ("cohere", "lora", False),
        ("bloom", "qlora", False),
        ("granite", "qlora", False),
    )
]


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "mode", "_"), TRAINED)
def test_it_is_within_three_percent_of_what_training_really_holds(
    family: str, mode: str, _: bool, checkpointing: bool, tmp_path: Path
) -> None:
    config = resolved(mode, "cpu", gradient_checkpointing=checkpointing)
    folder = saved(family, tmp_path / family)
    real = really(folder, config)
    written = json.loads((folder / "config.json").read_text())
    traced = Tracer(config, written, device="cpu").step(LENGTHS, waiting=False)
    assert traced.peak == pytest.approx(real.total, rel=0.03), (real.parts, traced.parts)


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[] if size == "0.5B" else pytest.mark.slow) for size in TRACED]
)
def test_it_meets_the_table_of_traces(size: str) -> None:
    model = shapes.known_models()[f"Qwen/Qwen2.5-{size}-Instruct"]
    for (length, logits), expected in zip(CASES, TRACED[size], strict=True):
        config = resolved("qlora", "cuda", dropout=0.0, logits=logits, effective_batch=1)
        peak = Traces(config, model, device="cuda", root=None).step([length], waiting=False).peak / GIB
        # ours frees the model's 16-bit logits before the backward pass, theirs does not
        freed = 2 * length * model["vocab_size"] / GIB if logits == "full" else 0.0
        assert peak == pytest.approx(expected - freed, abs=max(0.25, 0.05 * expected))


def test_offloaded_activations_leave_the_card_and_nothing_else_does() -> None:
    model = {**description("llama"), "num_hidden_layers": 12}
    here, away = (
        Tracer(resolved("qlora", "cuda", activation_offload=on), model, device="cuda").step([2048], waiting=True)
        for on in (False, True)
    )
    kept = 12 * 2048 * 256 * 2  # what checkpointing keeps: the input of every layer, in 16 bit
    assert here.peak - away.peak == pytest.approx(kept, rel=0.2)
    assert here.standing == away.standing


def test_experts_whose_adapters_take_no_dropout_are_said() -> None:
    sizes = {"q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    experts = {"moe_intermediate_size": 128, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    rest = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
    model = {**description("llama"), **sizes, **experts, **rest, "model_type": "deepseek_v2"}
    with pytest.raises(ModelError, match="does not work with lora_dropout") as caught:
        Tracer(resolved("qlora", "cuda"), model, device="cuda")
    assert caught.value.where == "tuning.lora.dropout"
    assert "--set tuning.lora.dropout=0" in str(caught.value)
    assert Tracer(resolved("qlora", "cuda", dropout=0.0), model, device="cuda").experts > 0


@pytest.mark.parametrize(
    ("layers", "wide", "inner", "heads", "shared", "vocabulary", "tied", "length", "most"),
    [
        (36, 2048, 11008, 16, 2, 151936, True, 512, 6.5),
        pytest.param(28, 3584, 18944, 28, 4, 152064, False, 2048, 22, marks=pytest.mark.slow),
    ],
    ids=["3B", "7B"],
)
def test_qwens_3b_at_512_and_7b_at_2048_fit_their_cards(
    layers: int,
    wide: int,
    inner: int,
    heads: int,
    shared: int,
    vocabulary: int,
    tied: bool,
    length: int,
    most: float,
) -> None:
    model = {"model_type": "qwen2", "num_hidden_layers": layers, "hidden_size": wide, "intermediate_size": inner}
    model |= {"num_attention_heads": heads, "num_key_value_heads": shared, "vocab_size": vocabulary}
    base = Config()
    config = changed(base, model=changed(base.model, max_seq_len=length))
    made = plan.make_plan(config, {**model, "tie_word_embeddings": tied}, Device("cuda", "a card", most))
    assert made.fits
    assert made.method == "traced"
    assert most / 4 < made.estimate.allocated < made.estimate.peak <= most
