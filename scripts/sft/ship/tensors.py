"""Weights from file to file, a tensor at a time, an adapter merged into them on the way: memory is that of one tensor.

Sums are taken in float32 and rounded once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import ModelError
from sft.model.files import tensors
from sft.ship.changes import EMBED, HEAD, Change, blocks

if TYPE_CHECKING:
    import torch

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SAME = 1e-6  # of a number: less is float32's rounding, not a change
Progress = Callable[[int, int, str], None]


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


def write(sources: list[Path], out: Path, changes: dict[str, Change], dtype: str, progress: Progress) -> Tally:
    """Writes each source file's tensors into `out` under the same file name, merged and in `dtype`; returns the tally.

    Raises ModelError where a number does not fit the type. OSError (a full disk) passes through.
    """
    from safetensors import safe_open

    tally, done, total = Tally(), 0, sum(len(tensors(path)) for path in sources)
    for source in sources:
        header, origin = _header(source, changes, dtype)
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with open(out / source.name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in header:
                with safe_open(source, "pt") as opened:  # opened anew, so that pages read before leave the memory
                    weight = opened.get_tensor(origin[name])
                    _settle(name, weight, changes.get(name), dtype, tally, file.write)
                    del weight
                done += 1
                progress(done, total, name)
    return tally


def _settle(
    name: str, weight: torch.Tensor, change: Change | None, dtype: str, tally: Tally, put: Callable[[Any], Any]
) -> None:
    """Merges one tensor and puts its bytes out, piece by piece where it is stored the way the sums are taken."""
    import torch

    if not weight.is_floating_point():
        put(_bytes(weight))
        return
    kind = dtype_of(dtype)
    shape = (change or Change()).shape(list(weight.shape))
    turned: torch.Tensor | None = None

    def take(part: Any, value: torch.Tensor) -> None:
        nonlocal turned
        new = value.to(kind)
        if not bool(torch.isfinite(new).all()):
            raise ModelError(
                f"{name} does not fit {dtype}: a number in it becomes infinite or is none", mend="--dtype bf16 or fp32"
            )
        if change is not None and shape == list(weight.shape):
            old = weight[part]
            moved = (value - old.float()).abs_() > _SAME * old.float().abs()
            tally.changed += int((moved & (new != old.to(kind))).sum())
        if isinstance(part, tuple):
            turned = torch.empty(shape, dtype=kind) if turned is None else turned
            turned[part] = new
        else:
            put(_bytes(new))

    blocks(weight, change or Change(), name, take)
    if turned is not None:
        put(_bytes(turned))
    if change is not None:
        numbers = math.prod(shape)
        tally.tensors += 1
        tally.numbers += numbers
        tally.changed += 0 if shape == list(weight.shape) else numbers


def _header(source: Path, changes: dict[str, Change], dtype: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The output file's header (the source's order, its floats in the new type), and each tensor's name in the source.

    A head that parts from the embedding stands behind all others, in the file of the embedding.
    """
    listed = sorted(tensors(source).items(), key=lambda item: (item[1]["data_offsets"], item[0]))
    names = [(name, name, entry) for name, entry in listed]
    if HEAD in changes and HEAD not in dict(listed):
        names += [(HEAD, name, entry) for name, entry in listed if name.endswith(EMBED)]
    header, origin, at = {}, {}, 0
    for name, old, entry in names:
        first, last = entry["data_offsets"]
        floats = entry["dtype"] in _FLOATS
        shape = changes.get(name, Change()).shape(entry["shape"])
        length = math.prod(shape) * BYTES[dtype] if floats else last - first
        kind = NAMES[dtype] if floats else entry["dtype"]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + length]}
        origin[name], at = old, at + length
    return header, origin


def _bytes(tensor: torch.Tensor) -> Any:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
