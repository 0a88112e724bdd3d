"""Whether a run fits a device: the peak of each phase, what would help where it does not, and train's memory check.

`make_plan` resolves the config for the device, traces every phase and, where one does not fit, traces each suggestion.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sft.config.auto import Facts, resolve
from sft.config.schema import Config
from sft.errors import ConfigError, EnvironmentProblem, ModelError, SftError
from sft.memory import shapes
from sft.memory.devices import Device, smallest_card
from sft.memory.estimate import CONTEXT, GIB, OVERHEAD_SOURCE, QUICK_START_MODELS, upper_bound, with_overhead
from sft.memory.scaling import Speed, bound, ring_all_reduce
from sft.memory.trace import Sharding, Tracer, traced_optimizer
from sft.memory.tracker import Interval
from sft.model.files import ModelFiles
from sft.model.hardware import Hardware
from sft.model.shard import require_shardable
from sft.model.tokenizer import NEW_TOKENS
from sft.step.optimizer import TORCH

MOST_TOKENS = 4096  # of a micro-batch; a larger one is not faster
WORTHWHILE = 0.01  # GiB: a suggestion that saves less is left out
UNTRACED = 0.5  # a run whose upper bound is below this share of the free memory is not traced
_TRACED_KEYS = {  # of `train`: what a trace depends on besides its row lengths
    "objective", "gradient_checkpointing", "logits", "logits_tile", "max_grad_norm", "label_smoothing", "z_loss",
    "bf16", "fp16", "weight_decay", "activation_offload", "kernels", "ewc",
}  # fmt: skip
log = logging.getLogger("sft.memory")


@dataclass(frozen=True)
class Phase:
    """Sizes in GiB. allocated: tensors on the device at the highest moment, `parts` their kinds; peak: with overhead.

    note: what the phase was traced with.
    """

    allocated: float
    peak: float
    parts: dict[str, float]
    note: str

    def to_json(self) -> dict[str, Any]:
        return {
            "allocated_gib": round(self.allocated, 3),
            "peak_gib": round(self.peak, 3),
            "parts": {name: round(size, 4) for name, size in self.parts.items()},
            "note": self.note,
        }


@dataclass(frozen=True)
class Suggestion:
    """A change of settings that saves memory.

    setting: for `--set`. saves_gib: of a training step's peak. costs: in words. fits: whether a training step fits with
    this change alone.
    """

    setting: str
    saves_gib: float
    costs: str
    fits: bool


@dataclass(frozen=True)
class Combination:
    """The first suggestions that suffice together, in order; all of them where even these do not."""

    settings: list[str]
    peak_gib: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The answer. config: resolved for the device; its batch_size is rows at max_seq_len in the largest micro-batch."""

    device: Device
    config: Config
    phases: dict[str, Phase]
    parameters: int
    sharding: Sharding = "ddp"
    speed: Speed | None = None
    suggestions: list[Suggestion] = field(default_factory=list)
    combination: Combination | None = None

    @property
    def training(self) -> Phase:
        return self.phases["training"]

    @property
    def worst_phase(self) -> str:
        """The phase that takes most of the device."""
        return max(self.phases, key=lambda name: self.phases[name].peak)

    @property
    def peak(self) -> float:
        """GiB of the worst phase."""
        return self.phases[self.worst_phase].peak

    @property
    def fits(self) -> bool:
        return self.peak <= self.device.gib

    @property
    def smallest_card(self) -> str | None:
        """The smallest known GPU that would do, where the plan is for one."""
        return smallest_card(self.peak) if self.device.kind == "cuda" else None

    def to_json(self) -> dict[str, Any]:
        train = self.config.train
        several = {} if self.speed is None else {"sharding": self.sharding, "speed": self.speed.to_json()}
        return {
            "fits": self.fits,
            "peak_gib": round(self.peak, 3),
            "allocated_gib": round(self.training.allocated, 3),
            "parts": {name: round(size, 4) for name, size in self.training.parts.items()},
            "phases": {name: phase.to_json() for name, phase in self.phases.items()},
            "worst_phase": self.worst_phase,
            "effective_batch": train.effective_batch,
            "batch_size": train.batch_size,
            "grad_accum": train.grad_accum,
            "micro_batch_tokens": train.micro_batch_tokens,
            "remedies": [vars(suggestion) for suggestion in self.suggestions],
            "together": None if self.combination is None else vars(self.combination),
            "smallest_card": self.smallest_card,
            "residual": OVERHEAD_SOURCE[self.device.kind],
            "method": "traced",
            "device": {"kind": self.device.kind, "name": self.device.name, "gib": round(self.device.gib, 2)}
            | ({"count": self.device.count} if several else {}),
            **several,
        }


def make_plan(
    config: Config,
    description: Mapping[str, Any],
    device: Device,
    *,
    suggest: bool = True,
    sharding: Sharding = "ddp",
    link: float | None = None,
) -> Plan:
    """The plan for `config` on `device` of the model that `description`, its config.json, describes.

    A micro-batch that the config leaves open is the most rows at max_seq_len that fit. suggest: look for changes that
    help where it does not fit. sharding: what several devices share; every one of them needs the same memory. link:
    GB/s between them, in each direction; None for what is published. Raises ConfigError if settings contradict each
    other, ModelError for a model that cannot be traced or is stored quantised.
    """
    _refuse_unusable(config, description)
    if device.count == 1 and sharding != "ddp":
        raise ConfigError(f"one device shards nothing ({sharding})", where="--shard", fix="--gpu 2x24GiB --shard fsdp")
    if config.model.add_tokens and NEW_TOKENS not in description:  # the model's files are not there yet
        rows, new = int(description["vocab_size"]), len(config.model.add_tokens)
        description = {**description, "vocab_size": rows + new, NEW_TOKENS: list(range(rows, rows + new))}
    planner = _Planner(description, device, sharding)
    run = planner.run(config)
    speed = None if device.count == 1 else planner.speed(run, link)
    plan = Plan(device, run.config, planner.phases(run), run.tracer.parameters, sharding, speed)
    if plan.fits or not suggest:
        return plan
    suggestions, combination = _suggestions(config, run, planner)
    suggestions += _smaller_model(config, run, device, sharding)
    return replace(plan, suggestions=suggestions, combination=combination)


def _refuse_unusable(config: Config, description: Mapping[str, Any]) -> None:
    if not isinstance(description.get("model_type"), str):
        raise ModelError(
            f"the config.json of {config.model.name} has no model_type, so its family is unknown",
            where="config.json",
            fix="name a model as transformers saves it",
        )
    stored = description.get("quantization_config")
    method = stored.get("quant_method", "unknown method") if isinstance(stored, Mapping) else None
    if method and not (method == "bitsandbytes" and config.tuning.mode == "qlora"):
        raise ModelError(
            f"the weights of {config.model.name} are stored quantised ({method})",
            where="model.name",
            fix="name the full-precision model: qlora makes its own 4-bit weights from it, and merging needs it",
        )


@dataclass(frozen=True)
class _Run:
    """A config resolved for the device, with its tracer and its training phase."""

    config: Config
    tracer: Tracer
    training: Phase


class _Planner:
    """Plans variants of a run on one model and one device; variants that share a traced model share its traces."""

    def __init__(self, description: Mapping[str, Any], device: Device, sharding: Sharding = "ddp") -> None:
        self.description, self.device, self.sharding = description, device, sharding
        self._tracers: dict[str, Tracer] = {}

    def run(self, config: Config) -> _Run:
        """The config resolved, with the most rows that fit where its micro-batch is open."""
        resolved = self._resolve(config)
        tracer, train = self._tracer(resolved), config.train
        if self.device.kind == "cuda" and {train.batch_size, train.grad_accum, train.micro_batch_tokens} == {"auto"}:
            rows = self._most_rows(config, resolved, tracer)
            resolved = self._resolve(config, parameters=tracer.parameters, rows=rows)
        else:
            resolved = self._resolve(config, parameters=tracer.parameters)
        return _Run(resolved, tracer, self._training(resolved, tracer))

    def _most_rows(self, config: Config, resolved: Config, tracer: Tracer) -> int:
        """The most rows at max_seq_len whose training step fits, within MOST_TOKENS; 1 if not even one does.

        The peak is the highest of several moments that each grow linearly with the rows, so it lies below the line
        between two traced points: what fits by that line fits.
        """
        row_tokens = config.model.max_seq_len * _sides(tracer)
        most = max(1, min(MOST_TOKENS // row_tokens, self._own_rows(resolved)))
        low, high = (self._training(self._resolve(config, rows=rows), tracer).peak for rows in (1, most))
        limit = self.device.gib
        if low > limit or high <= limit:
            return 1 if low > limit else most
        return 1 + int((most - 1) * (limit - low) / (high - low))

    def phases(self, run: _Run) -> dict[str, Phase]:
        """All phases of a run, training first."""
        config, tracer = run.config, run.tracer
        phases = {"training": run.training}
        if config.train.eval_strategy != "no":
            lengths = _row_lengths(config, tracer, self._own_rows(config))
            note = f"{sum(lengths)} tokens at a time"
            phases["evaluation"] = self._traced(tracer.evaluation(lengths), config, tracer, note)
            if config.eval.train_sample:
                phases["generation"] = self._generation(config, tracer)
        return phases

    def _resolve(self, config: Config, *, parameters: int | None = None, rows: int | None = None) -> Config:
        """`auto` as training will resolve it. rows: at max_seq_len in a micro-batch, instead of measuring."""
        gpu = self.device.kind == "cuda"
        facts = Facts(
            device=self.device.kind,
            capability=(8, 0) if gpu else None,
            parameters=parameters,
            measured_batch=(rows or 1) if gpu else None,
            seq2seq=bool(self.description.get("is_encoder_decoder", False)),
            sharded=self.sharding != "ddp",
        )
        resolved = resolve(config, facts).config
        if facts.sharded:
            require_shardable(resolved, resolved.tuning.backend, TORCH)
        return resolved

    def _tracer(self, config: Config) -> Tracer:
        optimizer = traced_optimizer(config.train.optim, self.device.kind)
        key = f"{config.tuning.model_dump_json()} {config.train.model_dump(include=_TRACED_KEYS)} {optimizer}"
        if key not in self._tracers:
            ranks = self.device.count
            self._tracers[key] = Tracer(
                config, self.description, device=self.device.kind, ranks=ranks, sharding=self.sharding
            )
        return self._tracers[key]

    def _traced(self, traced: Interval, config: Config, tracer: Tracer, note: str) -> Phase:
        state = tracer.optimizer_bytes(config.train.optim)
        parts = {name: size / GIB for name, size in traced.parts.items()}
        if state:
            parts["optimizer"] = state / GIB
        return Phase((traced.peak + state) / GIB, with_overhead(parts, self.device.kind), parts, note=note)

    def _training(self, config: Config, tracer: Tracer) -> Phase:
        lengths = _row_lengths(config, tracer, self._own_rows(config))
        more_rows = isinstance(config.train.rehearsal.rows, int)  # rehearsal rows come on top of the step's own
        traced = tracer.step(lengths, accumulating=more_rows or len(lengths) < self._own_rows(config))
        return self._traced(traced, config, tracer, f"{sum(lengths)} tokens at a time")

    def _own_rows(self, config: Config) -> int:
        """Rows of a step on the rank that has most of them."""
        return -(-int(config.train.effective_batch) // self.device.count)

    def speed(self, run: _Run, link: float | None) -> Speed:
        """How fast a step can be, where every row has max_seq_len tokens."""
        config, tracer = run.config, run.tracer
        own, length = self._own_rows(config), config.model.max_seq_len * _sides(tracer)
        lengths = _row_lengths(config, tracer, own)
        micro_batches = -(-own * length // sum(lengths))
        sent = tracer.step(lengths, accumulating=micro_batches > 1).sent * micro_batches
        if self.sharding == "ddp":
            sent = ring_all_reduce(tracer.gradient_bytes(), self.device.count)
        per_token = tracer.operations_per_token(config.model.max_seq_len)
        operations = None if per_token is None else per_token * own * length
        return bound(self.device, int(config.train.effective_batch) * length, sent, operations, link)

    def _generation(self, config: Config, tracer: Tracer) -> Phase:
        """Answers side by side; where they do not fit half as many, as generation itself does."""
        prompt, answer = config.model.max_seq_len, config.generation.max_new_tokens

        rows = min(config.eval.batch_size, config.eval.train_sample)
        while True:
            note = f"{rows} at a time: prompts of {prompt}, answers of {answer} tokens"
            phase = self._traced(tracer.generation(rows, prompt, answer), config, tracer, note)
            if phase.peak <= self.device.gib or rows == 1:
                return phase
            rows //= 2


def _row_lengths(config: Config, tracer: Tracer, most: int) -> list[int]:
    """The rows of the largest micro-batch that a resolved config allows: at max_seq_len, the last one shorter; of pairs
    both sides. most: rows of a rank's step.
    """
    length, sides, tokens = config.model.max_seq_len, _sides(tracer), int(config.train.micro_batch_tokens)
    rows = max(1, min(tokens // (length * sides), most))
    count = 2 if tracer.pairs else 1
    rest = min((tokens - count * rows * length) // count, length)
    return [length] * count * rows + ([rest] * count if tracer.packed and rows < most and rest > 1 else [])


def _sides(tracer: Tracer) -> int:
    """Sequences of a row, each of up to max_seq_len tokens: source and target, or the two answers of a pair."""
    return 2 if tracer.kind == "seq2seq" or tracer.pairs else 1


# ---- suggestions


def _suggestions(config: Config, run: _Run, planner: _Planner) -> tuple[list[Suggestion], Combination]:
    """The changes that save something, in order of preference, and how many of them it takes together."""
    limit, peak = planner.device.gib, run.training.peak
    suggestions: list[Suggestion] = []
    changes: list[dict[str, Any]] = []
    for settings, costs in _changes(config, run.config, gpu=planner.device.kind == "cuda"):
        try:
            new = planner.run(_with(config, settings)).training.peak
        except ConfigError:  # not where the weights are shared
            continue
        if peak - new > WORTHWHILE:
            saves = round(peak - new, 3)
            suggestions.append(Suggestion(" ".join(_as_flags(settings)), saves, costs, new <= limit))
            changes.append(settings)
    merged: dict[str, Any] = {}
    reached, saved = peak, 0.0
    for settings, suggestion in zip(changes, suggestions, strict=True):
        merged |= settings
        saved += suggestion.saves_gib
        if peak - saved <= limit or suggestion is suggestions[-1]:  # before that it is not worth tracing
            combined = planner.run(_with(config, merged))
            reached = max(phase.peak for phase in planner.phases(combined).values())
            if reached <= limit:
                break
    return suggestions, Combination(_as_flags(merged), round(reached, 3), reached <= limit)


def _changes(config: Config, resolved: Config, *, gpu: bool) -> Iterator[tuple[dict[str, Any], str]]:
    """(settings, what they cost), in order of preference."""
    train, mode, rank, length = resolved.train, resolved.tuning.mode, resolved.tuning.lora.r, resolved.model.max_seq_len
    checkpointing = {"train.gradient_checkpointing": True}
    offloading = {**checkpointing, "train.activation_offload": True}
    one_row, half_rank = {"train.micro_batch_tokens": length}, {"tuning.lora.r": rank // 2}
    prefix, free = config.tuning.adapter == "prefix", not (config.tuning.freeze or config.train.ewc.strength)
    changes: list[tuple[bool, dict[str, Any], str]] = [  # the first column: whether it applies
        (int(train.micro_batch_tokens) > length, one_row, "one row at a time: slower, the same steps"),
        (
            train.gradient_checkpointing is not True and not prefix,
            checkpointing,
            "a step takes about 1.45 times as long",
        ),
        (train.logits == "full", {"train.logits": "chunked"}, "the same loss"),
        (gpu and not train.activation_offload and not prefix, offloading, "slower: activations go to RAM and back"),
        (train.logits_tile > 128, {"train.logits_tile": 128}, "a little slower in the loss head"),
        (gpu and "8bit" not in train.optim, {"train.optim": "adamw_8bit"}, "optimizer state rounded to 8 bits"),
        (gpu and "paged" not in train.optim, {"train.optim": "paged_adamw_8bit"}, "optimizer state in RAM"),
        (mode == "lora", {"tuning.mode": "qlora"}, "a base rounded to 4 bits, dequantised in every step"),
        (train.ewc.strength > 0, {"train.ewc.strength": 0.0}, "nothing holds the weights near the base's"),
        (mode == "full" and free, {"tuning.mode": "lora"}, "adapters are trained, not the weights themselves"),
        (mode == "full" and free, {"tuning.mode": "qlora"}, "adapters on a base rounded to 4 bits"),
        (mode != "full" and rank > 4 and not prefix, half_rank, "half the capacity of the adapter"),
    ]
    for shorter in (length // 2, length // 4):
        budget = {} if config.train.micro_batch_tokens == "auto" else {"train.micro_batch_tokens": shorter}
        settings = {"model.max_seq_len": shorter, **budget}
        changes.append((shorter >= 64, settings, f"rows longer than {shorter} tokens are truncated or dropped"))
    return ((settings, costs) for applies, settings, costs in changes if applies)


def _with(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with these dotted keys changed."""

    def changed(section: Any, keys: list[str], value: Any) -> Any:
        inner = value if len(keys) == 1 else changed(getattr(section, keys[0]), keys[1:], value)
        return section.model_copy(update={keys[0]: inner})

    for key, value in settings.items():
        config = changed(config, key.split("."), value)
    return config


def _as_flags(settings: Mapping[str, Any]) -> list[str]:
    """As `--set` takes them."""
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]


def _smaller_model(config: Config, run: _Run, device: Device, sharding: Sharding) -> list[Suggestion]:
    """The largest of the quick start's models whose training step fits the GPU under the same settings."""
    candidates = sorted(QUICK_START_MODELS.items(), key=lambda item: -item[1]) if device.kind == "cuda" else []
    for name, least in candidates:
        if name != config.model.name and least <= min(device.gib, run.training.peak):
            smaller = _with(config, {"model.name": name, "model.revision": None})
            peak = _Planner(shapes.shipped_models()[name], device, sharding).run(smaller).training.peak
            if peak <= device.gib:
                saves = round(run.training.peak - peak, 3)
                return [Suggestion(f"model.name={name}", saves, "a smaller model", True)]
    return []


# ---- the check before training


def memory_check(
    config: Config,
    files: ModelFiles,
    hardware: Hardware,
    *,
    longest: int,
    force: bool = False,
    ranks: int = 1,
    sharding: Sharding | None = "ddp",
) -> None:
    """Raises EnvironmentProblem if not even the smallest micro-batch fits what is free on the device.

    config: as the user wrote it, before `auto` is resolved. longest: tokens of the longest row. force: only warn.
    ranks: processes of the run, each on a GPU of its own, or all in this machine's memory. sharding: None where it is
    not planned. What cannot be traced passes, with a warning.
    """
    if sharding is None:
        log.warning("memory is not checked before training: neither fsdp_offload_params nor DeepSpeed is planned")
        return
    free = hardware.free_bytes / GIB + (CONTEXT["cuda"] if hardware.device == "cuda" else 0.0)  # this process's own
    processes = 1 if hardware.device == "cuda" else ranks
    if processes * upper_bound(files.config, config, files.parameters, longest) < UNTRACED * free:
        return
    shorter = _with(config, {"model.max_seq_len": min(config.model.max_seq_len, max(1, longest))})
    device = Device(hardware.device, hardware.name, min(free, hardware.total_bytes / GIB) / processes, ranks)
    try:
        plan = make_plan(shorter, files.config, device, sharding=sharding)
    except SftError as error:
        log.warning("memory is not checked before training, because this model cannot be planned: %s", error)
        return
    if plan.fits:
        return
    message = (
        f"{config.model.name} does not fit {device.name}: {plan.worst_phase} needs {plan.peak:.2f} GiB, and"
        f" {device.gib:.2f} GiB are free"
    )
    if force:
        log.warning("%s; training starts anyway (--force)", message)
        return
    lines = [f"--set {s.setting} saves {s.saves_gib:.2f} GiB ({s.costs})" for s in plan.suggestions]
    if plan.combination is not None and plan.combination.fits:
        lines.insert(0, f"it fits with {' '.join(f'--set {setting}' for setting in plan.combination.settings)}")
    if plan.smallest_card:
        lines.append(f"the smallest card that would do: {plan.smallest_card}")
    lines.append("--force trains anyway (make plan shows where the memory goes)")
    where = f"{config.tuning.mode}, rows of {longest} tokens"
    raise EnvironmentProblem(message, where=where, fix="\n         ".join(lines))
