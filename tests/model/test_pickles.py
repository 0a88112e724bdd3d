"""Pickled weights: refused, converted to safetensors on request, and never run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from download_model import convert_pickles
from sft.config.schema import ModelSection
from sft.errors import ModelError
from sft.model import hub


def pickled(tiny: Path, folder: Path, parts: int) -> dict[str, torch.Tensor]:
    """The tiny model with its weights pickled into so many files."""
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for part in range(parts):
        name = "pytorch_model.bin" if parts == 1 else f"pytorch_model-0000{part + 1}-of-0000{parts}.bin"
        torch.save({key: weights[key] for key in sorted(weights)[part::parts]}, folder / name)
    return weights


@pytest.mark.parametrize("parts", [1, 2])
def test_pickled_weights_are_refused_until_they_are_converted(tiny_qwen2: Path, tmp_path: Path, parts: int) -> None:
    weights = pickled(tiny_qwen2, tmp_path / "m", parts)
    section = ModelSection(name=str(tmp_path / "m"))
    with pytest.raises(ModelError, match="which can run code") as caught:
        hub.find(section, tmp_path)
    assert "--allow-pickle" in str(caught.value.fix)
    written = convert_pickles(tmp_path / "m", "m")
    assert len(written) == parts and convert_pickles(tmp_path / "m", "m") == []
    read = {key: tensor for path in hub.find(section, tmp_path).weights for key, tensor in load_file(path).items()}
    assert all(torch.equal(read[key], one) for key, one in weights.items()) and read.keys() == weights.keys()


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def test_code_in_a_pickle_is_never_run(tiny_qwen2: Path, tmp_path: Path) -> None:
    pickled(tiny_qwen2, tmp_path / "m", 1)
    torch.save({"a": Bomb(tmp_path / "ran")}, tmp_path / "m/pytorch_model.bin")
    with pytest.raises(ModelError, match="is no state dict of tensors"):
        convert_pickles(tmp_path / "m", "m")
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "m").glob("*.safetensors"))
    torch.load(tmp_path / "m/pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # the bomb was live
