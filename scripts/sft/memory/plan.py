"""The plan of one run on one device: does it fit, where the memory goes, in what micro-batches, what would mend it.

The step's peak is traced. What a remedy saves is the closed form's difference: another trace each would take too long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft.config.auto import Facts, resolve
from sft.config.schema import Config
from sft.memory import estimate, shapes
from sft.memory.devices import Device
from sft.memory.estimate import GIB, Estimate, changed
from sft.memory.shapes import Shapes
from sft.memory.trace import Tracer

METHOD = "traced"
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
    method: str

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
            "method": self.method,
            "device": {"kind": self.device.kind, "name": self.device.name, "gib": round(self.device.gib, 2)},
        }


def make(config: Config, description: Mapping[str, Any], device: Device) -> Plan:
    """The plan for `config` on `device` of the model that `description`, its config.json, describes: traced.

    Where the micro-batch is left to be measured, it is the most rows at max_seq_len that fit. Raises ConfigError where
    batch settings contradict each other, ModelError for a family that transformers has not.
    """
    seq2seq = bool(description.get("is_encoder_decoder", False))
    tracer = Tracer(_resolve(config, device, seq2seq=seq2seq), description, device=device.kind)
    measured: int | None = None
    needed: Estimate | None = None
    if device.kind == "cuda" and _is_open(config):
        measured, needed = _most_rows(config, tracer, device)
    settled = _resolve(config, device, seq2seq=seq2seq, parameters=tracer.parameters, rows=measured)
    needed = needed or _traced(tracer, settled)
    fits = needed.peak <= device.gib
    remedies = [] if fits else _remedies(settled, shapes.count(description, config.tuning), device, needed)
    return Plan(device, settled, needed, fits, remedies, METHOD)


def make_rough(config: Config, counted: Shapes, device: Device) -> Plan:
    """The same by the closed form, in no time: for lists of models."""
    rows = None
    if device.kind == "cuda":
        length = config.model.max_seq_len
        most = max(1, MOST_TOKENS // length)
        sections = (counted, config.tuning, config.train)
        rows = max(1, estimate.most_rows(*sections, length=length, gib=device.gib, device=device.kind, most=most))
    settled = _resolve(config, device, parameters=counted.total, rows=rows)
    tokens = int(settled.train.micro_batch_tokens)
    needed = estimate.step(counted, settled.tuning, settled.train, tokens=tokens, device=device.kind)
    return Plan(device, settled, needed, needed.peak <= device.gib, [], estimate.METHOD)


def _resolve(
    config: Config, device: Device, *, seq2seq: bool = False, parameters: int | None = None, rows: int | None = None
) -> Config:
    """`auto` as training will settle it; rows: at max_seq_len in a micro-batch, in the place of the measurement."""
    facts = Facts(
        device=device.kind,
        capability=(8, 0) if device.kind == "cuda" else None,
        parameters=parameters,
        measured_batch=(rows or 1) if device.kind == "cuda" else None,
        seq2seq=seq2seq,
    )
    return resolve(config, facts).config


def _is_open(config: Config) -> bool:
    train = config.train
    return (train.batch_size, train.grad_accum, train.micro_batch_tokens) == ("auto", "auto", "auto")


def _most_rows(config: Config, tracer: Tracer, device: Device) -> tuple[int, Estimate]:
    """The most rows that fit, up to MOST_TOKENS, and what they need; 1 where not even one does.

    The peak of a step is the highest of several moments, each linear in the rows: so it lies below the line between
    two traced points, and what fits by that line fits.
    """

    def at(rows: int) -> Estimate:
        return _traced(tracer, _resolve(config, device, seq2seq=tracer.kind == "seq2seq", rows=rows))

    effective = int(_resolve(config, device).train.effective_batch)
    a_row = config.model.max_seq_len * (2 if tracer.kind == "seq2seq" else 1)
    most = max(1, min(MOST_TOKENS // a_row, effective))
    high = at(most)
    if most == 1 or high.peak <= device.gib:
        return most, high
    low = at(1)
    if low.peak > device.gib:
        return 1, low
    rows = 1 + int((most - 1) * (device.gib - low.peak) / (high.peak - low.peak))
    return (1, low) if rows == 1 else (rows, at(rows))


def _traced(tracer: Tracer, settled: Config) -> Estimate:
    """A step at the largest micro-batch that the resolved config allows: rows at max_seq_len, the last one shorter."""
    train, length = settled.train, settled.model.max_seq_len
    a_row, tokens = length * (2 if tracer.kind == "seq2seq" else 1), int(train.micro_batch_tokens)
    rows = max(1, min(tokens // a_row, int(train.effective_batch)))
    lengths = [length] * rows
    left = tokens - rows * length
    if tracer.apart and rows < int(train.effective_batch) and left > 1:
        lengths.append(min(left, length))
    found = tracer.step(lengths, waiting=len(lengths) < int(train.effective_batch))
    parts = {name: size / GIB for name, size in found.parts.items()}
    return Estimate(parts, found.peak / GIB, estimate.with_slack(found.peak / GIB, tracer.device))


def _remedies(config: Config, counted: Shapes, device: Device, needed: Estimate) -> list[Remedy]:
    """Each change by itself, least costly first; those that save nothing are left out."""
    train, tuning, length = config.train, config.tuning, config.model.max_seq_len
    tokens, half = int(train.micro_batch_tokens), max(8, length // 2)
    less = changed(tuning, lora=changed(tuning.lora, r=max(1, tuning.lora.r // 2)))
    slow = changed(train, gradient_checkpointing=True)
    tries: list[tuple[str, str, Any, Any, int]] = [
        ("train.logits=chunked", "nothing", tuning, changed(train, logits="chunked"), tokens),
        ("train.logits_tile=128", "a little speed", tuning, changed(train, logits_tile=128), tokens),
        ("train.batch_size=1", "speed on short rows", tuning, train, min(tokens, length)),
        ("train.gradient_checkpointing=true", "about 1.45 times the time", tuning, slow, tokens),
        ("tuning.mode=qlora", "a base in 4 bit", changed(tuning, mode="qlora"), train, tokens),
        (f"tuning.lora.r={less.lora.r}", "some capacity", less, train, tokens),
        (f"model.max_seq_len={half}", "longer rows are cut", tuning, train, min(tokens, half)),
    ]
    rough, found = estimate.step(counted, tuning, train, tokens=tokens, device=device.kind).peak, list[Remedy]()
    for setting, costs, new_tuning, new_train, new_tokens in tries:
        if new_tuning.mode != tuning.mode and (tuning.mode == "full" or device.kind == "cpu"):
            continue  # its adapters are not in the shapes, or nothing is gained
        saves = rough - estimate.step(counted, new_tuning, new_train, tokens=new_tokens, device=device.kind).peak
        if saves > 0.01:
            found.append(Remedy(setting, round(saves, 3), costs, needed.peak - saves <= device.gib))
    smaller = estimate.largest_that_fits(device.gib, length=length)
    if smaller is not None and smaller != config.model.name:
        found.append(Remedy(f"model.name={smaller}", 0.0, "a smaller model", True))
    return found
