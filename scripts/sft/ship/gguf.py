"""GGUF files for llama.cpp, written from safetensors tensor by tensor and read back: architecture, vocabulary, weights.

Tensor names come from the gguf package's TensorNameMap; what is special to an architecture follows llama.cpp's
convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from sft.errors import ModelError, one_line
from sft.model.files import ModelFiles, tensors
from sft.model.gguf import (
    CONTROL,
    END_KEYS,
    NORMAL,
    PRE_TOKENIZERS,
    PROBES,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    first_difference,
    has_llama_cpp,
    llama_cpp,
    open_in_llama_cpp,
    rope_factors,
    rope_settings,
)
from sft.ship.lora_delta import Progress

ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
}
BYTES = {"f16": 2.0, "q8_0": 34 / 32, "bf16": 2.0, "f32": 4.0}  # per number
K_QUANTS = {"q4_k_m": "Q4_K_M", "q5_k_m": "Q5_K_M", "q6_k": "Q6_K"}  # ours -> llama.cpp's name
K_SOURCE = "f16"  # the type that a K-quant is made from
CONVERTER = (
    "--converter llama.cpp/convert_hf_to_gguf.py (git clone https://github.com/ggml-org/llama.cpp), or --format hf"
)
_LLAMA_CPP_ENDS = set(  # tokens at which llama.cpp ends an answer whatever the file says
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>"
    " <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos>".split()
)
_TOKENISE = """import llama_cpp, sys
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
for text in sys.argv[2:]: model.tokenize(text.encode(), add_bos=True, special=True)"""
_RELATIVE_ERROR = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8}  # half a step
Array = NDArray[Any]


# --- the architecture


def architecture(config: dict[str, Any], name: str) -> str:
    """llama.cpp's name of the model's architecture. Raises ModelError for one that is not supported."""
    model_class = next(iter(config.get("architectures") or ["unknown"]))
    if model_class not in ARCHITECTURES:
        what = f"{name} is a {model_class}; export to GGUF supports {', '.join(ARCHITECTURES)}"
        raise ModelError(what, where="config.json: architectures", fix=CONVERTER)
    if ARCHITECTURES[model_class] == "qwen3" and (config.get("attention_bias") or config.get("mlp_bias")):
        raise ModelError(f"{name} has biases that llama.cpp's {model_class} does not support", fix="--format hf")
    return ARCHITECTURES[model_class]


def _write_dimensions(writer: gguf.GGUFWriter, config: dict[str, Any], arch: str) -> None:
    """Raises ModelError for position scalings that are not supported."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    context, window = config["max_position_embeddings"], config.get("sliding_window")
    sliding = config.get("use_sliding_window", arch == "llama") and window
    writer.add_context_length(min(context, window) if sliding else context)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if arch == "llama":
        writer.add_rope_dimension_count(width)
    rope = rope_settings(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    elif kind not in ("default", "llama3"):
        raise ModelError(f"export to GGUF does not support {kind} scaling of positions", fix="--format hf")


# --- the vocabulary


def vocabulary_of_tokenizer(
    tokenizer: PreTrainedTokenizerBase, rows: int, ends: list[int], *, adds_bos: bool, texts: Iterable[str] = ()
) -> Vocabulary:
    """The vocabulary of a byte-level BPE tokenizer. rows: of the embedding. texts: probes besides our own.

    Raises ModelError for other kinds of tokenizer, and if no pre-tokenizer of llama.cpp gives the model's ids.
    """
    state = byte_level_bpe(tokenizer)
    tokens, types = [f"[PAD{at}]" for at in range(rows)], [UNUSED] * rows
    for token, at in state["model"]["vocab"].items():
        tokens[at], types[at] = token, NORMAL
    for added in state["added_tokens"]:
        if added["id"] < rows:
            special = added["special"] or added["id"] in ends
            tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if special else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    candidates = [Vocabulary(tokens, types, merges, pre, bos, pad, ends, adds_bos) for pre in PRE_TOKENIZERS]
    probes = [*PROBES, *texts]
    differences = [first_difference(tokenizer, candidate, probes) for candidate in candidates]
    equal = [candidate for candidate, difference in zip(candidates, differences, strict=True) if difference is None]
    own = tokenizer.backend_tokenizer.pre_tokenizer

    def splits_differently(candidate: Vocabulary) -> bool:
        other = candidate.as_tokenizer().pre_tokenizer
        return any(own.pre_tokenize_str(text) != other.pre_tokenize_str(text) for text in probes)

    if equal:  # where several give the same ids on the probes, one that splits text alike is safest
        return min(equal, key=splits_differently)
    what = f"no pre-tokenizer of llama.cpp gives the model's ids; with {candidates[0].pre}, {differences[0]}"
    raise ModelError(what, where="tokenizer.json", fix=f"{CONVERTER}, which may know this tokenizer by name")


def byte_level_bpe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer's tokenizer.json. Raises ModelError if it is not a byte-level BPE."""
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or "ByteLevel" not in json.dumps(state["pre_tokenizer"]):
        what = "export to GGUF supports byte-level BPE tokenizers only; this is another kind (as Llama 2's and Gemma's)"
        raise ModelError(what, where="tokenizer.json", fix=CONVERTER)
    return state


def stop_ids(vocabulary: Vocabulary) -> set[int]:
    """The ids at which llama.cpp ends an answer."""
    known = {at for at, token in enumerate(vocabulary.tokens) if token in _LLAMA_CPP_ENDS}
    return {*vocabulary.ends[: len(END_KEYS)], *known}


def _write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for key, token in zip(END_KEYS, vocabulary.ends, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{key}", token)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    if vocabulary.pad is not None:
        writer.add_pad_token_id(vocabulary.pad)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(False)


# --- the file


@dataclass(frozen=True)
class TensorPlan:
    """A tensor of the GGUF file: its name there, where it comes from, its shape and type."""

    name: str
    path: Path
    source: str
    shape: list[int]
    kind: GgmlType

    def values(self, config: dict[str, Any], arch: str) -> Array:
        """The tensor in float32 as llama.cpp expects it: Llama's queries and keys with the two halves of each head
        interleaved.
        """
        with safe_open(self.path, "pt") as opened:
            values: Array = np.ascontiguousarray(opened.get_tensor(self.source).float().numpy())
        if arch != "llama" or not re.search(r"\.self_attn\.[qk]_proj\.", self.source):
            return values
        heads = config["num_attention_heads"]
        if ".k_proj." in self.source:
            heads = config.get("num_key_value_heads") or heads
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _plan_tensors(files: ModelFiles, arch: str, kind: str) -> list[TensorPlan]:
    """The tensors in the files' order; a head that is the embedding is left out. Vectors and norms stay f32, and rows
    that are not whole q8_0 blocks become f16. Raises ModelError for a tensor that GGUF has no name for.
    """
    arch_id = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    mapping = gguf.get_tensor_name_map(arch_id, files.config["num_hidden_layers"])
    plans = []
    for path in files.weights:
        for source, entry in tensors(path).items():
            if source.endswith((".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")):
                continue  # computed, not trained
            name, shape = mapping.get_name(source, try_suffixes=(".weight", ".bias")), entry["shape"]
            if name is None:
                raise ModelError(f"GGUF has no tensor for {source} in {arch}", fix="--format hf")
            if name == "output.weight" and files.config.get("tie_word_embeddings"):
                continue
            tensor_kind = GgmlType[kind.upper()]
            if len(shape) == 1 or name.endswith("_norm.weight"):
                tensor_kind = GgmlType.F32
            elif kind == "q8_0" and shape[-1] % 32:
                tensor_kind = GgmlType.F16
            plans.append(TensorPlan(name, path, source, shape, tensor_kind))
    return plans


def write(
    files: ModelFiles, path: Path, kind: str, vocabulary: Vocabulary, template: str | None, progress: Progress
) -> int:
    """Writes `files` to `path`; returns the number of tensors. kind: f16, q8_0, bf16 or f32.

    Raises ModelError for an architecture that is not supported, and for numbers that do not fit the type.
    """
    arch = architecture(files.config, files.name)
    plans = _plan_tensors(files, arch, kind)
    factors = rope_factors(files.config)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(files.name).name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_dimensions(writer, files.config, arch)
    _write_vocabulary(writer, vocabulary)
    if template is not None:
        writer.add_chat_template(template)
    sizes = [(plan.name, plan.shape, plan.kind) for plan in plans]
    if factors is not None:
        sizes.append(("rope_freqs.weight", list(factors.shape), GgmlType.F32))
    for name, shape, tensor_kind in sizes:
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_kind]
        size = int(np.prod(shape)) // block * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=tensor_kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for at, plan in enumerate(plans):
            values = plan.values(files.config, arch)
            if plan.kind == GgmlType.F16 and values.size and float(np.abs(values).max()) > 65504:
                reason = "a number in it becomes infinite"
                raise ModelError(f"{plan.source} does not fit f16: {reason}", fix="--type bf16, f32 or q8_0")
            writer.write_tensor_data(gguf.quants.quantize(values, plan.kind))
            progress(at + 1, len(plans))
        if factors is not None:
            writer.write_tensor_data(factors)
    finally:
        writer.close()
    return len(plans)


def check(files: ModelFiles, path: Path, kind: str, progress: Progress) -> float:
    """Reads the file back and compares every tensor with the model's; returns the largest error of a number.

    Raises ModelError if one is missing or off by more than its type's rounding.
    """
    arch = architecture(files.config, files.name)
    plans, largest = _plan_tensors(files, arch, kind), 0.0
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if missing := sorted({plan.name for plan in plans} - set(stored)):
        raise ModelError(f"{path.name} lacks {len(missing)} tensors: {', '.join(missing[:3])}", where=str(path))
    for at, plan in enumerate(plans):
        values, tensor = plan.values(files.config, arch), stored[plan.name]
        read = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type).reshape(values.shape)
        error = np.abs(read - values)
        if not bool((error <= _allowed_error(values, tensor.tensor_type)).all()):
            raise ModelError(
                f"{plan.name} in {path.name} differs from the model's by up to {float(error.max()):.3g}, more than"
                f" {tensor.tensor_type.name} rounds",
                where=str(path),
                fix="report this; --format hf is not affected",
            )
        largest = max(largest, float(error.max(initial=0.0)))
        progress(at + 1, len(plans))
    return largest


def _allowed_error(values: Array, kind: GgmlType) -> Array:
    """Half a step of the type, for each number."""
    if kind == GgmlType.Q8_0:  # a block of 32 shares one scale, its largest / 127, stored as f16
        largest = np.abs(values).reshape(-1, 32).max(axis=1, keepdims=True)
        return np.repeat(largest * (0.5 / 127 + 2**-10) + 2**-17, 32, axis=1).reshape(values.shape)
    smallest_step: float = 2**-24 if kind == GgmlType.F16 else 0.0
    return np.abs(values) * _RELATIVE_ERROR[kind.name] + smallest_step


# --- llama.cpp's own code: its converter, K-quants, token ids and logits


def convert(converter: Path, folder: Path, path: Path, kind: str, name: str) -> int:
    """Writes the model in `folder` to `path` by llama.cpp's convert_hf_to_gguf.py; returns the number of tensors.

    Raises ModelError if it refuses the model, leaves no complete file, or one with which llama.cpp cannot tokenise.
    """
    command = [sys.executable, str(converter), str(folder), "--outfile", str(path), "--outtype", kind]
    done = subprocess.run(
        [*command, "--model-name", name],
        check=False, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    problem = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it wrote no file")
    if done.returncode == 0 and path.is_file():
        try:
            count = len(gguf.GGUFReader(path).tensors)
            tried = [sys.executable, "-c", _TOKENISE, str(path), *PROBES]  # llama.cpp ends a process that it fails in
            if not has_llama_cpp() or subprocess.run(tried, check=False, capture_output=True).returncode == 0:
                return count
            problem = "llama.cpp cannot tokenise with its file"
        except Exception as error:  # whatever reading beyond the end of the file leads to
            problem = f"its file cannot be read: {one_line(error, 120)}"
    fix = "a newer llama.cpp may support the model (git pull in its folder); --format hf needs no converter"
    raise ModelError(f"{converter.name} cannot convert {name}: {one_line(problem, 300)}", where=str(converter), fix=fix)


def quantize(source: Path, target: Path, kind: str) -> None:
    """Writes the GGUF file `source` as `kind` to `target`. Raises ModelError if llama.cpp cannot."""
    llama = llama_cpp()
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{K_QUANTS[kind]}")
    if code := llama.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise ModelError(f"llama.cpp cannot write {target.name} (code {code})", fix="--type q8_0, or --type f16")


def text_ids(path: Path, begin: str) -> Callable[[str], list[int]] | None:
    """llama.cpp's own token ids of a rendered text; None where it is not installed or cannot open the file.

    begin: the begin token that llama.cpp puts first itself, "" if it puts none; it is removed from the text.
    """
    model = open_in_llama_cpp(path, vocab_only=True)
    if model is None:
        return None
    return lambda text: list(model.tokenize(text.removeprefix(begin).encode(), add_bos=True, special=True))


def logits(path: Path, rows: list[list[int]]) -> list[Array] | None:
    """llama.cpp's logits [tokens, vocabulary] for each row of ids, computed on the CPU; None as for `text_ids`."""
    length = max(map(len, rows))
    model = open_in_llama_cpp(path, n_ctx=length, n_batch=length, logits_all=True)
    if model is None:
        return None
    result = []
    for ids in rows:
        model.reset()
        model.eval(ids)
        result.append(model.scores[: len(ids)].copy())
    return result
