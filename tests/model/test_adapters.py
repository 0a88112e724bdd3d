"""Adapters on real tiny models: NF4 trains on the CPU, the base keeps its bytes, another base is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from sft.config.schema import LoraSection, ModelSection, TuningSection
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
