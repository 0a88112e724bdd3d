"""Writes a model's folder as a GGUF file, tensor by tensor, and reads it back: each number within its type's error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import ModelError
from sft.model.files import ModelFiles, tensors
from sft.ship import gguf_layout as layout
from sft.ship.gguf_vocabulary import Vocabulary

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from numpy.typing import NDArray

BYTES = {"f16": 2.0, "q8_0": 34 / 32, "bf16": 2.0, "f32": 4.0}  # a number
_ERRORS = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8}  # of a number, half a step
Progress = Callable[[int, int, str], None]


def write(
    files: ModelFiles, path: Path, kind: str, vocabulary: Vocabulary, template: str | None, progress: Progress
) -> int:
    """Writes `files` to `path`; returns the number of tensors. kind: f16, q8_0, bf16 or f32; vectors stay f32.

    Raises ModelError for an architecture that is not covered, and for numbers that do not fit the type.
    """
    import gguf

    arch = layout.architecture(files.config, files.name)
    placed = _places(files, arch)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(files.name).name)
    writer.add_file_type(_file_type(kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    layout.describe(writer, files.config, arch)
    vocabulary.write(writer)
    if template is not None:
        writer.add_chat_template(template)
    factors = layout.rope_factors(files.config)
    for name, (_, _, shape) in placed.items():
        _announce(writer, name, shape, _type_of(name, shape, kind))
    if factors is not None:
        _announce(writer, layout.ROPE_FACTORS, list(factors.shape), gguf.GGMLQuantizationType.F32)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for at, (name, (source, own, shape)) in enumerate(placed.items()):
            values = layout.arranged(own, read(source, own), files.config, arch)
            writer.write_tensor_data(_stored(values, _type_of(name, shape, kind), own))
            progress(at + 1, len(placed), name)
        if factors is not None:
            writer.write_tensor_data(factors)
    finally:
        writer.close()
    return len(placed)


def check(files: ModelFiles, path: Path, progress: Progress) -> float:
    """Reads the file back and compares every tensor with the model's; returns the largest error of a number.

    Raises ModelError where one is missing or off by more than its type's rounding.
    """
    import gguf

    arch = layout.architecture(files.config, files.name)
    placed, worst = _places(files, arch), 0.0
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    if missing := sorted(set(placed) - set(found)):
        raise ModelError(f"{path.name} lacks {len(missing)} tensors: {', '.join(missing[:3])}", where=str(path))
    for at, (name, (source, own, _)) in enumerate(placed.items()):
        values = layout.arranged(own, read(source, own), files.config, arch)
        off = _error(values, found[name], path)
        worst = max(worst, off)
        progress(at + 1, len(placed), name)
    return worst


def read(source: Path, name: str) -> NDArray[np.float32]:
    """One tensor of a safetensors file, float32."""
    from safetensors import safe_open

    with safe_open(source, "pt") as opened:
        values: NDArray[np.float32] = opened.get_tensor(name).float().numpy()
    return values


def _places(files: ModelFiles, arch: str) -> dict[str, tuple[Path, str, list[int]]]:
    """GGUF name -> (file, own name, shape), in the files' order; a head that is the embedding is left out."""
    headers = [(path, name, entry["shape"]) for path in files.weights for name, entry in tensors(path).items()]
    named = layout.tensor_names(arch, files.config["num_hidden_layers"], [name for _, name, _ in headers])
    tied = bool(files.config.get("tie_word_embeddings"))
    return {
        named[name]: (path, name, shape)
        for path, name, shape in headers
        if name in named and not (tied and named[name] == "output.weight")
    }


def _type_of(name: str, shape: list[int], kind: str) -> gguf.GGMLQuantizationType:
    import gguf

    if len(shape) == 1 or name.endswith("_norm.weight"):
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[kind.upper()]


def _file_type(kind: str) -> gguf.LlamaFileType:
    import gguf

    return gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]


def _announce(writer: gguf.GGUFWriter, name: str, shape: list[int], kind: gguf.GGMLQuantizationType) -> None:
    import gguf
    import numpy as np

    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        of: Any = np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16
        writer.add_tensor_info(name, shape, np.dtype(of), int(np.prod(shape)) * np.dtype(of).itemsize)
        return
    stored = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)


def _stored(values: NDArray[Any], kind: gguf.GGMLQuantizationType, name: str) -> NDArray[Any]:
    import gguf
    import numpy as np

    if kind == gguf.GGMLQuantizationType.F16 and values.size and float(np.abs(values).max()) > 65504:
        raise ModelError(f"{name} does not fit f16: a number in it becomes infinite", mend="TYPE=bf16, f32 or q8_0")
    return gguf.quants.quantize(np.ascontiguousarray(values), kind)


def _error(values: NDArray[Any], tensor: gguf.ReaderTensor, path: Path) -> float:
    """The largest error of a tensor. Raises ModelError where it is more than half a step of its type."""
    import gguf
    import numpy as np

    kind = tensor.tensor_type
    got = gguf.quants.dequantize(np.asarray(tensor.data), kind).reshape(values.shape)
    off = np.abs(got - values)
    if kind == gguf.GGMLQuantizationType.Q8_0:  # a block of 32 shares one scale: its largest / 127, kept as f16
        blocks = np.abs(values).reshape(-1, 32).max(axis=1, keepdims=True)
        allowed = np.broadcast_to(blocks * (0.5 / 127 + 2**-10) + 2**-17, (blocks.shape[0], 32)).reshape(values.shape)
    else:
        allowed = np.abs(values) * _ERRORS[kind.name] + (2**-24 if kind == gguf.GGMLQuantizationType.F16 else 0)
    if got.shape != values.shape or not bool((off <= allowed).all()):
        raise ModelError(
            f"{tensor.name} in {path.name} differs from the model's by up to {float(off.max()):.3g}, more than"
            f" {kind.name} rounds",
            where=str(path),
            mend="report this; FORMAT=hf is not touched by it",
        )
    return float(off.max(initial=0.0))
