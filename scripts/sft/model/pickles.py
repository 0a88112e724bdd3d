"""Pickled weights made into safetensors, once, because somebody said so: nothing else of the kit opens a pickle."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sft import files
from sft.errors import ModelError
from sft.model.files import INDEX, has_weights

log = logging.getLogger("sft.model")


def convert(folder: Path, name: str) -> list[Path]:
    """Writes model*.safetensors beside pytorch_model*.bin and returns what it wrote; nothing where they are there.

    Read with weights_only=True, which builds tensors and runs no other code of the file. Raises ModelError where there
    is nothing to convert or a file holds more than tensors.
    """
    if has_weights(folder):
        return []
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not pickles:
        raise ModelError(f"{name} has no weights at all", where=str(folder), mend="name a folder with model weights")
    log.warning("--allow-pickle: reading %s, tensors alone", ", ".join(path.name for path in pickles))
    made: list[Path] = []
    where: dict[str, str] = {}
    for path in pickles:
        target = folder / path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        tensors = _tensors(path)
        where |= dict.fromkeys(tensors, target.name)
        with files.atomic_file(target) as staged:
            _save(tensors, staged)
        made.append(target)
    if len(made) > 1:
        size = sum(path.stat().st_size for path in made)
        files.write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    return made


def _tensors(path: Path) -> dict[str, Any]:
    import pickle

    import torch

    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(
            f"{path.name} holds more than tensors, or is cut short: {' '.join(str(error).split())[:160]}",
            where=str(path),
            mend="take a repository with model.safetensors",
        ) from None
    if not isinstance(read, dict) or not all(isinstance(value, torch.Tensor) for value in read.values()):
        raise ModelError(f"{path.name} is no table of tensors", where=str(path), mend="take another copy of the model")
    return {name: tensor.contiguous().clone() for name, tensor in read.items()}


def _save(tensors: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
