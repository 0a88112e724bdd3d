"""An adapter merged into weights one tensor at a time, from file to file: memory is that of the largest tensor.

The sums are taken in float32 and rounded once. LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023: alpha / sqrt(r)),
DoRA (Liu et al. 2024: rows scaled to a learnt length), trained biases and modules saved whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import ModelError
from sft.model.files import tensors

if TYPE_CHECKING:
    import torch

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_FLOATS = {"F64", "F32", "F16", "BF16"}
Progress = Callable[[int, int, str], None]


@dataclass
class Change:
    """What one adapted tensor becomes: low-rank factors (with DoRA's row lengths), or a whole replacement."""

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    whole: torch.Tensor | None = None


@dataclass
class Tally:
    """How much the merge changed: numbers that differ from the base's, of those that an adapter acts on."""

    tensors: int = 0
    numbers: int = 0
    changed: int = 0


def dtype_of(name: str) -> torch.dtype:
    """`fp32`, `fp16` or `bf16` as a torch dtype."""
    import torch

    kinds: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return kinds[name]


def read_changes(folder: Path, config: dict[str, Any]) -> dict[str, Change]:
    """The adapter's tensors by the name of the base tensor that they change. Raises ModelError for what is unknown."""
    from safetensors.torch import load_file

    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ModelError("adapters with ranks by layer (rank_pattern) cannot be merged", where=str(folder))
    changes: dict[str, Change] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        layer, _, part = name.rpartition(".lora_")
        if not layer:
            changes.setdefault(name, Change()).whole = tensor
        elif part == "A.weight":
            changes.setdefault(layer + ".weight", Change()).a = tensor
        elif part == "B.weight":
            changes.setdefault(layer + ".weight", Change()).b = tensor
        elif part.startswith("magnitude_vector"):
            changes.setdefault(layer + ".weight", Change()).magnitude = tensor
        else:
            raise ModelError(f"the adapter holds {key}, which merging does not know", where=str(folder))
    return changes


def place(changes: dict[str, Change], names: set[str], *, tied: bool) -> dict[str, Change]:
    """The changes under the names that the base's files use (some files leave out or add leading parts).

    names: every tensor in the base's files. Raises ModelError where a tensor has no place.
    """
    placed: dict[str, Change] = {}
    for name, change in changes.items():
        home = _home(name, names)
        if home is None and tied and change.whole is not None:
            twin = [key for key, other in changes.items() if other.whole is not None and key != name]
            if any(_same(changes[key].whole, change.whole) and _home(key, names) for key in twin):
                continue  # the head of a model whose head is its embedding
        if home is None or home in placed:
            raise ModelError(
                f"the adapter changes {name}, which the base's files do not hold under any name",
                mend="merge onto the base that it was trained on",
            )
        placed[home] = change
    return placed


def merged(weight: torch.Tensor, change: Change, config: dict[str, Any], name: str) -> torch.Tensor:
    """`weight` with the change in it, float32. A weight whose shape is (in, out), as GPT-2's, is turned for the sum."""
    import torch

    if change.whole is not None:
        return change.whole.float()
    if change.a is None or change.b is None:
        raise ModelError(f"the adapter has only one of the two factors for {name}", mend="take another checkpoint")
    rank, wide, tall = change.a.shape[0], change.a.shape[1], change.b.shape[0]
    straight, turned = tuple(weight.shape) == (tall, wide), tuple(weight.shape) == (wide, tall)
    if not straight and not turned:
        raise ModelError(f"{name} is {list(weight.shape)} in the base, the adapter's is {[tall, wide]}")
    flip = turned and (not straight or bool(config.get("fan_in_fan_out")))
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    base = weight.float().T if flip else weight.float()
    result: torch.Tensor = base + scale * (change.b.float() @ change.a.float())
    if change.magnitude is not None:
        result = result * (change.magnitude.float() / torch.linalg.norm(result, dim=1)).unsqueeze(1)
    return (result.T if flip else result).contiguous()


def write(
    sources: list[Path], out: Path, changes: dict[str, Change], config: dict[str, Any], dtype: str, progress: Progress
) -> Tally:
    """Writes each source file's tensors into `out` under the same file name, merged and in `dtype`; returns the tally.

    Raises ModelError where a number does not fit the type. OSError (a full disk) passes through.
    """
    tally, done, total = Tally(), 0, sum(len(tensors(path)) for path in sources)
    for source in sources:
        header = _header(source, dtype)
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with open(out / source.name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, weight in _read(source, list(header)):
                file.write(_bytes(_settle(name, weight, changes.get(name), config, dtype, tally)))
                done += 1
                progress(done, total, name)
    return tally


def _settle(
    name: str, weight: torch.Tensor, change: Change | None, config: dict[str, Any], dtype: str, tally: Tally
) -> torch.Tensor:
    import torch

    if not weight.is_floating_point():
        return weight
    kind = dtype_of(dtype)
    plain = weight.to(kind)
    result = plain if change is None else merged(weight, change, config, name).to(kind)
    if not bool(torch.isfinite(result).all()):
        raise ModelError(
            f"{name} does not fit {dtype}: a number in it becomes infinite or is none", mend="--dtype bf16 or fp32"
        )
    if change is not None:
        differing = int((result != plain).sum())
        tally.tensors += 1
        tally.numbers += result.numel()
        tally.changed += differing
    return result


def _header(source: Path, dtype: str) -> dict[str, dict[str, Any]]:
    """The output file's header: the source's order, its floats in the new type."""
    header, at = {}, 0
    for name, entry in sorted(tensors(source).items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        first, last = entry["data_offsets"]
        floats = entry["dtype"] in _FLOATS
        length = math.prod(entry["shape"]) * BYTES[dtype] if floats else last - first
        kind = NAMES[dtype] if floats else entry["dtype"]
        header[name] = {"dtype": kind, "shape": entry["shape"], "data_offsets": [at, at + length]}
        at += length
    return header


def _read(source: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(source, "pt") as opened:
        for name in names:
            yield name, opened.get_tensor(name)


def _bytes(tensor: torch.Tensor) -> Any:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _home(name: str, names: set[str]) -> str | None:
    """The file's name for a model's tensor: itself, or the only one that ends in as much of it as any does."""
    if name in names:
        return name
    parts = name.split(".")
    for cut in range(len(parts) - 1):
        tail = ".".join(parts[cut:])
        if found := [key for key in names if key == tail or key.endswith("." + tail)]:
            return found[0] if len(found) == 1 else None
    return None


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    import torch

    return one is not None and other is not None and torch.equal(one, other)
