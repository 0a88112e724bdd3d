"""The weights that training changes, to and from safetensors: an adapter's, or the whole model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sft import files
from sft.errors import RunError
from sft.model import adapters


def is_adapter(model: torch.nn.Module) -> bool:
    """True for a model whose adapter alone is trained."""
    return hasattr(model, "peft_config")


def save(model: Any, folder: Path) -> None:
    """Writes the trained weights into `folder`: the adapter with its config, or the model as transformers keeps it."""
    files.put(folder, (lambda to: adapters.save(model, to)) if is_adapter(model) else model.save_pretrained)


def load(model: Any, folder: Path) -> None:
    """Puts the weights that `save` wrote into the model in place, bit for bit. Raises RunError if they do not fit."""
    if is_adapter(model):
        from peft import set_peft_model_state_dict

        result = set_peft_model_state_dict(model, load_file(folder / adapters.WEIGHTS))
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        missing = [name for name in result.missing_keys if name in trained]
    else:
        parts = sorted(folder.glob("model*.safetensors"))
        state = {name: tensor for part in parts for name, tensor in load_file(part).items()}
        result = model.load_state_dict(state, strict=False)
        kept = {id(parameter) for name, parameter in model.named_parameters() if name in state}
        tied = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in kept}
        missing = [name for name in result.missing_keys if name not in tied]
    if missing or result.unexpected_keys:
        wrong = [*missing, *result.unexpected_keys]
        raise RunError(
            f"the weights in {folder.name} do not fit this model: {len(wrong)} names differ, such as {wrong[0]}",
            where=str(folder),
            mend="--resume never starts a new run",
        )
