"""Finding a model: folders win, kinds are read from config.json, broken folders are named."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from sft.config.schema import ModelSection, TuningSection
from sft.errors import ConfigError, ModelError
from sft.model import files, hub, load


def find(name: object, root: Path, **settings):
    return hub.find(ModelSection(name=str(name), **settings), root)


def test_an_existing_folder_is_found_from_the_root(tiny_qwen2):
    model = find(tiny_qwen2.name, tiny_qwen2.parent)
    assert (model.path, model.name, model.revision, model.kind) == (tiny_qwen2, tiny_qwen2.name, None, "causal")


def test_parameters_are_counted_without_loading(tiny_qwen2, tiny_t5, tmp_path):
    from transformers import AutoModelForCausalLM

    expected = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_qwen2).parameters())
    assert find(tiny_qwen2, tmp_path).parameters == expected
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_qwen2 / "config.json", bare)
    assert hub.find(ModelSection(name="bare"), tmp_path, weights=False).parameters == expected
    assert find(tiny_t5, tmp_path).kind == "seq2seq"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "causal"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "causal"),
        ({"model_type": "llama"}, "causal"),
        ({"architectures": ["BertLMHeadModel"], "model_type": "bert", "is_decoder": True}, "causal"),
        (
            {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True},
            "seq2seq",
        ),
        ({"model_type": "bart", "is_encoder_decoder": True}, "seq2seq"),
    ],
)
def test_the_kind_is_read_from_the_config(config, expected):
    assert files.kind_of(config) == expected


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
        {"architectures": ["BertModel"], "model_type": "bert"},
        {"architectures": ["BertLMHeadModel"], "model_type": "bert"},
        {"model_type": "bert"},
        {"architectures": ["T5EncoderModel"], "model_type": "t5", "is_encoder_decoder": True},
        {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
        {"architectures": ["Qwen2Model"], "model_type": "qwen2"},
        {"model_type": "no-such-type"},
    ],
)
def test_models_that_cannot_generate_text_are_refused(config):
    with pytest.raises(ModelError, match="no head that writes text"):
        files.kind_of(config)


def test_a_wrong_model_type_is_refused(tiny_qwen2, tmp_path):
    with pytest.raises(ModelError, match=r"model.type is seq2seq, but .* is causal"):
        find(tiny_qwen2, tmp_path, type="seq2seq")


def sharded(source: Path, target: Path) -> Path:
    """The same weights in two files with an index."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, target / file, metadata={"format": "pt"})
    where = {name: file for file, part in halves.items() for name in part}
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (target / "model.safetensors").unlink()
    return target


def test_shards_are_one_model_and_keep_its_fingerprint(tiny_qwen2, tmp_path):
    whole, parts = find(tiny_qwen2, tmp_path), find(sharded(tiny_qwen2, tmp_path / "shards"), tmp_path)
    assert whole.parameters == parts.parameters
    assert whole.fingerprint() == parts.fingerprint()


def test_a_missing_shard_is_named(tiny_qwen2, tmp_path):
    (sharded(tiny_qwen2, tmp_path / "m") / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 of 2 shards are missing \(model-00002-of-00002.safetensors\)") as caught:
        find("m", tmp_path)
    assert "make download-model MODEL=m" in str(caught.value)


def test_a_truncated_file_is_named(tiny_qwen2, tmp_path):
    shutil.copytree(tiny_qwen2, tmp_path / "m")
    whole = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=r"model.safetensors of m is truncated"):
        find("m", tmp_path)
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="not a safetensors file"):
        find("m", tmp_path)


def test_pickled_weights_are_never_used(tiny_qwen2, tmp_path):
    shutil.copytree(tiny_qwen2, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"no safetensors weights, only pytorch_model.bin"):
        find("m", tmp_path)


def test_an_adapter_given_as_a_model_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="a is an adapter, not a model"):
        find("a", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "the model folder ./nowhere does not exist"),
        ("nobody/no-such-model", "not in the hub's cache, and HF_HUB_OFFLINE forbids"),
        ("not a name!", "neither an existing folder nor a hub id"),
    ],
)
def test_a_model_that_is_not_cached_is_an_error_offline(tmp_path, name, message):
    with pytest.raises(ModelError, match=message):
        find(name, tmp_path)


def test_weights_that_would_be_random_are_an_error(tiny_qwen2, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_qwen2, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    section = ModelSection(name="m")
    for mode in ("lora", "qlora"):
        with pytest.raises(ModelError, match=r"no weights for 1 tensors.*up_proj"):
            load.load_base(
                hub.find(section, tmp_path), section, TuningSection(mode=mode), torch.float32, device="cpu", train=True
            )


def test_a_base_that_is_stored_quantised_is_refused_for_lora(tiny_qwen2, tmp_path):
    shutil.copytree(tiny_qwen2, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    section = ModelSection(name="m")
    with pytest.raises(ModelError, match=r"stored quantised \(gptq\)"):
        load.load_base(
            hub.find(section, tmp_path), section, TuningSection(mode="lora"), torch.float32, device="cpu", train=True
        )


def test_the_header_reader_agrees_with_safetensors(tiny_gpt2):
    from safetensors import safe_open

    with safe_open(tiny_gpt2 / "model.safetensors", "pt") as opened:
        expected = {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    got = files.tensors(tiny_gpt2 / "model.safetensors")
    assert {name: entry["shape"] for name, entry in got.items()} == expected


@pytest.mark.parametrize(
    ("name", "message"), [("no_such_attention", "no_such_attention"), ("flash_attention_2", "FlashAttention2")]
)
def test_an_unknown_attention_is_an_error(tiny_qwen2, tmp_path, name, message):
    section = ModelSection(name=str(tiny_qwen2), attn_implementation=name)
    with pytest.raises(ModelError, match=message) as caught:
        load.load_base(
            hub.find(section, tmp_path), section, TuningSection(mode="lora"), torch.float32, device="cpu", train=True
        )
    assert "model.attn_implementation" in str(caught.value)


def test_code_that_comes_with_a_model_runs_only_with_consent_and_a_warning(tiny_qwen2, tmp_path, caplog):
    logging.getLogger("sft").propagate = True
    section = ModelSection(name=str(tiny_qwen2), trust_remote_code=True)
    with caplog.at_level("WARNING"):
        model = load.load_base(
            hub.find(section, tmp_path), section, TuningSection(mode="lora"), torch.float32, device="cpu", train=False
        )
    assert "runs on this machine" in caplog.text
    assert (model.training, model.config.use_cache) == (False, True)


def test_rows_longer_than_the_models_positions_are_refused(tiny_qwen2: Path, tiny_gpt2: Path, tiny_t5: Path) -> None:
    for path, positions in ((tiny_qwen2, 1024), (tiny_gpt2, 512)):
        model = hub.find(ModelSection(name=str(path)), path)
        model.require_positions(positions)
        with pytest.raises(ConfigError, match=rf"max_seq_len is 999,999, but .* has {positions:,} positions"):
            model.require_positions(999_999)
    hub.find(ModelSection(name=str(tiny_t5)), tiny_t5).require_positions(999_999)  # its positions are relative
