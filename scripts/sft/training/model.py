"""The model as it is trained: base in the right precision, adapters on it, attention that keeps rows apart."""

from __future__ import annotations

from typing import Any

import torch
from transformers import set_seed

from sft.config.schema import Config
from sft.model import adapters, backends, load
from sft.model.files import ModelFiles
from sft.step import attention
from sft.step.step import compute_dtype


def weight_dtype(config: Config) -> torch.dtype:
    """The base's type: 16-bit where it is frozen, fp32 where it is trained.

    A full fine-tune keeps fp32 weights and computes under autocast: at a rate of 1e-5 an update is smaller than what
    bf16 can add to a weight, and rounding would lose it (docs/decisions/0007-the-loop-and-its-precision.md).
    """
    return torch.float32 if config.tuning.mode == "full" else compute_dtype(config.train)


def build(config: Config, files: ModelFiles, backend: str, *, device: str) -> Any:
    """Loads the base and attaches what is trained, all of it seeded. Raises ModelError, EnvironmentProblem."""
    set_seed(config.train.seed)
    checkpointing = bool(config.train.gradient_checkpointing)
    dtype = weight_dtype(config)
    if backend == "unsloth":
        return backends.load_unsloth(files, config.model, config.tuning, dtype, gradient_checkpointing=checkpointing)
    wanted = attention.implementation(device, files.config) or attention.fallback(files.config)
    model = load.load_base(files, config.model, config.tuning, dtype, device=device, train=True, attention=wanted)
    if config.tuning.mode == "full":
        adapters.set_checkpointing(model, checkpointing)
        return model
    return adapters.attach(model, config.tuning, gradient_checkpointing=checkpointing)
