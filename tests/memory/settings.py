"""Resolved configs for traces."""

from __future__ import annotations

from typing import Any

from sft.config.auto import Facts, resolve
from sft.config.schema import Config
from sft.memory.estimate import changed


def resolved(mode: str, device: str, *, dropout: float = 0.05, length: int = 512, **train: Any) -> Config:
    """The defaults with this mode, as training on `device` would settle them."""
    config = Config()
    lora = changed(config.tuning.lora, dropout=dropout)
    tuning, section = changed(config.tuning, mode=mode, lora=lora), changed(config.train, **train)
    config = changed(config, tuning=tuning, train=section, model=changed(config.model, max_seq_len=length))
    capability = (8, 0) if device == "cuda" else None
    return resolve(config, Facts(device=device, capability=capability, measured_batch=1)).config  # type: ignore[arg-type]
