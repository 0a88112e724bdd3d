"""Adapters on real tiny models: NF4 trains on the CPU, the base keeps its bytes, another base is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from sft import runs
from sft.config.schema import Config, LoraSection, ModelSection, TuningSection
from sft.errors import ModelError
from sft.model import adapters, hub, load
from tests import tiny_models

QLORA = TuningSection(mode="qlora", lora=LoraSection(r=4, alpha=8, dropout=0.0))
LORA = TuningSection(mode="lora", lora=LoraSection(r=4, alpha=8, dropout=0.0))


def base(folder: Path, tuning: TuningSection, dtype: torch.dtype = torch.float32):
    section = ModelSection(name=str(folder))
    files = hub.find(section, folder.parent)
    return load.load_base(files, section, tuning, dtype, device="cpu", train=True)


def frozen_bytes(model) -> dict[str, str]:
    return {
        name: hashlib.sha256(weight.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, weight in model.named_parameters()
        if not weight.requires_grad
    }


def step(model, optimizer, **inputs) -> float:
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def ids(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(0))


def train(model, steps: int = 8, **inputs) -> list[float]:
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    return [step(model, optimizer, **inputs) for _ in range(steps)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nf4_trains_on_the_cpu_and_leaves_the_base_alone(tiny_qwen2, dtype, checkpointing):
    import bitsandbytes as bnb

    torch.manual_seed(0)
    model = adapters.attach(base(tiny_qwen2, QLORA, dtype), QLORA, gradient_checkpointing=checkpointing)
    assert isinstance(model.get_base_model().model.layers[0].mlp.up_proj.base_layer, bnb.nn.Linear4bit)
    assert model.get_output_embeddings().weight.dtype == dtype
    assert {w.dtype for w in model.parameters() if w.requires_grad} == {torch.float32}
    before = frozen_bytes(model)
    losses = train(model, input_ids=ids(), labels=ids())
    assert losses[-1] < losses[0] - 0.1
    assert frozen_bytes(model) == before


def test_training_continues_after_an_evaluation(tiny_qwen2):
    # bitsandbytes 0.50.2 repacks 4-bit weights at the first evaluation on AVX512-BF16, and then has no gradient
    model = adapters.attach(base(tiny_qwen2, QLORA, torch.bfloat16), QLORA, gradient_checkpointing=False)
    before = frozen_bytes(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids())
    model.train()
    model(input_ids=ids(), labels=ids()).loss.backward()
    silent = [n for n, w in model.named_parameters() if "lora_B" in n and not w.grad.abs().sum() > 0]
    assert silent == []
    assert frozen_bytes(model) == before


def test_lora_finds_every_linear_layer_but_the_head(tiny_qwen2, tiny_gpt2, tiny_t5):
    assert adapters.linear_names(base(tiny_qwen2, LORA)) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    assert adapters.linear_names(base(tiny_gpt2, LORA)) == ["c_attn", "c_fc", "c_proj"]
    assert adapters.linear_names(base(tiny_t5, LORA)) == ["k", "o", "q", "v", "wi", "wo"]


def test_a_layer_that_shares_its_last_name_with_the_head_is_named_in_full():
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = torch.nn.ModuleDict({"out": torch.nn.Linear(4, 4), "up": torch.nn.Linear(4, 4)})
            self.out = torch.nn.Linear(4, 9)

        def get_output_embeddings(self):
            return self.out

    assert adapters.linear_names(Named()) == ["block.out", "up"]


def test_the_conv1d_layers_of_gpt2_train(tiny_gpt2):
    torch.manual_seed(0)
    model = adapters.attach(base(tiny_gpt2, LORA), LORA, gradient_checkpointing=True)
    assert model.peft_config["default"].fan_in_fan_out is True
    losses = train(model, input_ids=ids(), labels=ids())
    assert losses[-1] < losses[0] - 0.1


def test_gpt2_trains_in_4_bit(tiny_gpt2):
    model = adapters.attach(base(tiny_gpt2, QLORA), QLORA, gradient_checkpointing=False)
    before = frozen_bytes(model)
    losses = train(model, input_ids=ids(), labels=ids())
    assert losses[-1] < losses[0] - 0.1
    assert frozen_bytes(model) == before


@pytest.mark.parametrize("tuning", [LORA, QLORA], ids=["lora", "qlora"])
def test_t5_trains_with_adapters(tiny_t5, tuning):
    torch.manual_seed(0)
    model = adapters.attach(base(tiny_t5, tuning), tuning, gradient_checkpointing=False)
    assert model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    source, target = ids() % 60, ids(2, 6) % 60
    losses = train(model, input_ids=source, labels=target)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("extra", [{"use_rslora": True}, {"use_dora": True}, {"bias": "lora_only"}])
def test_lora_variants_train(tiny_qwen2, extra):
    tuning = TuningSection(mode="qlora", lora=LoraSection(r=4, alpha=8, dropout=0.0, **extra))
    model = adapters.attach(base(tiny_qwen2, tuning), tuning, gradient_checkpointing=False)
    losses = train(model, input_ids=ids(), labels=ids())
    assert losses[-1] < losses[0] - 0.1


def test_an_unknown_target_is_named_with_the_nearest(tiny_qwen2):
    tuning = TuningSection(mode="lora", lora=LoraSection(target_modules=["q_proj", "up_prj"]))
    with pytest.raises(ModelError, match="up_prj") as caught:
        adapters.attach(base(tiny_qwen2, tuning), tuning, gradient_checkpointing=False)
    assert "did you mean up_proj?" in str(caught.value)


def saved(folder: Path, tuning: TuningSection, out: Path) -> Path:
    model = adapters.attach(base(folder, tuning), tuning, gradient_checkpointing=False)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapters.save(model, out)
    return out


def test_a_saved_adapter_loads_unchanged(tiny_qwen2, tmp_path):
    torch.manual_seed(0)
    model = adapters.attach(base(tiny_qwen2, LORA), LORA, gradient_checkpointing=False)
    train(model, input_ids=ids(), labels=ids())
    adapters.save(model, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "base.json",
    ]  # fmt: skip
    again = adapters.load(base(tiny_qwen2, LORA), tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids()).logits, model.eval()(input_ids=ids()).logits)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_qwen2
    )


def test_an_adapter_for_another_shape_is_refused(tiny_qwen2, tmp_path):
    saved(tiny_qwen2, LORA, tmp_path / "a")
    wide = tiny_models.tiny_qwen2(tmp_path / "wide", intermediate_size=96)
    deep = tiny_models.tiny_qwen2(tmp_path / "deep", num_hidden_layers=3)
    for other, why in ((wide, "is 64 wide here|is 96 wide here"), (deep, "no weights for the layer model.layers.2")):
        with pytest.raises(ModelError, match=why) as caught:
            adapters.load(base(other, LORA), tmp_path / "a")
        assert str(tiny_qwen2) in str(caught.value)
        assert str(other) in str(caught.value)


def test_an_adapter_for_other_weights_of_the_same_shape_is_refused(tiny_qwen2, tmp_path):
    saved(tiny_qwen2, LORA, tmp_path / "a")
    twin = tiny_models.tiny_qwen2(tmp_path / "twin", seed=1)
    with pytest.raises(ModelError, match="the weights differ"):
        adapters.load(base(twin, LORA), tmp_path / "a")


def test_a_moved_base_is_still_the_same_base(tiny_qwen2, tmp_path):
    import shutil

    saved(tiny_qwen2, LORA, tmp_path / "a")
    shutil.copytree(tiny_qwen2, tmp_path / "elsewhere")
    loaded = adapters.load(base(tmp_path / "elsewhere", LORA), tmp_path / "a")
    assert any("lora_" in name for name, _ in loaded.named_parameters())


def test_a_pickled_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickled"):
        adapters.base_of(tmp_path)


def tuned(mode: str = "lora", **lora) -> TuningSection:
    return TuningSection(mode=mode, lora=LoraSection(**{"r": 4, "alpha": 8, "dropout": 0.0, **lora}))


def attached(folder: Path, tuning: TuningSection):
    torch.manual_seed(0)
    return adapters.attach(base(folder, tuning), tuning, gradient_checkpointing=False)


@pytest.mark.parametrize(("which", "init"), [("tiny_qwen2", "pissa"), ("tiny_qwen2", "olora"), ("tiny_gpt2", "pissa")])
def test_an_adapter_of_the_base_s_weights_trains_as_peft_s_and_leaves_the_base_alone(which, init, request):
    from peft import LoraConfig, get_peft_model

    folder = request.getfixturevalue(which)
    tuning = tuned(init=init, use_rslora=True, alpha=3)
    ours, theirs = attached(folder, tuning), base(folder, tuning)
    frozen = frozen_bytes(ours)
    for module in [*ours.modules(), *theirs.modules()]:
        if isinstance(module, torch.nn.Dropout):  # GPT-2's own
            module.p = 0.0
    with torch.no_grad():
        same = (ours(input_ids=ids()).logits - theirs(input_ids=ids()).logits).abs().max()
    config = ours.peft_config["default"]
    lora = LoraConfig(r=4, lora_alpha=3, use_rslora=True, init_lora_weights=init, task_type="CAUSAL_LM")
    lora.target_modules, lora.fan_in_fan_out = config.target_modules, config.fan_in_fan_out
    theirs = get_peft_model(theirs, lora)
    assert same < 1e-4
    mine, reference = (train(model, steps=4, input_ids=ids(), labels=ids()) for model in (ours, theirs))
    assert mine == pytest.approx(reference, rel=1e-4) and mine[-1] < mine[0] - 0.1
    assert frozen_bytes(ours) == frozen
    with ours.disable_adapter(), torch.no_grad():
        assert torch.equal(ours.eval()(input_ids=ids()).logits, base(folder, tuning).eval()(input_ids=ids()).logits)


@pytest.mark.parametrize("mode", ["lora", "qlora"])
@pytest.mark.parametrize("init", ["pissa_niter_2", "olora"])
def test_it_is_saved_as_plain_lora_that_loads_on_the_unchanged_base_and_goes_on(tiny_qwen2, tmp_path, mode, init):
    tuning = tuned(mode, init=init, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 5})
    model = attached(tiny_qwen2, tuning)
    train(model, input_ids=ids(), labels=ids())
    adapters.save(model, tmp_path / "a")
    with torch.no_grad():
        expected = model.eval()(input_ids=ids()).logits
        loaded = adapters.load(base(tiny_qwen2, tuned(mode)), tmp_path / "a")
        assert (loaded(input_ids=ids()).logits - expected).abs().max() < 1e-4
        torch.manual_seed(7)  # other first matrices, which those of the folder replace
        again = adapters.attach(base(tiny_qwen2, tuning), tuning, gradient_checkpointing=False)
        assert adapters.restore(again, tmp_path / "a") == ([], [])
        assert torch.equal(again.eval()(input_ids=ids()).logits, expected)


def test_ranks_alphas_and_layers_may_differ(tiny_qwen2):
    tuning = tuned(rank_pattern={"layers.0.*q_proj": 2}, alpha_pattern={"v_proj": 16}, layers_to_transform=[0])
    layers = dict(adapters.lora_layers(attached(tiny_qwen2, tuning)))
    assert len(layers) == 7 and all(".layers.0." in name for name in layers)
    ranks = {name.rpartition(".")[2]: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}
    assert (ranks["q_proj"], ranks["v_proj"], ranks["k_proj"]) == ((2, 4.0), (4, 4.0), (4, 2.0))


def test_targets_may_be_an_expression_or_all_linear_layers(tiny_qwen2):
    layers = adapters.lora_layers(attached(tiny_qwen2, tuned(target_modules=".*layers[.]1[.].*[qv]_proj")))
    assert [name.removeprefix("base_model.model.model.") for name, _ in layers] == [
        "layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj",
    ]  # fmt: skip
    assert len(list(adapters.lora_layers(attached(tiny_qwen2, tuned(target_modules="all-linear"))))) == 14


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": "q_proj"}, "matches no layer of the model"),
        ({"layers_to_transform": [0, 2]}, r"layers that the model does not have: \[2\]\n.*\n.*its layers are 0 to 1"),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern has 'q_prj', which matches no layer"),
        ({"alpha_pattern": {"lm_head": 2}}, "alpha_pattern has 'lm_head', which matches no layer"),
        ({"init": "pissa", "r": 33}, "self_attn.k_proj has 32 singular values, fewer than r 33"),
        ({"init": "pissa", "target_modules": ["embed_tokens"]}, "needs linear layers, and .*embed_tokens is Embedding"),
    ],
)
def test_what_an_adapter_cannot_be_attached_to_is_named(tiny_qwen2, lora, message):
    with pytest.raises(ModelError, match=message):
        attached(tiny_qwen2, tuned(**lora))


def test_a_new_run_goes_on_from_a_saved_adapter_of_its_own_base_and_shape(tiny_qwen2, tmp_path):
    folder = saved(tiny_qwen2, LORA, tmp_path / "a")
    same = LORA.model_copy(update={"adapter_path": str(folder)})
    first, again = adapters.load(base(tiny_qwen2, LORA), folder), attached(tiny_qwen2, same)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids()).logits, first(input_ids=ids()).logits)
    losses = train(again, input_ids=ids(), labels=ids())
    assert losses[-1] < losses[0] - 0.1
    wide = tuned(r=8, target_modules=["q_proj"]).model_copy(update={"adapter_path": str(folder)})
    with pytest.raises(ModelError, match="another shape: r, target_modules") as caught:
        attached(tiny_qwen2, wide)
    assert "--set 'tuning.lora.r=4' --set 'tuning.lora.target_modules=[" in str(caught.value)
    twin = tiny_models.tiny_qwen2(tmp_path / "twin", seed=1)
    with pytest.raises(ModelError, match="the weights differ"):
        attached(twin, same)


def test_a_prefix_trains_alone_and_is_saved_and_loaded_unchanged(tiny_qwen2, tiny_t5, tmp_path):
    tuning = TuningSection(mode="qlora", adapter="prefix", prefix_tokens=3)
    model = attached(tiny_qwen2, tuning)
    assert [w.shape[0] for w in model.parameters() if w.requires_grad] == [3]
    losses = train(model, input_ids=ids(), labels=ids())
    assert losses[-1] < losses[0]
    adapters.save(model, tmp_path / "a")
    with torch.no_grad():
        expected = model.eval()(input_ids=ids()).logits
        assert torch.equal(adapters.load(base(tiny_qwen2, tuning), tmp_path / "a")(input_ids=ids()).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids()).logits, base(tiny_qwen2, tuning).eval()(input_ids=ids()).logits)
    with pytest.raises(ModelError, match="prefix tuning is for decoder-only models"):
        attached(tiny_t5, tuning)
    for folder, settings in ((tiny_qwen2, tuning), (tiny_t5, LORA)):
        model = base(folder, settings)
        model.config.sft_new_token_ids = [7]
        with pytest.raises(ModelError, match="add_tokens needs mode full here"):
            adapters.attach(model, settings, gradient_checkpointing=False)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_begin_as_the_mean_of_their_parts_and_their_rows_alone_are_trained(tmp_path, tied):
    from sft.model.tokenizer import load_tokenizer
    from sft.ship.merge import merge

    folder = tiny_models.tiny_qwen2(tmp_path / "q", tie_word_embeddings=tied)
    section = ModelSection(name=str(folder), add_tokens=["<order>", "Mara Olsen", "the"])
    old, files = hub.find(section.model_copy(update={"add_tokens": []}), tmp_path), hub.find(section, tmp_path)
    tokenizer, before = load_tokenizer(files), load_tokenizer(old)
    rows = old.config["vocab_size"]
    new = tokenizer.convert_tokens_to_ids(["<order>", "Mara Olsen"])  # the third is a token already
    assert tokenizer.encode("Mara Olsen<order>", add_special_tokens=False) == [new[1], new[0]]
    assert files.config["sft_new_token_ids"] == sorted(new) and files.config["vocab_size"] == max(rows, *new) + (
        max(new) >= rows
    )
    model = load.load_base(files, section, LORA, torch.float32, device="cpu", train=True)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    for table in tables:
        for token, text in zip(new, ("<order>", "Mara Olsen"), strict=True):
            pieces = before.encode(text, add_special_tokens=False)
            assert torch.allclose(table[token], table[pieces].mean(0), atol=1e-6)
    torch.manual_seed(0)
    model = adapters.attach(model, LORA, gradient_checkpointing=False)
    frozen = frozen_bytes(model)
    sizes = [w.shape for n, w in model.named_parameters() if w.requires_grad and "lora_" not in n]
    assert sizes == [(2, tables[0].shape[1])] * (1 if tied else 2)
    tokens = torch.tensor([[5, new[0], 7, new[1], 9, new[0], 11]])
    losses = train(model, input_ids=tokens, labels=tokens)
    assert losses[-1] < losses[0] - 0.1 and frozen_bytes(model) == frozen
    adapters.save(model, tmp_path / "a")
    runs.write_resolved(tmp_path / "a", Config(model=section, tuning=LORA))
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
        again = adapters.load(
            load.load_base(files, section, LORA, torch.float32, device="cpu", train=False), tmp_path / "a"
        )
        assert torch.allclose(again(input_ids=tokens).logits, expected, atol=1e-6)
        merge(tmp_path / "a", tmp_path / "m", "fp32", tmp_path)
        merged = hub.find(section.model_copy(update={"name": str(tmp_path / "m")}), tmp_path)
        assert merged.path == tmp_path / "m" and "sft_new_token_ids" not in merged.config
        whole = load.load_base(merged, section, LORA, torch.float32, device="cpu", train=False)
        assert torch.allclose(whole(input_ids=tokens).logits, expected, atol=1e-4)


def test_full_mode_leaves_frozen_weights_as_they_are(tiny_qwen2):
    model = base(tiny_qwen2, TuningSection(mode="full"))
    adapters.freeze(model, ["embed_tokens", "layers[.]0[.]"])
    before, names = frozen_bytes(model), [name for name, _ in model.named_parameters()]
    assert sorted(before) == sorted(name for name in names if "embed_tokens" in name or "layers.0." in name)
    train(model, input_ids=ids(), labels=ids())
    assert frozen_bytes(model) == before
    for expressions, message in ((["layers[.]7"], "matches no weight"), ([""], "leaves no weight to train")):
        with pytest.raises(ModelError, match=message):
            adapters.freeze(model, expressions)


def test_lora_plus_trains_b_faster(tiny_qwen2):
    model = attached(tiny_qwen2, LORA)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    slow, none, fast = adapters.lora_plus(groups, model, 1e-3, 16)
    assert {weight.shape[0] for weight in slow["params"]} == {4} and len(slow["params"]) == len(fast["params"]) == 14
    assert (none["params"], fast["lr"], fast["weight_decay"]) == ([], 0.016, 0.1) and "lr" not in slow
