"""What an adapter adds to each tensor of its base, and the merged files written tensor by tensor.

LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023: alpha / sqrt(r)), DoRA (Liu et al. 2024: rows rescaled to a trained
length), ranks and alphas per layer as peft reads them, trained biases, modules saved whole.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sft.errors import ModelError
from sft.model.files import tensors

BLOCK = 1 << 24  # numbers merged at a time: 64 MiB in float32
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
SAFETENSORS_DTYPE = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
TORCH_DTYPE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_FLOATS = {"F64", "F32", "F16", "BF16"}
_ROUNDING = 1e-6  # relative; a smaller difference is float32's rounding, not a change
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
Progress = Callable[[int, int], None]  # tensors done, tensors in all


@dataclass
class TensorDelta:
    """The change to one tensor of the base: low-rank factors, or a whole replacement.

    tokens: {id: row} of new tokens, whose rows replace the base's. a [r, in], b [out, r], scale: of b @ a.
    magnitude [out]: DoRA's row lengths. replacement: the new tensor itself. transposed: the base stores the tensor as
    [in, out] (Conv1D, embeddings); decided by shape where it can be.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    magnitude: Tensor | None = None
    replacement: Tensor | None = None
    tokens: dict[int, Tensor] | None = None
    scale: float = 1.0
    transposed: bool = False


@dataclass
class MergeCounts:
    """How much the merge changed. tensors, numbers: that the adapter acts on; changed: numbers unlike the base's."""

    tensors: int = 0
    numbers: int = 0
    changed: int = 0


def read_deltas(folder: Path, config: dict[str, Any]) -> dict[str, TensorDelta]:
    """The adapter's deltas by the name of the base tensor that they change. config: adapter_config.json.

    Raises ModelError: another kind than LoRA, an initialisation that changed the base, damaged weights, unknown keys.
    """
    kind = str(config.get("peft_type", "LORA"))
    if kind != "LORA":
        what = f"merging supports LoRA, rsLoRA and DoRA; this adapter is {kind}, which is no change of weights"
        fix = "use it as it is (make eval, make infer), or train a LoRA adapter: --set tuning.adapter=lora"
        raise ModelError(what, where=str(folder), fix=fix)
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_INITS_THAT_CHANGE_THE_BASE):
        what = f"the adapter was initialised with {init}, which changes the base too: it does not fit the original base"
        fix = "convert it to a plain LoRA with peft first (path_initial_model_for_weight_conversion)"
        raise ModelError(what, where=str(folder), fix=fix)
    path = folder / "adapter_model.safetensors"
    try:
        loaded = load_file(path)
    except (SafetensorError, OSError) as error:
        what = f"the adapter's weights cannot be read or are truncated: {error}"
        fix = "use another checkpoint: --adapters outputs/RUN/checkpoint-N"
        raise ModelError(what, where=str(path), fix=fix) from None
    deltas: dict[str, TensorDelta] = {}
    for key, tensor in loaded.items():
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        layer, _, part = name.rpartition(".lora_")
        if name.endswith(TOKEN_ROWS):
            name = name.removesuffix(TOKEN_ROWS)
            by_name: dict[str, list[int]] = config["trainable_token_indices"]
            ids = next(ids for key, ids in by_name.items() if name == key or name.endswith("." + key))
            deltas[name + ".weight"] = TensorDelta(tokens=dict(zip(ids, tensor, strict=True)))
            continue
        if not layer:
            deltas.setdefault(name, TensorDelta()).replacement = tensor
            continue
        delta = deltas.setdefault(layer + ".weight", TensorDelta())
        if part in ("A.weight", "embedding_A"):
            delta.a, delta.scale = tensor, lora_scale(layer, tensor.shape[0], config)
        elif part in ("B.weight", "embedding_B"):
            delta.b = tensor
        elif part.startswith("magnitude_vector"):
            delta.magnitude = tensor
        else:
            raise ModelError(f"the adapter has a tensor that merging does not support: {key}", where=str(folder))
        delta.transposed |= part.startswith("embedding") or bool(config.get("fan_in_fan_out"))
    return deltas


def lora_scale(layer: str, rank: int, config: dict[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA. alpha: `alpha_pattern`'s first match for the layer, as in peft, else
    `lora_alpha`, else peft's default 8."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    match = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), None)
    alpha = patterns[match] if match is not None else config.get("lora_alpha", 8)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def rename_to_files(
    deltas: dict[str, TensorDelta], names: set[str], *, tied: bool, stays_tied: bool
) -> dict[str, TensorDelta]:
    """The deltas under the names that the base's files use (some files omit or add leading parts).

    names: every tensor in the base's files. tied: head and embedding are one tensor, stored once. stays_tied: so they
    stayed in training; otherwise a delta on one of the two unties them, and the head gets a tensor of its own
    (lm_head.weight, with an empty delta where the base's embedding stays the head).

    Raises ModelError if a delta has no tensor.
    """
    renamed: dict[str, TensorDelta] = {}
    for name, delta in deltas.items():
        stored = find_name(name, names)
        if stored is None and tied and name.endswith(HEAD):
            embedding = next((other for key, other in deltas.items() if key.endswith(EMBEDDING)), None)
            other = embedding.replacement if embedding else None
            if other is not None and delta.replacement is not None and torch.equal(other, delta.replacement):
                continue  # the same tensor under its second name
            shared = stays_tied and delta.replacement is not None and embedding is None
            stored = find_name(EMBEDDING, names) if shared else HEAD
        if stored is None or stored in renamed:
            raise ModelError(
                f"the adapter changes {name}, which the base does not have", fix="merge into the base of its training"
            )
        renamed[stored] = delta
    head_has_delta = any(name.endswith(HEAD) for name in deltas)
    table = renamed.get(find_name(EMBEDDING, names) or "")
    unties = table is not None and table.tokens is None  # new tokens have one row for both, as peft ties them
    if tied and not stays_tied and not head_has_delta and HEAD not in names and unties:
        renamed[HEAD] = TensorDelta()
    return renamed


def find_name(name: str, names: set[str]) -> str | None:
    """The stored name of a model's tensor: itself, else the only one that shares its longest possible ending."""
    if name in names:
        return name
    parts = name.split(".")
    for start in range(len(parts) - 1):
        ending = ".".join(parts[start:])
        if matches := [key for key in names if key == ending or key.endswith("." + ending)]:
            return matches[0] if len(matches) == 1 else None
    return None


def merged_blocks(weight: Tensor, delta: TensorDelta, name: str) -> Iterator[tuple[Any, Tensor]]:
    """The merged tensor in float32, some rows at a time: (index into the stored tensor, their values).

    W' = W + scale * b @ a, and with DoRA each output's weights rescaled to its magnitude (in float32 throughout).
    """
    if delta.a is None and delta.b is None:
        whole = weight if delta.replacement is None else delta.replacement
        if whole.shape != weight.shape:
            raise ModelError(
                f"{name} has the shape {list(weight.shape)} in the base and {list(whole.shape)} in the adapter: it"
                " resized the vocabulary, which merging does not support",
                fix="merge it with peft: merge_and_unload()",
            )
        for rows in _row_blocks(whole):
            values, start = whole[rows].float(), getattr(rows, "start", 0)
            inside = {token - start: row for token, row in (delta.tokens or {}).items()}
            inside = {index: row for index, row in inside.items() if 0 <= index < len(values)}
            if inside:
                values = values.clone()
                values[list(inside)] = torch.stack(list(inside.values())).float()
            yield rows, values
        return
    if delta.a is None or delta.b is None:
        raise ModelError(f"the adapter has only one of the two factors for {name}", fix="use another checkpoint")
    shape, expected = tuple(weight.shape), (delta.b.shape[0], delta.a.shape[1])
    if shape not in (expected, expected[::-1]):
        fix = "merge into the base of its training, in full precision (4-bit weights are stored packed)"
        raise ModelError(f"{name} has the shape {list(shape)} in the base and {list(expected)} in the adapter", fix=fix)
    transposed = shape != expected or (delta.transposed and expected == expected[::-1])
    left, right = (delta.a.T, delta.b.T) if transposed else (delta.b, delta.a)
    right = right.float()

    def added(rows: Any) -> Tensor:
        return torch.addmm(weight[rows].float(), left[rows].float(), right, alpha=delta.scale)

    magnitude = None if delta.magnitude is None else delta.magnitude.float().reshape(-1)
    column_scale = None
    if magnitude is not None and transposed:  # an output's weights are a column: its length needs all rows
        squares = torch.stack([added(rows).square().sum(0) for rows in _row_blocks(weight)])
        column_scale = magnitude / squares.sum(0).sqrt()
    for rows in _row_blocks(weight):
        values = added(rows)
        if column_scale is not None:
            values *= column_scale
        elif magnitude is not None:
            values *= (magnitude[rows] / torch.linalg.norm(values, dim=1)).unsqueeze(1)
        yield rows, values


def _row_blocks(tensor: Tensor) -> list[Any]:
    """Slices of the first dimension that hold at most BLOCK numbers each."""
    if tensor.ndim == 0 or tensor.numel() <= BLOCK:
        return [...]
    rows = max(1, BLOCK // (tensor.numel() // tensor.shape[0]))
    return [slice(at, at + rows) for at in range(0, tensor.shape[0], rows)]


def write_merged(
    sources: list[Path], out: Path, deltas: dict[str, TensorDelta], dtype: str, progress: Progress
) -> MergeCounts:
    """Writes each source file's tensors to `out` under the same file name, merged and in `dtype` (fp32, fp16, bf16).

    Raises ModelError if a number does not fit the type. OSError (a full disk) passes through.
    """
    counts, done, total = MergeCounts(), 0, sum(len(tensors(path)) for path in sources)
    for source in sources:
        header, stored_names = _header(source, deltas, dtype)
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with open(out / source.name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in header:
                with safe_open(source, "pt") as opened:  # opened per tensor, so that pages already read are released
                    weight = opened.get_tensor(stored_names[name])
                    _write_tensor(file, name, weight, deltas.get(name), dtype, counts)
                    del weight
                done += 1
                progress(done, total)
    return counts


def _write_tensor(
    file: BinaryIO, name: str, weight: Tensor, delta: TensorDelta | None, dtype: str, counts: MergeCounts
) -> None:
    if not weight.is_floating_point():
        file.write(_bytes(weight))
        return
    kind: torch.dtype = getattr(torch, TORCH_DTYPE[dtype])
    for rows, values in merged_blocks(weight, delta or TensorDelta(), name):
        rounded = values.to(kind)
        if not bool(torch.isfinite(rounded).all()):
            raise ModelError(f"{name} does not fit {dtype}: it has infinite or NaN values", fix="--dtype bf16 or fp32")
        if delta is not None:
            old = weight[rows]
            moved = (values - old.float()).abs_() > _ROUNDING * old.float().abs()
            counts.changed += int((moved & (rounded != old.to(kind))).sum())
            counts.numbers += values.numel()
        file.write(_bytes(rounded))
    counts.tensors += delta is not None


def _header(
    source: Path, deltas: dict[str, TensorDelta], dtype: str
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The output file's safetensors header (the source's order, floats in the new type), and each tensor's name in the
    source. A head that is untied from the embedding comes last, in the embedding's file.
    """
    stored = sorted(tensors(source).items(), key=lambda item: (item[1]["data_offsets"], item[0]))
    names = [(name, name, entry) for name, entry in stored]
    if HEAD in deltas and HEAD not in dict(stored):
        names += [(HEAD, name, entry) for name, entry in stored if name.endswith(EMBEDDING)]
    header, stored_names, offset = {}, {}, 0
    for name, stored_name, entry in names:
        first, last = entry["data_offsets"]
        floats = entry["dtype"] in _FLOATS
        length = math.prod(entry["shape"]) * BYTES[dtype] if floats else last - first
        kind = SAFETENSORS_DTYPE[dtype] if floats else entry["dtype"]
        header[name] = {"dtype": kind, "shape": entry["shape"], "data_offsets": [offset, offset + length]}
        stored_names[name], offset = stored_name, offset + length
    return header, stored_names


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
