"""A model's files on disk: its kind by config.json, its safetensors files and their headers, its fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sft import files
from sft.errors import ConfigError, ModelError

Kind = Literal["causal", "seq2seq"]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Types that read in both directions unless `is_decoder` says otherwise, although they have a causal class. Listed, so
# that the usual model is recognised without importing transformers.
_ENCODERS = frozenset(
    "albert bert camembert data2vec-text deberta deberta-v2 distilbert electra ernie megatron-bert mobilebert"
    " modernbert mpnet rembert roberta roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl xmod".split()
)


def kind_of(config: dict[str, Any], requested: str = "auto", *, name: str = "the model") -> Kind:
    """The kind of the model that `config` (a config.json) describes; `requested` is `model.type`.

    Raises ModelError for encoders (BERT), classifiers and models without a language head, and if `requested` is
    another kind.
    """
    kind = _kind(config)
    shown = str((config.get("architectures") or [""])[0]) or config.get("model_type")
    if kind is None:
        what = f"{name} has no head that writes text ({shown}), so it cannot be trained on answers"
        fix = "choose a decoder-only model (Qwen2.5, Llama, Mistral, GPT-2) or an encoder-decoder (T5)"
        raise ModelError(what, where="model.name", fix=fix)
    if requested not in ("auto", kind):
        what = f"model.type is {requested}, but {name} is {kind} ({shown})"
        raise ModelError(what, where="model.type", fix=f"set model.type to auto or {kind}")
    return kind


def _kind(config: dict[str, Any]) -> Kind | None:
    """By the class name that saved the weights; by transformers' own lists where that is missing or says nothing."""
    architecture = str((config.get("architectures") or [""])[0])
    model_type, decoder = config.get("model_type"), config.get("is_decoder")
    seq2seq = bool(config.get("is_encoder_decoder"))
    if seq2seq and architecture.endswith(("ForConditionalGeneration", "LMHeadModel")):
        return "seq2seq"
    if not seq2seq and model_type in _ENCODERS and not decoder:
        return None
    if not seq2seq and architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    from transformers.models.auto import modeling_auto as auto

    if seq2seq:
        names = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        return "seq2seq" if model_type in names and architecture in ("", names[model_type]) else None
    masked = model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder
    writes = not architecture or architecture.endswith("ForConditionalGeneration")
    return "causal" if writes and not masked and model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: its folder, the name that it was requested by, and its config.json."""

    path: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    kind: Kind

    @cached_property
    def weights(self) -> list[Path]:
        """The safetensors files, each one checked for completeness. Raises ModelError."""
        return weight_files(self.path, self.name)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, tied ones counted once; from the weights' headers, else from the config alone."""
        if not has_weights(self.path):
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

            config = AutoConfig.from_pretrained(self.path, local_files_only=True)
            family = AutoModelForSeq2SeqLM if self.kind == "seq2seq" else AutoModelForCausalLM
            with torch.device("meta"):
                return sum(weight.numel() for weight in family.from_config(config).parameters())
        headers = [tensors(path) for path in self.weights]
        packed = 2 if self.quantised else 1  # bitsandbytes stores two 4-bit numbers in a byte
        return sum(
            math.prod(entry["shape"]) * (packed if entry["dtype"] == "U8" else 1)
            for header in headers
            for key, entry in header.items()
            if not (self.quantised and ".weight." in key)
        )

    def require_positions(self, max_seq_len: int) -> None:
        """Raises ConfigError if rows may be longer than a decoder-only model has positions for."""
        text = self.config.get("text_config") or self.config
        scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
        positions = text.get("max_position_embeddings") or text.get("n_positions") or 0
        positions = int(positions * max(1.0, float(scaling.get("factor") or 1)))
        if self.kind == "causal" and 0 < positions < max_seq_len:
            what = f"model.max_seq_len is {max_seq_len:,}, but {self.name} has {positions:,} positions"
            raise ConfigError(what, where="model.max_seq_len", fix=f"--set model.max_seq_len={positions}")

    @property
    def size(self) -> str:
        """The number of parameters, human-readable: `3.09B`, `494M`."""
        count = self.parameters
        return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.3g}M"

    @property
    def quantised(self) -> str | None:
        """The method by which the stored weights are quantised (`bitsandbytes`, `gptq`), None for full precision."""
        settings = self.config.get("quantization_config")
        return str(settings.get("quant_method", "unknown")) if settings else None

    @cached_property
    def bytes(self) -> int:
        """Size of the weights on the disk."""
        return sum(path.stat().st_size for path in self.weights)

    def fingerprint(self) -> str:
        """A hash that distinguishes two bases of the same shape without reading all of their weights.

        Of every tensor its name, type, shape and 256 bytes from its middle, whatever files the tensors are in.
        """
        parts: list[tuple[str, str, list[int], bytes]] = []
        for path in self.weights:
            start = _data_start(path)
            with open(path, "rb") as file:
                for key, entry in sorted(tensors(path).items(), key=lambda item: item[1]["data_offsets"][0]):
                    first, last = entry["data_offsets"]
                    file.seek(start + max(first, (first + last) // 2 - 128))
                    parts.append((key, entry["dtype"], entry["shape"], file.read(min(256, last - first))))
        return hashlib.sha256(repr(sorted(parts)).encode()).hexdigest()[:32]


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The folder's config.json. Raises ModelError if it is missing or no JSON object."""
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not path.is_file():
        what = f"{name} is an adapter, not a model"
        raise ModelError(what, where=str(folder), fix="set model.name to its base; name the adapter by --adapters")
    if not path.is_file():
        fix = "name a folder with config.json, tokenizer and safetensors, or a hub id"
        raise ModelError(f"the folder {name} has no config.json, so it is not a model", where=str(folder), fix=fix)
    config = files.read_json(path)
    if not config:
        raise ModelError(f"config.json of {name} is not a JSON object", where=str(path), fix=_again(name))
    return config


def has_weights(folder: Path) -> bool:
    """Whether the folder has safetensors weights, complete or not."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a folder. Raises ModelError if one is missing or truncated, or there are none."""
    index, paths = folder / INDEX, [folder / SINGLE]
    if index.is_file():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            paths = [folder / shard for shard in sorted(set(shards))]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"the index of {name} cannot be read", where=str(index), fix=_again(name)) from None
    elif not has_weights(folder):
        what, fix = f"{name} has no safetensors weights", "use a repository or folder with model.safetensors"
        if pickles := sorted(path.name for path in folder.glob("*.bin")):
            what += f", only {pickles[0]}, which can run code"
            fix = f"if you trust it: python scripts/download_model.py --model {folder} --allow-pickle"
        raise ModelError(what, where=str(folder), fix=fix)
    if missing := [path.name for path in paths if not path.is_file()]:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"{name} is incomplete: {len(missing)} of {len(paths)} shards are missing ({names})",
            where=str(folder),
            fix=_again(name),
        )
    for path in paths:
        end = max((entry["data_offsets"][1] for entry in tensors(path).values()), default=0)
        if path.stat().st_size < end + _data_start(path):
            raise ModelError(f"{path.name} of {name} is truncated", where=str(path), fix=_again(name))
    return paths


def tensors(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: tensor name -> {dtype, shape, data_offsets}. Raises ModelError."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= 100_000_000:
                raise ValueError("no header")
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        what = f"{path.name} is not a safetensors file, or is truncated ({error})"
        raise ModelError(what, where=str(path), fix="download or write it again") from None
    header.pop("__metadata__", None)
    return header


def _data_start(path: Path) -> int:
    """The byte at which the tensors' data starts."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _again(name: str) -> str:
    return f"download it again: make download-model MODEL={name}"
