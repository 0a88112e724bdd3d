"""The plan of one run on one device: does it fit, where the memory goes, in what micro-batches, what would mend it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.config.auto import Facts, resolve
from sft.config.schema import Config
from sft.errors import ModelError
from sft.memory import devices, estimate, phases, remedies, slack
from sft.memory.devices import Device
from sft.memory.estimate import Estimate
from sft.memory.memo import Traces
from sft.memory.phases import Phase
from sft.memory.remedies import Remedy, Together
from sft.memory.slack import Slack

METHOD = "traced"
MOST_TOKENS = 4096  # a micro-batch beyond this is no faster


@dataclass(frozen=True)
class Plan:
    """The answer. `config` is resolved for the device; batch_size is rows at max_seq_len in the largest micro-batch.

    estimate: of the training step, its peak that of the worst phase. sixteen_bit_experts: see `memo.Traces`.
    """

    device: Device
    config: Config
    estimate: Estimate
    fits: bool
    remedies: list[Remedy]
    method: str
    phases: dict[str, Phase] = field(default_factory=dict)
    together: Together | None = None
    slack: Slack | None = None
    parameters: int = 0
    sixteen_bit_experts: int = 0

    @property
    def worst(self) -> str:
        """The phase that takes most of the device."""
        return max(self.phases, key=lambda name: self.phases[name].peak)

    @property
    def card(self) -> str | None:
        """The smallest card that would do."""
        return devices.smallest_card(self.estimate.peak)

    def to_json(self) -> dict[str, Any]:
        """The keys of DESIGN's interface, and what stands beside them."""
        train = self.config.train
        return {
            "fits": self.fits,
            "peak_gib": round(self.estimate.peak, 3),
            "allocated_gib": round(self.estimate.allocated, 3),
            "parts": {name: round(size, 4) for name, size in self.estimate.parts.items()},
            "phases": {name: phase.to_json() for name, phase in self.phases.items()},
            "worst_phase": self.worst,
            "effective_batch": train.effective_batch,
            "batch_size": train.batch_size,
            "grad_accum": train.grad_accum,
            "micro_batch_tokens": train.micro_batch_tokens,
            "remedies": [vars(remedy) for remedy in self.remedies],
            "together": None if self.together is None else vars(self.together),
            "smallest_card": self.card if self.device.kind == "cuda" else None,
            "sixteen_bit_experts": self.sixteen_bit_experts,
            "residual": None if self.slack is None else self.slack.source,
            "method": self.method,
            "device": {"kind": self.device.kind, "name": self.device.name, "gib": round(self.device.gib, 2)},
        }


def make(
    config: Config,
    description: Mapping[str, Any],
    device: Device,
    *,
    root: Path | None = None,
    mend: bool = True,
) -> Plan:
    """The plan for `config` on `device` of the model that `description`, its config.json, describes: traced.

    Where the micro-batch is left to be measured, it is the most rows at max_seq_len that fit. root: the project's,
    whose records of earlier runs and kept traces are used. mend: look for remedies where it does not fit. Raises
    ConfigError where batch settings contradict each other, ModelError for a family that cannot be traced.
    """
    _refuse_unusable(config, description)
    around = _Surroundings(description, device, root, config.model.name)
    settled, traces, trained = _settle(config, around)
    found = phases.every(settled, traces, around.slack, device, trained)
    peak = max(phase.peak for phase in found.values())
    fits, fixes, together = peak <= device.gib, list[Remedy](), None
    if mend and not fits:
        gpu = device.kind == "cuda"
        fixes, together = remedies.find(
            config, settled, trained.peak, device.gib, around.training, around.peak, gpu=gpu
        )
        fixes += _smaller(config, device)
    return Plan(
        device=device,
        config=settled,
        estimate=Estimate(trained.parts, trained.allocated, peak),
        fits=fits,
        remedies=fixes,
        method=METHOD,
        phases=found,
        together=together,
        slack=around.slack,
        parameters=traces.parameters,
        sixteen_bit_experts=traces.sixteen_bit_experts if config.tuning.mode == "qlora" else 0,
    )


def _refuse_unusable(config: Config, description: Mapping[str, Any]) -> None:
    """Raises ModelError for a config.json without a family, and for weights stored in a way that training refuses."""
    if not isinstance(description.get("model_type"), str):
        raise ModelError(
            f"the config.json of {config.model.name} has no model_type, so its family is not known",
            where="config.json",
            mend="name a model as transformers saves it",
        )
    stored = description.get("quantization_config")
    method = stored.get("quant_method", "an unknown way") if isinstance(stored, Mapping) else None
    if method and not (method == "bitsandbytes" and config.tuning.mode == "qlora"):
        raise ModelError(
            f"the weights of {config.model.name} are stored quantised ({method})",
            where="model.name",
            mend="name the full-precision model: qlora makes its own 4-bit weights from it, and merging needs it",
        )


class _Surroundings:
    """What stays the same for every variant of a run: model, device, slack, and traces made so far."""

    def __init__(self, description: Mapping[str, Any], device: Device, root: Path | None, model: str) -> None:
        self.description, self.device, self.root = description, device, root
        self.slack = slack.of(device, str(description.get("model_type", "")), root, model=model)
        self.tight = False  # not even one row fits, as far as is known
        self._open: dict[str, Traces] = {}

    def traces(self, settled: Config) -> Traces:
        """Of this config; one drawn model serves all that share one."""
        new = Traces(settled, self.description, device=self.device.kind, root=self.root)
        return new.beside(self._open.setdefault(new.key, new))

    def resolve(self, config: Config, *, parameters: int | None = None, rows: int | None = None) -> Config:
        """`auto` as training will settle it; rows: at max_seq_len in a micro-batch, in the place of measuring."""
        gpu = self.device.kind == "cuda"
        facts = Facts(
            device=self.device.kind,
            capability=(8, 0) if gpu else None,
            parameters=parameters,
            measured_batch=(rows or 1) if gpu else None,
            seq2seq=bool(self.description.get("is_encoder_decoder", False)),
        )
        return resolve(config, facts).config

    def training(self, config: Config) -> float:
        """GiB of a training step of this config."""
        return _settle(config, self)[2].peak

    def peak(self, config: Config) -> float:
        """GiB of the worst phase of this config."""
        settled, traces, trained = _settle(config, self)
        found = phases.every(settled, traces, self.slack, self.device, trained)
        return max(phase.peak for phase in found.values())


def _settle(config: Config, around: _Surroundings) -> tuple[Config, Traces, Phase]:
    """The config resolved, with its micro-batch where that is open, its traces, and its training phase."""
    traces = around.traces(around.resolve(config))
    rows = trained = None
    if around.device.kind == "cuda" and _is_open(config):
        rows, trained = _most_rows(config, traces, around)
    settled = around.resolve(config, parameters=traces.parameters, rows=rows)
    return settled, traces, trained or phases.training(settled, traces, around.slack)


def _smaller(config: Config, device: Device) -> list[Remedy]:
    """The largest of Qwen2.5 that fits, by the closed form: another model is a rough proposal anyway."""
    name = estimate.largest_that_fits(device.gib, length=config.model.max_seq_len) if device.kind == "cuda" else None
    return (
        [] if name in (None, config.model.name) else [Remedy(f"model.name={name}", 0.0, "a smaller model", None, True)]
    )


def _is_open(config: Config) -> bool:
    train = config.train
    return (train.batch_size, train.grad_accum, train.micro_batch_tokens) == ("auto", "auto", "auto")


def _most_rows(config: Config, traces: Traces, around: _Surroundings) -> tuple[int, Phase]:
    """The most rows that fit, up to MOST_TOKENS, and what they need; 1 where not even one does.

    The peak of a step is the highest of several moments, each linear in the rows: so it lies below the line between
    two traced points, and what fits by that line fits.
    """

    def at(rows: int) -> Phase:
        return phases.training(around.resolve(config, rows=rows), traces, around.slack)

    effective, room = int(around.resolve(config).train.effective_batch), around.device.gib
    a_row = config.model.max_seq_len * (2 if traces.kind == "seq2seq" else 1)
    most = max(1, min(MOST_TOKENS // a_row, effective))
    around.tight = around.tight or around.slack.peak(traces.standing / estimate.GIB) > room
    if around.tight and (low := at(1)).peak > room:
        return 1, low
    high = at(most)
    if most == 1 or high.peak <= room:
        return most, high
    low = at(1)
    around.tight = low.peak > room
    if around.tight:
        return 1, low
    rows = 1 + int((most - 1) * (room - low.peak) / (high.peak - low.peak))
    return (1, low) if rows == 1 else (rows, at(rows))
