"""The plan of one run on one device: does it fit, where the memory goes, in what micro-batches, what would mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.config.auto import Facts, resolve
from sft.config.schema import Config
from sft.memory import estimate
from sft.memory.devices import Device
from sft.memory.estimate import Estimate, changed
from sft.memory.shapes import Shapes

MOST_TOKENS = 4096  # a micro-batch beyond this is no faster


@dataclass(frozen=True)
class Remedy:
    """A change of settings. saves: GiB of the peak; costs: in words; fits: whether it is enough by itself."""

    setting: str
    saves_gib: float
    costs: str
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The answer. `config` is resolved for the device; batch_size is rows at max_seq_len in the largest micro-batch."""

    device: Device
    config: Config
    estimate: Estimate
    fits: bool
    remedies: list[Remedy]

    def to_json(self) -> dict[str, Any]:
        train = self.config.train
        return {
            "fits": self.fits,
            "peak_gib": round(self.estimate.peak, 3),
            "allocated_gib": round(self.estimate.allocated, 3),
            "parts": {name: round(size, 4) for name, size in self.estimate.parts.items()},
            "effective_batch": train.effective_batch,
            "batch_size": train.batch_size,
            "grad_accum": train.grad_accum,
            "micro_batch_tokens": train.micro_batch_tokens,
            "remedies": [vars(remedy) for remedy in self.remedies],
            "method": estimate.METHOD,
            "device": {"kind": self.device.kind, "name": self.device.name, "gib": round(self.device.gib, 2)},
        }


def make(config: Config, shapes: Shapes, device: Device, *, seq2seq: bool = False) -> Plan:
    """The plan for `config` on `device`. Raises ConfigError where batch settings contradict each other."""
    settled = _settle(config, shapes, device, seq2seq)
    tokens = int(settled.train.micro_batch_tokens)
    needed = estimate.step(shapes, settled.tuning, settled.train, tokens=tokens, device=device.kind)
    fits = needed.peak <= device.gib
    return Plan(device, settled, needed, fits, [] if fits else _remedies(settled, shapes, device, needed))


def _settle(config: Config, shapes: Shapes, device: Device, seq2seq: bool) -> Config:
    """`auto` as training will settle it, with the closed form in the place of the measurement."""
    measured = None
    if device.kind == "cuda":
        length = config.model.max_seq_len
        most = max(1, MOST_TOKENS // length)
        rows = estimate.most_rows(
            shapes, config.tuning, config.train, length=length, gib=device.gib, device=device.kind, most=most
        )
        measured = max(1, rows)
    facts = Facts(
        device=device.kind,
        capability=(8, 0) if device.kind == "cuda" else None,
        parameters=shapes.total,
        measured_batch=measured,
        seq2seq=seq2seq,
    )
    return resolve(config, facts).config


def _remedies(config: Config, shapes: Shapes, device: Device, needed: Estimate) -> list[Remedy]:
    """Each change by itself, least costly first; those that save nothing are left out."""
    train, tuning, length = config.train, config.tuning, config.model.max_seq_len
    tokens, half = int(train.micro_batch_tokens), max(8, length // 2)
    less = changed(tuning, lora=changed(tuning.lora, r=max(1, tuning.lora.r // 2)))
    tries: list[tuple[str, str, Any, Any, int]] = [
        ("train.logits=chunked", "nothing", tuning, changed(train, logits="chunked"), tokens),
        ("train.batch_size=1", "speed on short rows", tuning, train, min(tokens, length)),
        (
            "train.gradient_checkpointing=true",
            "about 1.45 times the time",
            tuning,
            changed(train, gradient_checkpointing=True),
            tokens,
        ),
        ("tuning.mode=qlora", "a base in 4 bit", changed(tuning, mode="qlora"), train, tokens),
        (f"tuning.lora.r={less.lora.r}", "some capacity", less, train, tokens),
        (f"model.max_seq_len={half}", "longer rows are cut", tuning, train, min(tokens, half)),
    ]
    found = []
    for setting, costs, new_tuning, new_train, new_tokens in tries:
        if new_tuning.mode != tuning.mode and (tuning.mode == "full" or device.kind == "cpu"):
            continue  # its adapters are not in the shapes, or nothing is gained
        peak = estimate.step(shapes, new_tuning, new_train, tokens=new_tokens, device=device.kind).peak
        if needed.peak - peak > 0.01:
            found.append(Remedy(setting, round(needed.peak - peak, 3), costs, peak <= device.gib))
    smaller = estimate.largest_that_fits(device.gib, length=length)
    if smaller is not None and smaller != config.model.name:
        found.append(Remedy(f"model.name={smaller}", 0.0, "a smaller model", True))
    return found
