"""The traced peak against models that really train, against published traces, and against the trace of every layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from sft.config.schema import PREFERENCES, Config, EwcSection, LoraSection, PreferenceSection
from sft.errors import ModelError
from sft.memory import shapes
from sft.memory.trace import Interval, MemoryTracker, Phases, Tracer, micro_batch
from sft.model import adapters, load
from sft.model.hub import find
from sft.model.tokenizer import NEW_TOKENS
from sft.step import attention
from sft.step.step import compute_dtype
from tests.memory.cases import CELLS, FAMILIES, PEAKS, changed, description, resolved

GIB = 2.0**30
LENGTHS = [192, 192, 192]


def measured(folder: Path, config: Config) -> Interval:
    """The highest moment of the second step of a model that really trains on the CPU."""
    files = find(changed(Config().model, name=str(folder)), folder, weights=True)
    chosen = attention.choose("cpu", files.config)
    dtype = torch.float32 if config.tuning.mode == "full" else compute_dtype(config.train)
    model: Any = load.load_base(files, config.model, config.tuning, dtype, device="cpu", train=True, attention=chosen)
    checkpointing = config.train.gradient_checkpointing is True
    if config.tuning.mode == "full":
        adapters.freeze(model, config.tuning.freeze)
        adapters.set_checkpointing(model, checkpointing)
    else:
        model = adapters.attach(model, config.tuning, gradient_checkpointing=checkpointing)
    kind = "seq2seq" if files.kind == "seq2seq" else "causal"
    objective = config.train.objective
    lengths = [*LENGTHS, *LENGTHS[:1]] if objective in PREFERENCES else LENGTHS
    micro = micro_batch(
        kind, lengths, packed=kind == "causal" and attention.keeps_rows_apart(model), objective=objective
    )
    tracker = MemoryTracker(rounding=1, vocabulary=4096)
    with tracker:
        phases = Phases(model, config, tracker, device="cpu")
        phases.step(micro, accumulating=False)
        return max(phases.step(micro, accumulating=False), key=lambda interval: interval.peak)


def save_random_model(family: str, folder: Path) -> Path:
    """A model of the family with random weights, on disk."""
    torch.manual_seed(0)
    maker = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    maker.from_config(AutoConfig.for_model(**description(family))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_traced_on_a_gpu_from_its_config_alone(family: str) -> None:
    tracer = Tracer(resolved("qlora", "cuda"), description(family), device="cuda")
    traced = tracer.step(LENGTHS, accumulating=False)
    assert sum(traced.parts.values()) == traced.peak > 0
    assert "optimizer" not in traced.parts
    assert traced.parts["adapters"] * 2 <= tracer.optimizer_bytes("auto") <= traced.parts["adapters"] * 2.1
    assert ("weights in 4 bit" in traced.parts) == (family != "falcon")  # transformers quantises no linear layer of it


TRAINED = [
    pytest.param(family, mode, id=f"{family}-{mode}", marks=[] if quick else [pytest.mark.slow])
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
@pytest.mark.parametrize(("family", "mode"), TRAINED)
def test_the_trace_is_within_three_percent_of_real_training(
    family: str, mode: str, checkpointing: bool, tmp_path: Path
) -> None:
    config = resolved(mode, "cpu", gradient_checkpointing=checkpointing)
    folder = save_random_model(family, tmp_path / family)
    real = measured(folder, config)
    written = json.loads((folder / "config.json").read_text())
    traced = Tracer(config, written, device="cpu").step(LENGTHS, accumulating=False)
    # of stablelm 1.5 MiB more is traced than is taken: 2.9 % with peft's LoRA layers, which take more memory
    assert traced.peak == pytest.approx(real.peak, rel=0.03, abs=1.6e6), (real.parts, traced.parts)


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("lora", {"lora": LoraSection(init="pissa_niter_1", dropout=0.0)}),
        ("lora", {"lora": LoraSection(layers_to_transform=[1], rank_pattern={"q_proj": 64})}),
        ("full", {"freeze": ["embed_tokens", "layers[.]0[.]"]}),
        ("qlora", {"adapter": "prefix", "prefix_tokens": 64}),
        ("lora", {}),
    ],
    ids=["pissa", "patterns", "freeze", "prefix", "tokens"],
)
def test_every_way_of_training_less_is_traced_within_three_percent(
    mode: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = resolved(mode, "cpu")
    train = {"kernels": "plain"} if "adapter" in settings else {}
    config = changed(config, tuning=changed(config.tuning, **settings), train=changed(config.train, **train))
    folder = save_random_model("llama", tmp_path / "llama")
    written = json.loads((folder / "config.json").read_text())
    written |= {} if settings else {NEW_TOKENS: [4094, 4095]}
    (folder / "config.json").write_text(json.dumps(written))
    real = measured(folder, config)
    traced = Tracer(config, written, device="cpu")
    peak = traced.step(LENGTHS, accumulating=False).peak
    assert peak == pytest.approx(real.peak, rel=0.03, abs=1.6e6), (real.parts, peak)


@pytest.mark.parametrize(
    "train",
    [
        {"optim": "muon", "objective": "dft", "z_loss": 1e-4},
        {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
        pytest.param({"optim": "adafactor"}, marks=pytest.mark.slow),
        pytest.param({"optim": "sgd"}, marks=pytest.mark.slow),
    ],
    ids=lambda train: train["optim"],
)
def test_every_optimizer_is_traced_within_three_percent(train: dict[str, Any], tmp_path: Path) -> None:
    if train["optim"].startswith("schedule_free"):
        pytest.importorskip("schedulefree")
    config = resolved("full", "cpu", **train)
    folder = save_random_model("llama", tmp_path / "llama")
    real = measured(folder, config)
    tracer = Tracer(config, json.loads((folder / "config.json").read_text()), device="cpu")
    traced = tracer.step(LENGTHS, accumulating=False)
    assert traced.peak == pytest.approx(real.peak, rel=0.03), (real.parts, traced.parts)
    assert tracer.optimizer_bytes(config.train.optim) == 0  # it is part of the trace


def test_the_trace_counts_elastic_weight_consolidation(tmp_path: Path) -> None:
    config = resolved("full", "cpu", ewc=EwcSection(strength=1.0))
    folder = save_random_model("llama", tmp_path / "llama")
    real = measured(folder, config)
    written = json.loads((folder / "config.json").read_text())
    tracer = Tracer(config, written, device="cpu")
    traced = tracer.step(LENGTHS, accumulating=False)
    assert traced.peak == pytest.approx(real.peak, rel=0.03), (real.parts, traced.parts)
    assert traced.parts["consolidation"] == real.parts["consolidation"] == 8 * tracer.parameters
    without = Tracer(resolved("full", "cpu"), written, device="cpu").step(LENGTHS, accumulating=False)
    assert traced.peak - without.peak >= 8 * tracer.parameters


def test_the_trace_counts_the_adafactor_of_encoder_decoders(tmp_path: Path) -> None:
    config = resolved("full", "cpu", optim="adafactor")
    folder = save_random_model("t5", tmp_path / "t5")
    real = measured(folder, config)
    tracer = Tracer(config, json.loads((folder / "config.json").read_text()), device="cpu")
    traced = tracer.step(LENGTHS, accumulating=False)
    assert traced.peak == pytest.approx(real.peak, rel=0.03), (real.parts, traced.parts)
    assert 0 < traced.parts["optimizer"] < 0.2 * traced.parts["weights"]  # rows and columns, not moments


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[] if size == "0.5B" else pytest.mark.slow) for size in PEAKS]
)
def test_the_trace_matches_published_figures(size: str) -> None:
    model = shapes.shipped_models()[f"Qwen/Qwen2.5-{size}-Instruct"]
    for (length, logits), expected in zip(CELLS, PEAKS[size], strict=True):
        config = resolved("qlora", "cuda", dropout=0.0, logits=logits, effective_batch=1)
        tracer = Tracer(config, model, device="cuda")
        peak = (tracer.step([length], accumulating=False).peak + tracer.optimizer_bytes("auto")) / GIB
        # our step frees the model's 16-bit logits before the backward pass, theirs does not
        freed = 2 * length * model["vocab_size"] / GIB if logits == "full" else 0.0
        assert peak == pytest.approx(expected - freed, abs=max(0.25, 0.05 * expected))


EXTRAPOLATED = [
    ("qwen2", "qlora", "cuda", 8),
    pytest.param("t5", "full", "cpu", 10, marks=pytest.mark.slow),
    pytest.param("mixtral", "full", "cuda", 10, marks=pytest.mark.slow),
    # five layers with a sliding window, then one without
    pytest.param("gemma3_text", "lora", "cpu", 38, marks=pytest.mark.slow),
    pytest.param("t5", "qlora", "cuda", 11, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "mode", "device", "layers"), EXTRAPOLATED)
def test_an_extrapolated_trace_has_the_bytes_of_the_whole_one(family: str, mode: str, device: str, layers: int) -> None:
    depth = "num_layers" if family == "t5" else "num_hidden_layers"
    config, model = resolved(mode, device), {**description(family), depth: layers}
    short, whole = (Tracer(config, model, device=device, extrapolated=on) for on in (True, False))
    assert short.removed > 0 == whole.removed
    assert short.parameters == whole.parameters
    assert short.optimizer_bytes("adamw_8bit") == whole.optimizer_bytes("adamw_8bit")
    for accumulating in (True, False):
        assert short.step([192, 192], accumulating=accumulating) == whole.step([192, 192], accumulating=accumulating)
    assert short.evaluation([192, 192]) == whole.evaluation([192, 192])
    assert short.generation(4, 100, 50) == whole.generation(4, 100, 50)
    assert short.removed > 0  # it did not fall back to tracing every layer


def test_offloaded_activations_leave_the_card_and_nothing_else_does() -> None:
    model = {**description("llama"), "num_hidden_layers": 12}
    on_card, offloaded = (
        Tracer(resolved("qlora", "cuda", activation_offload=on), model, device="cuda").step([2048], accumulating=True)
        for on in (False, True)
    )
    checkpoints = 12 * 2048 * 256 * 2  # the input of every layer, in 16 bit
    assert on_card.peak - offloaded.peak == pytest.approx(checkpoints, rel=0.2)
    assert on_card.parts["weights in 4 bit"] == offloaded.parts["weights in 4 bit"]


def test_paged_optimizer_state_is_not_on_the_card_and_8_bit_state_is_a_quarter() -> None:
    tracer = Tracer(resolved("lora", "cuda"), description("qwen2"), device="cuda")
    assert tracer.optimizer_bytes("paged_adamw_8bit") == tracer.optimizer_bytes("sgd") == 0
    assert tracer.optimizer_bytes("adamw_8bit") == pytest.approx(tracer.optimizer_bytes("auto") / 4, rel=0.1)


def test_experts_whose_adapters_take_no_dropout_are_an_error_with_a_fix() -> None:
    sizes = {"q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    experts = {"moe_intermediate_size": 128, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    rest = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
    model = {**description("llama"), **sizes, **experts, **rest, "model_type": "deepseek_v2"}
    with pytest.raises(ModelError, match="does not work with lora_dropout") as caught:
        Tracer(resolved("qlora", "cuda"), model, device="cuda")
    assert caught.value.where == "tuning.lora.dropout"
    assert "--set tuning.lora.dropout=0" in str(caught.value)
    assert Tracer(resolved("qlora", "cuda", dropout=0.0), model, device="cuda").parameters > 0


# ---- sizes


def test_weights_are_counted_exactly() -> None:
    model = shapes.shipped_models()["Qwen/Qwen2.5-0.5B-Instruct"]
    tracer = Tracer(resolved("lora", "cuda"), model, device="cuda")
    assert tracer.parameters == 494_032_768  # as in the model's safetensors


def test_the_shipped_list_is_planned_without_a_download() -> None:
    models = shapes.shipped_models()
    assert len(models) == 26
    assert models["google/flan-t5-base"]["model_type"] == "t5"
    assert models["Qwen/Qwen2.5-7B-Instruct"]["tie_word_embeddings"] is False


@pytest.mark.parametrize("objective", ["dpo", *(pytest.param(one, marks=pytest.mark.slow) for one in ("orpo", "kto"))])
def test_pairs_take_the_memory_of_as_many_rows(objective: str, tmp_path: Path) -> None:
    lengths = [*LENGTHS, *LENGTHS[:1]]
    plain = resolved("lora", "cpu")
    config = resolved("lora", "cpu", objective=objective, preference=PreferenceSection(beta=0.1))
    folder = save_random_model("llama", tmp_path / "llama")
    written = json.loads((folder / "config.json").read_text())
    traced = Tracer(config, written, device="cpu").step(lengths, accumulating=False)
    assert traced.peak == pytest.approx(measured(folder, config).peak, rel=0.03)
    rows = Tracer(plain, written, device="cpu").step(lengths, accumulating=False)
    assert traced.peak == pytest.approx(rows.peak, rel=0.02)
