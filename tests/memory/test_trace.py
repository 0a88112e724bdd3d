"""The traced peak against models that really train, against published traces, and against the trace of every layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import spawn  # type: ignore[attr-defined]
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from sft.config.schema import PREFERENCES, Config, EwcSection, LoraSection, PreferenceSection
from sft.errors import ModelError
from sft.memory import shapes
from sft.memory.trace import Phases, Tracer, fake_mesh, micro_batch
from sft.memory.tracker import Interval, MemoryTracker
from sft.model import adapters, load
from sft.model.hub import find
from sft.model.shard import shard
from sft.model.tokenizer import NEW_TOKENS
from sft.step import attention
from sft.step.step import compute_dtype
from tests.memory.cases import CELLS, FAMILIES, PEAKS, changed, description, resolved

GIB = 2.0**30
LENGTHS = [192, 192, 192]


def measured(folder: Path, config: Config, mesh: Any = None) -> Interval:
    """The highest moment of the second step of a model that really trains on the CPU."""
    files = find(changed(Config().model, name=str(folder)), folder, weights=True)
    chosen = attention.choose("cpu", files.config)
    dtype = torch.float32 if config.tuning.mode == "full" else compute_dtype(config.train)
    model: Any = load.load_base(
        files, config.model, config.tuning, dtype, device="cpu", train=True, attention=chosen, sharded=mesh is not None
    )
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
    if mesh is not None:
        shard(model, mesh, dtype=compute_dtype(config.train))
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


def test_ranks_that_share_the_weights_are_traced_as_they_train_and_their_traffic_is_counted(tmp_path: Path) -> None:
    """The collectives of `fake_mesh` move nothing, so one process trains here as a rank of two."""
    config = resolved("full", "cpu")
    folder = save_random_model("llama", tmp_path / "llama")
    written = json.loads((folder / "config.json").read_text())
    real = measured(folder, config, fake_mesh(2))
    traced = Tracer(config, written, device="cpu", ranks=2, sharding="fsdp").step(LENGTHS, accumulating=False)
    assert traced.peak == pytest.approx(real.peak, rel=0.01), (real.parts, traced.parts)
    whole = Tracer(config, written, device="cpu").step(LENGTHS, accumulating=False)
    for part in ("weights", "embedding and head", "optimizer"):
        assert traced.parts[part] == pytest.approx(whole.parts[part] / 2, rel=1e-3)
    assert whole.sent == 0
    copies = Tracer(config, written, device="cpu", ranks=2).step(LENGTHS, accumulating=False)
    assert whole.peak <= copies.peak <= whole.peak + 25 * 2**20 and copies.sent == 0
    edges, layers = 2 * 4096 * 256 + 256, 3 * (256 * (256 + 2 * 128 + 256 + 3 * 512) + 2 * 256)
    gathered = 2 * edges + 2 * 2 * layers  # bytes in bf16: the edges once, each layer for forward and backward
    assert traced.sent == (gathered + 4 * (edges + layers)) // 2  # a rank sends half; gradients are summed in fp32
    more = {**written, "num_hidden_layers": 12}
    deep = [Tracer(config, more, device="cpu", ranks=4, sharding="fsdp", extrapolated=few) for few in (True, False)]
    short, long = (tracer.step(LENGTHS, accumulating=False) for tracer in deep)
    assert deep[0].removed > 0 and (short.peak, short.sent) == (long.peak, long.sent)


def live_bytes(rank: int, address: str, folder: Path, configs: list[Config], out: Path) -> None:
    """Process `rank` of two writes the peak of each config, and rank 0 its trace, which is a plan beside real ranks."""
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    peaks = [measured(folder, config, mesh).peak for config in configs]
    written = json.loads((folder / "config.json").read_text())
    tracers = [Tracer(config, written, device="cpu", ranks=2, sharding="fsdp") for config in configs[: 2 - 2 * rank]]
    traced = [tracer.step(LENGTHS, accumulating=False).peak for tracer in tracers]
    (out / f"{rank}.json").write_text(json.dumps([peaks, traced]))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_plan_of_two_ranks_is_within_five_percent_of_their_live_bytes(family: str, tmp_path: Path) -> None:
    ways = [("full", False), ("full", True), ("lora", False), ("lora", True), ("qlora", True)]
    configs = [resolved(mode, "cpu", gradient_checkpointing=repeated) for mode, repeated in ways]
    folder = save_random_model(family, tmp_path / family)
    address = f"file://{tmp_path}/meeting"
    spawn(live_bytes, (address, folder, configs, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in (0, 1):
        peaks, beside = json.loads((tmp_path / f"{rank}.json").read_text())
        for config, peak, two in zip(configs, peaks, beside or [None] * len(configs), strict=False):
            written = json.loads((folder / "config.json").read_text())
            tracer = Tracer(config, written, device="cpu", ranks=2, sharding="fsdp")
            traced = tracer.step(LENGTHS, accumulating=False).peak
            assert traced == pytest.approx(peak, rel=0.05) and two in (None, traced)


@pytest.mark.parametrize(("mode", "checkpointing"), [("full", False), ("full", True), ("lora", False)])
def test_the_operations_of_a_step_are_those_that_torch_counts(mode: str, checkpointing: bool, tmp_path: Path) -> None:
    config = resolved(mode, "cpu", dropout=0.0, gradient_checkpointing=checkpointing, logits="full", bf16=False)
    per_token = Tracer(config, description("llama"), device="cpu").operations_per_token(LENGTHS[0])
    folder = save_random_model("llama", tmp_path / "llama")
    counter = FlopCounterMode(display=False)
    with counter:
        measured(folder, config)  # two steps
    assert per_token is not None
    # torch does not count this attention, 4 %; checkpointing stops before the last product of a layer
    assert counter.get_total_flops() == pytest.approx(2 * sum(LENGTHS) * per_token, rel=0.1)
