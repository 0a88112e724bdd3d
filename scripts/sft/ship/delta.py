"""What an adapter does to each tensor of its base: low-rank sums, DoRA's lengths, trained biases, modules saved whole.

LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023: alpha / sqrt(r)), DoRA (Liu et al. 2024: rows scaled to a learnt
length), ranks and alphas by layer as peft reads them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import ModelError
from sft.model.files import tensors

if TYPE_CHECKING:
    import torch


BLOCK = 1 << 24  # numbers worked on at a time: 64 MiB in float32
EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"
_MOVED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that change the base as well


@dataclass
class Change:
    """What one adapted tensor becomes: low-rank factors (with DoRA's row lengths), or a whole replacement.

    a [r, in], b [out, r], magnitude [out]; scale: of b @ a. flip: the tensor is stored as [in, out], None: by shape.
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    whole: torch.Tensor | None = None
    scale: float = 1.0
    flip: bool | None = None

    def shape(self, stored: list[int]) -> list[int]:
        """The merged tensor's shape: the stored one's, or the replacement's (a vocabulary that has grown)."""
        return stored if self.whole is None else list(self.whole.shape)


def read_changes(folder: Path, config: dict[str, Any]) -> dict[str, Change]:
    """The adapter's tensors by the name of the base tensor that they change. Raises ModelError for what is unknown."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    kind = str(config.get("peft_type", "LORA"))
    if kind != "LORA":
        raise ModelError(f"the adapter is of the kind {kind}; merging covers LoRA and its kin", where=str(folder))
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_MOVED_BASES):
        raise ModelError(
            f"the adapter began with {start}, which changes the base too, so it does not fit the base's own weights",
            where=str(folder),
            fix="convert it to a plain LoRA with peft first (path_initial_model_for_weight_conversion)",
        )
    changes: dict[str, Change] = {}
    try:
        held = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the adapter's weights cannot be read, or are cut short: {error}",
            where=str(folder / "adapter_model.safetensors"),
            fix="take another checkpoint: --adapters outputs/RUN/checkpoint-N",
        ) from None
    for key, tensor in held.items():
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        layer, _, part = name.rpartition(".lora_")
        if not layer:
            changes.setdefault(name, Change()).whole = tensor
            continue
        change = changes.setdefault(layer + ".weight", Change())
        if part in ("A.weight", "embedding_A"):
            change.a, change.scale = tensor, scale_of(layer, tensor.shape[0], config)
        elif part in ("B.weight", "embedding_B"):
            change.b = tensor
        elif part.startswith("magnitude_vector"):
            change.magnitude = tensor
        else:
            raise ModelError(f"the adapter holds {key}, which merging does not know", where=str(folder))
        if part.startswith("embedding") or config.get("fan_in_fan_out"):
            change.flip = True
    return changes


def scale_of(layer: str, rank: int, config: dict[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA; alpha by layer where `alpha_pattern` names it (first hit, as peft; 8
    where none is told)."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    hit = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), None)
    alpha = patterns[hit] if hit is not None else config.get("lora_alpha", 8)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def place(changes: dict[str, Change], names: set[str], *, tied: bool, follows: bool) -> dict[str, Change]:
    """The changes under the names that the base's files use (some files leave out or add leading parts).

    names: every tensor in the base's files. tied: the head is the embedding, and in no file. follows: while training
    it stayed so; else a change of one of the two parts them, and the head gets a tensor of its own (lm_head.weight).
    Raises ModelError where a tensor has no place.
    """
    placed: dict[str, Change] = {}
    for name, change in changes.items():
        found = home(name, names)
        if found is None and tied and name.endswith(HEAD):
            embedding = next((other for key, other in changes.items() if key.endswith(EMBED)), None)
            if embedding and _same(embedding.whole, change.whole):
                continue  # the same tensor under its second name
            shared = follows and change.whole is not None and embedding is None
            found = home(EMBED, names) if shared else HEAD
        if found is None or found in placed:
            raise ModelError(
                f"the adapter changes {name}, which the base's files do not hold under any name",
                fix="merge onto the base that it was trained on",
            )
        placed[found] = change
    embed = home(EMBED, names)
    if tied and not follows and embed in placed and HEAD not in names and not _head_given(changes):
        placed[HEAD] = Change()  # the head stays as the base's embedding was
    return placed


def _head_given(changes: dict[str, Change]) -> bool:
    return any(name.endswith(HEAD) for name in changes)


def home(name: str, names: set[str]) -> str | None:
    """The file's name for a model's tensor: itself, or the only one that ends in as much of it as any does."""
    if name in names:
        return name
    parts = name.split(".")
    for cut in range(len(parts) - 1):
        tail = ".".join(parts[cut:])
        if found := [key for key in names if key == tail or key.endswith("." + tail)]:
            return found[0] if len(found) == 1 else None
    return None


def blocks(weight: torch.Tensor, change: Change, name: str, take: Callable[[Any, torch.Tensor], None]) -> None:
    """Gives `take` the merged tensor in float32, piece by piece: (index into the stored tensor, its values)."""
    import torch

    if weight.ndim == 0 or (change.a is None and change.b is None):
        whole = weight if change.whole is None else change.whole
        for part in _parts(whole):
            take(part, whole[part].float())
        return
    if change.a is None or change.b is None:
        raise ModelError(f"the adapter has only one of the two factors for {name}", fix="take another checkpoint")
    flip = _turned(weight, change, name)
    a, b = change.a.float(), change.b.float()
    base = weight.T if flip else weight
    for part in _parts(base):
        result = torch.addmm(base[part].float(), b[part], a, alpha=change.scale)
        if change.magnitude is not None:
            result *= (change.magnitude[part].float() / torch.linalg.norm(result, dim=1)).unsqueeze(1)
        take((slice(None), part) if flip else part, result.T if flip else result)


def _parts(tensor: torch.Tensor) -> list[Any]:
    """Slices of the first dimension that hold at most BLOCK numbers each."""
    if tensor.ndim == 0 or tensor.numel() <= BLOCK:
        return [...]
    rows = max(1, BLOCK // (tensor.numel() // tensor.shape[0]))
    return [slice(at, at + rows) for at in range(0, tensor.shape[0], rows)]


def _turned(weight: torch.Tensor, change: Change, name: str) -> bool:
    assert change.a is not None and change.b is not None
    wide, tall = change.a.shape[1], change.b.shape[0]
    straight, turned = tuple(weight.shape) == (tall, wide), tuple(weight.shape) == (wide, tall)
    if not straight and not turned:
        raise ModelError(
            f"{name} is {list(weight.shape)} in the base, the adapter's is {[tall, wide]}",
            fix="merge onto the base that it was trained on; a 4-bit base holds its weights packed and cannot be used",
        )
    return turned and (not straight or bool(change.flip))


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    import torch

    return one is not None and other is not None and torch.equal(one, other)


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
                f"{name} does not fit {dtype}: a number in it becomes infinite or is none", fix="--dtype bf16 or fp32"
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
