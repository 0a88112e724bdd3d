"""Merging adapters of uncommon shape: ranks by layer, a head untied from its embedding, a larger vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from sft.errors import ModelError
from sft.ship.merge import merge

IDS = torch.arange(60).reshape(2, 30)


def tuned(folder: Path, out: Path, *, rows: int | None = None, **lora):
    """peft's own adapter on a base, every trained number different from its initial value; saved to `out`."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], **lora}
    model = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, **settings))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight), alpha=0.02)
    model.save_pretrained(out, save_embedding_layers=bool(rows) or "auto")
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "lora",
    [
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=["patterns", "embedding", "embedding-dora", "head", "saved-head", "saved-embedding", "stays-tied"],
)
def test_the_merged_model_gives_the_logits_of_the_adapter(tiny_qwen2, tmp_path, lora):
    model = tuned(tiny_qwen2, tmp_path / "a", **lora)
    report = merge(tmp_path / "a", tmp_path / "m", "fp32", tmp_path, base=str(tiny_qwen2))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert (logits(merged) - logits(model)).abs().max() <= 1e-4
    assert report.top1_agreement == 1.0
    parted = "lm_head" in str(lora) or lora.get("modules_to_save") == ["embed_tokens"] or "embed" in str(lora)
    assert merged.config.tie_word_embeddings is not (parted and "ensure_weight_tying" not in lora)
    assert merged.config.vocab_size == model.config.vocab_size


def test_an_adapter_that_resized_the_vocabulary_is_refused(tiny_qwen2, tmp_path):
    tuned(tiny_qwen2, tmp_path / "a", rows=448)
    with pytest.raises(ModelError, match="it resized the vocabulary, which merging does not support"):
        merge(tmp_path / "a", tmp_path / "m", "fp32", tmp_path, base=str(tiny_qwen2))
    assert not (tmp_path / "m").exists()


def test_an_adapter_whose_initialisation_changed_the_base_is_refused(tiny_qwen2, tmp_path):
    tuned(tiny_qwen2, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    with pytest.raises(ModelError, match="initialised with pissa, which changes the base too"):
        merge(tmp_path / "a", tmp_path / "m", "fp32", tmp_path, base=str(tiny_qwen2))
    assert not (tmp_path / "m").exists()


def test_a_merge_that_harms_is_an_error(tiny_qwen2, tmp_path, monkeypatch):
    from sft.ship import lora_delta

    tuned(tiny_qwen2, tmp_path / "a")
    (tmp_path / ".m.999999999.part").mkdir()  # what a killed merge left
    written = lora_delta.write_merged

    def spoilt(sources, out, *rest):
        tally = written(sources, out, *rest)
        with open(out / "model.safetensors", "r+b") as file:  # the numbers in the middle of the file lose their sign
            file.seek(-(out / "model.safetensors").stat().st_size // 2, 2)
            file.write(bytes(4000))
        return tally

    monkeypatch.setattr(lora_delta, "write_merged", spoilt)
    with pytest.raises(ModelError, match="differs from the trained one"):
        merge(tmp_path / "a", tmp_path / "m", "fp32", tmp_path, base=str(tiny_qwen2))
    assert not [path for path in tmp_path.iterdir() if path.name != "a"]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(128, 128, bias=False)


@pytest.mark.parametrize(("safe", "roundings"), [(False, 1), (True, 2)])
def test_peft_rounds_once_except_in_a_safe_merge(safe: bool, roundings: int) -> None:
    """Decision 0011 says how peft rounds; this holds it to the installed peft."""
    torch.manual_seed(0)
    model = get_peft_model(Layer().bfloat16(), LoraConfig(r=8, lora_alpha=16, target_modules=["q"]))
    layer = model.base_model.model.q
    for factor in (layer.lora_A["default"], layer.lora_B["default"]):
        factor.weight.data.normal_(0, 0.02)
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    merged = model.merge_and_unload(safe_merge=safe).q.weight
    assert torch.equal(merged, exact.bfloat16()) is (roundings == 1)
