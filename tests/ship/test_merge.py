"""Merging: peft's weights, the trained model's logits, and every refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sft import runs
from sft.config.schema import Config, LoraSection, ModelSection, TuningSection
from sft.errors import EnvironmentProblem, ModelError, RunError
from sft.model import adapters, hub, load
from sft.ship import verify
from sft.ship.merge import merge
from tests.model.test_files import sharded

IDS = torch.arange(60).reshape(2, 30)


def attached(folder: Path, seed: int = 0, mode: str = "lora", **lora):
    """A base with an adapter whose trained numbers all differ from their initial values."""
    tuning = TuningSection(mode=mode, lora=LoraSection(r=4, alpha=8, dropout=0.0, **lora))
    section = ModelSection(name=str(folder))
    files = hub.find(section, folder.parent)
    torch.manual_seed(seed)
    model = load.load_base(files, section, tuning, torch.float32, device="cpu", train=True)
    model = adapters.attach(model, tuning, gradient_checkpointing=False)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight), alpha=0.02)
    return model.eval()


def adapter(folder: Path, out: Path, **lora) -> Path:
    adapters.save(attached(folder, **lora), out)
    return out


def plain(folder: Path):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if "t5" in json.loads((folder / "config.json").read_text())["model_type"] else None
    return (kind or AutoModelForCausalLM).from_pretrained(folder).eval()


def logits(model) -> torch.Tensor:
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **extra).logits.float()


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"]},
        {"layers_to_transform": [1], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*up_proj": 3}},
    ],
    ids=lambda lora: next(iter(lora), "lora"),
)
def test_the_merged_model_is_peft_s_merged_model(tiny_qwen2, tmp_path, lora):
    model = attached(tiny_qwen2, **lora)
    adapters.save(model, tmp_path / "a")
    before = logits(model)
    report = merge(tmp_path / "a", tmp_path / "m", "fp32", tmp_path)
    assert report.max_logit_difference <= 1e-4
    assert report.changed_share > 0.9
    merged = plain(tmp_path / "m")
    assert (logits(merged) - before).abs().max() <= 1e-4
    expected = model.merge_and_unload().state_dict()
    for name, weight in merged.state_dict().items():
        assert torch.allclose(weight, expected[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("which", "lora"), [("tiny_gpt2", {}), ("tiny_gpt2", {"use_dora": True}), ("tiny_t5", {})],
    ids=["gpt2", "gpt2-dora", "t5"],
)  # fmt: skip
def test_other_families_merge_as_well(which, lora, request, tmp_path):
    folder = request.getfixturevalue(which)
    model = attached(folder, **lora)
    adapters.save(model, tmp_path / "a")
    merge(tmp_path / "a", tmp_path / "m", "fp32", tmp_path)
    assert (logits(plain(tmp_path / "m")) - logits(model)).abs().max() <= 1e-4


@pytest.mark.parametrize(("which", "init"), [("tiny_qwen2", "olora"), ("tiny_gpt2", "pissa")])
def test_an_adapter_that_began_with_the_base_s_weights_merges_into_the_unchanged_base(which, init, request, tmp_path):
    model = attached(request.getfixturevalue(which), init=init, use_rslora=True, rank_pattern={"up_proj|c_fc": 2})
    adapters.save(model, tmp_path / "a")
    report = merge(tmp_path / "a", tmp_path / "m", "fp32", tmp_path)
    assert (logits(plain(tmp_path / "m")) - logits(model)).abs().max() <= 1e-4
    assert report.max_logit_difference <= 1e-4


def test_a_prefix_is_no_change_of_weights_and_is_not_merged(tiny_qwen2, tmp_path):
    tuning, section = TuningSection(mode="lora", adapter="prefix"), ModelSection(name=str(tiny_qwen2))
    files = hub.find(section, tiny_qwen2.parent)
    model = load.load_base(files, section, tuning, torch.float32, device="cpu", train=True)
    adapters.save(adapters.attach(model, tuning, gradient_checkpointing=False), tmp_path / "a")
    with pytest.raises(ModelError, match="this adapter is PREFIX_TUNING"):
        merge(tmp_path / "a", tmp_path / "m", "fp32", tmp_path)


def test_gpt2_files_without_the_leading_part_of_the_names_merge_too(tiny_gpt2, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_gpt2, tmp_path / "hub-like")
    weights = load_file(tmp_path / "hub-like" / "model.safetensors")
    short = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(short, tmp_path / "hub-like" / "model.safetensors", metadata={"format": "pt"})
    model = attached(tmp_path / "hub-like")
    adapters.save(model, tmp_path / "a")
    merge(tmp_path / "a", tmp_path / "m", "fp32", tmp_path)
    assert (logits(plain(tmp_path / "m")) - logits(model)).abs().max() <= 1e-4


@pytest.mark.parametrize(("dtype", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_16_bit_merges_round_once(tiny_qwen2, tmp_path, dtype, kind):
    model = attached(tiny_qwen2)
    adapters.save(model, tmp_path / "a")
    report = merge(tmp_path / "a", tmp_path / "m", dtype, tmp_path)
    expected = model.merge_and_unload().state_dict()
    merged = plain(tmp_path / "m")
    assert merged.dtype == kind
    for name, weight in merged.state_dict().items():
        assert (weight.float() - expected[name]).abs().max() <= expected[name].abs().max() * 2**-8
    assert report.mean_kl < 1e-3
    assert report.bytes < 0.6 * (tiny_qwen2 / "model.safetensors").stat().st_size


def test_an_adapter_trained_on_4_bit_merges_into_the_full_weights(tiny_qwen2, tmp_path):
    model = attached(tiny_qwen2, mode="qlora")
    adapters.save(model, tmp_path / "a")
    tuning = TuningSection(mode="qlora", lora=LoraSection(r=4, alpha=8))
    runs.write_resolved(tmp_path / "a", Config(model=ModelSection(name=str(tiny_qwen2)), tuning=tuning))
    merge(tmp_path / "a", tmp_path / "m", "fp32", tmp_path)
    report = json.loads((tmp_path / "m" / "merge.json").read_text())
    assert (report["trained_on"], report["measured_on"]) == ("nf4", "full precision")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    base = plain(tiny_qwen2).state_dict()["model.layers.0.mlp.up_proj.weight"]
    merged = plain(tmp_path / "m").state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.allclose(merged - base, layer.get_delta_weight("default"), atol=1e-6)


def test_shards_stay_shards(tiny_qwen2, tmp_path):
    folder = sharded(tiny_qwen2, tmp_path / "shards")
    merge(adapter(folder, tmp_path / "a"), tmp_path / "m", "bf16", tmp_path)
    merged = hub.find(ModelSection(name="m"), tmp_path)
    assert [path.name for path in merged.weights] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == merged.parameters * 2


def test_the_merged_folder_has_everything_for_serving(tiny_qwen2, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    merge(adapter(tiny_qwen2, tmp_path / "a"), tmp_path / "m", "fp32", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    original = AutoTokenizer.from_pretrained(tiny_qwen2)
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.encode("Order 48213: café") == original.encode("Order 48213: café")
    ends = GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id
    assert original.convert_tokens_to_ids("<|im_end|>") in (ends if isinstance(ends, list) else [ends])
    answer = verify.smoke_test(tmp_path / "m", None, tmp_path)
    assert 0 < answer.tokens <= 256
    assert (answer.question, answer.reference) == (verify.GREETING, None)


def refused(call, kind: type[Exception], message: str, out: Path) -> None:
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(kind, match=message):
        call()
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    assert not list(out.parent.glob(".*.part"))


def test_a_merge_that_changes_nothing_is_an_error(tiny_qwen2, tmp_path):
    tuning = TuningSection(mode="lora")
    section = ModelSection(name=str(tiny_qwen2))
    files = hub.find(section, tmp_path)
    model = load.load_base(files, section, tuning, torch.float32, device="cpu", train=True)
    adapters.save(adapters.attach(model, tuning, gradient_checkpointing=False), tmp_path / "a")
    refused(
        lambda: merge(tmp_path / "a", tmp_path / "m", "fp32", tmp_path),
        ModelError,
        "the merge changed nothing",
        tmp_path / "m",
    )


def test_an_adapter_that_is_broken_or_of_another_kind_is_refused(tiny_qwen2, tmp_path):
    folder, out = adapter(tiny_qwen2, tmp_path / "a"), tmp_path / "m"
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"

    def again():
        return merge(folder, out, "fp32", tmp_path)

    blocked = tmp_path / "file"
    blocked.write_text("mine")
    with pytest.raises(EnvironmentProblem, match="it is a file"):
        merge(folder, blocked / "m", "fp32", tmp_path)
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(again, ModelError, "cannot be read or are truncated", out)
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "IA3"}))
    refused(again, ModelError, "this adapter is IA3", out)
    config.write_text("[]")
    refused(again, ModelError, "description is not JSON", out)


def test_another_base_is_refused(tiny_qwen2, tmp_path):
    from tests import tiny_models

    adapter(tiny_qwen2, tmp_path / "a")
    twin = tiny_models.tiny_qwen2(tmp_path / "twin", seed=1)
    refused(
        lambda: merge(tmp_path / "a", tmp_path / "m", "fp32", tmp_path, base=str(twin)),
        ModelError,
        "the weights differ",
        tmp_path / "m",
    )


def test_a_quantised_base_is_refused(tiny_qwen2, tmp_path):
    shutil.copytree(tiny_qwen2, tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "a")
    config = json.loads((tiny_qwen2 / "config.json").read_text())
    four = {**config, "quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(four))
    refused(
        lambda: merge(tmp_path / "a", tmp_path / "m", "fp32", tmp_path),
        ModelError,
        "stored quantised",
        tmp_path / "m",
    )


def test_only_an_earlier_merge_is_overwritten(tiny_qwen2, tmp_path):
    adapter(tiny_qwen2, tmp_path / "a")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("mine")
    for out in (tmp_path / "m", tmp_path / "a", tmp_path, tiny_qwen2):
        refused(lambda out=out: merge(tmp_path / "a", out, "fp32", tmp_path), RunError, "is not a merged model", out)
    (tmp_path / "a" / "merge.json").write_text("{}")
    refused(lambda: merge(tmp_path / "a", tmp_path / "a", "fp32", tmp_path), RunError, "the adapter or the base", out)
    merge(tmp_path / "a", tmp_path / "again", "fp32", tmp_path)
    assert merge(tmp_path / "a", tmp_path / "again", "bf16", tmp_path).dtype == "bf16"


def test_a_missing_adapter_or_merged_model_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="there is no adapter in"):
        merge(tmp_path / "a", tmp_path / "m", "fp16", tmp_path)
    with pytest.raises(ModelError, match="there is no merged model in"):
        verify.smoke_test(tmp_path / "m", None, tmp_path)


def test_a_full_run_has_nothing_to_merge(tiny_qwen2, tmp_path):
    shutil.copytree(tiny_qwen2, tmp_path / "run" / "model")
    refused(
        lambda: merge(tmp_path / "run", tmp_path / "m", "fp32", tmp_path),
        ModelError,
        "trained in full mode: there is nothing to merge, its model is .*run/model",
        tmp_path / "m",
    )


def test_numbers_too_large_for_fp16_are_refused(tiny_qwen2, tmp_path):
    model = attached(tiny_qwen2)
    for name, weight in model.named_parameters():
        if "layers.1.mlp.up_proj.lora_B" in name:
            weight.data.fill_(1e6)
    adapters.save(model, tmp_path / "a")
    refused(
        lambda: merge(tmp_path / "a", tmp_path / "m", "fp16", tmp_path),
        ModelError,
        r"up_proj.weight does not fit fp16",
        tmp_path / "m",
    )


def test_the_merge_of_another_run_is_named_before_it_is_replaced(tiny_qwen2, tmp_path, caplog):
    one, other = (adapter(tiny_qwen2, tmp_path / name) for name in ("one", "other"))
    merge(one, tmp_path / "m", "fp32", tmp_path)
    merge(one, tmp_path / "m", "fp32", tmp_path)
    assert "replaced" not in caplog.text
    merge(other, tmp_path / "m", "fp32", tmp_path)
    assert "m holds the merge of one, which will be replaced (--out DIR keeps it)" in caplog.text
