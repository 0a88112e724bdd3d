"""What runs on this machine really took, and what the planner learns from it for the next one.

A record is a line of `.cache/planner/calibration.jsonl` under the project's root (git-ignored). Three things are learnt
of a GPU, as medians of its records, those of the same model family alone where there are any: how far the trace was off
(`drift`), what the allocator held beyond the tensors (`slack`), and what the process held beyond that (`context_gib`).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

from sft import files
from sft.config.auto import Facts, resolve
from sft.config.schema import Config
from sft.errors import EnvironmentProblem, ModelError, SftError
from sft.memory import devices
from sft.memory import estimate as estimate_module
from sft.memory.devices import CONTEXT, LIBRARIES, Device, plain
from sft.memory.estimate import FRAGMENTATION, GIB, Estimate, changed
from sft.memory.trace import Traced, Traces
from sft.model.files import ModelFiles
from sft.model.hardware import Hardware

FILE = ".cache/planner/calibration.jsonl"
KEPT = 500  # records; older ones are dropped
LEAST = 0.5  # GiB: in smaller runs cuBLAS's workspaces, 17 MiB (64 on a Hopper), speak louder than the model's tensors
log = logging.getLogger("sft.memory")


@dataclass(frozen=True)
class Record:
    """One measured run or rehearsal, of this process on one device. GiB = 2^30 bytes.

    gpu: as the driver names it (a plan's shorter name finds it too), or `cpu`. family: `model_type` of config.json.
    micro_batch_tokens: of the largest micro-batch that ran. allocated_gib, reserved_gib: torch's highest, in a training
    step (of a `run`: in all of it). context_gib: what the process held beside them, None where nobody looked.
    planned_gib: what the planner says of the same. tokens_per_second: real ones, of one device. flops_per_token: of
    `memory.speed`, for the share of the card's speed.
    """

    gpu: str
    family: str
    model: str
    mode: str
    micro_batch_tokens: int
    allocated_gib: float | None = None
    reserved_gib: float | None = None
    context_gib: float | None = None
    planned_gib: float | None = None
    tokens_per_second: float | None = None
    flops_per_token: float | None = None
    stage: str = "run"
    versions: dict[str, str] = field(default_factory=dict)
    when: str = ""


@dataclass(frozen=True)
class Residual:
    """What records say of a GPU; None where they do not. drift: measured over traced bytes. slack: reserved over
    allocated, less 1. records: how many; family: whether all are of that family. flops: achieved operations a second,
    and of what runs, in words.
    """

    records: int
    family: bool
    drift: float | None
    slack: float | None
    context_gib: float | None
    flops: float | None
    flops_of: str = ""


def record_calibration(root: Path, entry: Record) -> None:
    """Adds a record. A disk that refuses is said and forgiven: a run is not lost for its calibration."""
    path = root / FILE
    entry = Record(**{**asdict(entry), "when": entry.when or time.strftime("%Y-%m-%dT%H:%M:%S")})
    try:
        lines = [json.dumps(asdict(each)) for each in [*read(root)[-KEPT + 1 :], entry]]
        files.write_text(path, "\n".join(lines) + "\n")
    except (OSError, SftError) as error:
        log.warning("the run's measured memory and speed could not be kept for the planner: %s", error)


def read(root: Path) -> list[Record]:
    """Every record that can be read, oldest first; a spoilt line is passed over, and that is said."""
    known = {each.name for each in fields(Record)}
    try:
        lines = (root / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    found, spoilt = list[Record](), 0
    for line in lines:
        try:
            found.append(Record(**{key: value for key, value in json.loads(line).items() if key in known}))
        except (ValueError, TypeError, AttributeError):
            spoilt += 1
    if spoilt:
        log.warning("%d lines of %s cannot be read and are passed over", spoilt, root / FILE)
    return found


def lookup(root: Path, gpu: str, family: str, model: str = "") -> Residual | None:
    """What was measured on this GPU (or `cpu`): of this family where there are records of it, else of all; the speed of
    this very model where it ran here. None where nothing is.
    """
    here = [each for each in read(root) if plain(each.gpu) == plain(gpu)]
    same = [each for each in here if each.family == family]
    chosen = same or here
    if not chosen:
        return None
    achieved, whose = _speed(here, family, model)
    large = [each for each in chosen if (each.allocated_gib or 0.0) >= LEAST]
    return Residual(
        records=len(chosen),
        family=bool(same),
        drift=_middle([a / p for e in large if (a := e.allocated_gib) and (p := e.planned_gib)]),
        slack=_middle([r / a - 1 for e in large if (r := e.reserved_gib) and (a := e.allocated_gib)]),
        context_gib=_middle([e.context_gib for e in chosen if e.context_gib is not None]),
        flops=achieved,
        flops_of=whose,
    )


def _speed(here: Sequence[Record], family: str, model: str) -> tuple[float | None, str]:
    """Operations a second, and of what: of whole runs before rehearsals, of the nearest model that ran."""
    timed = [(e, s * f) for e in here if (s := e.tokens_per_second) and (f := e.flops_per_token)]
    timed = [one for one in timed if one[0].stage == "run"] or timed
    for whose, of in (
        ("this model", [done for e, done in timed if e.model == model]),
        (f"{family} models", [done for e, done in timed if e.family == family]),
        ("other models", [done for _, done in timed]),
    ):
        if of:
            return median(of), f"{len(of)} earlier {'run' if len(of) == 1 else 'runs'} of {whose}"
    return None, ""


def _middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None


# What was measured by card: (share that the allocator holds beyond the tensors, GiB of the context). None is yet.
BY_CARD: dict[str, tuple[float, float]] = {}


@dataclass(frozen=True)
class Overhead:
    """share: of the allocated bytes, held beyond them. context_gib: before the first tensor. drift: measured over
    traced bytes, of earlier runs. source: where these come from, in words. flops: operations a second achieved
    here by earlier runs, None where none was measured; flops_of: of which, in words.
    """

    share: float
    context_gib: float
    drift: float
    source: str
    flops: float | None = None
    flops_of: str = ""

    def peak(self, allocated_gib: float) -> float:
        """GiB of the device that `allocated_gib` of tensors take."""
        return allocated_gib * self.drift * (1 + self.share) + self.context_gib


def overhead_of(device: Device, family: str, root: Path | None, *, model: str = "") -> Overhead:
    """What holds for this device and family: this machine's own records, then the table of cards, then presumption."""
    share, context = BY_CARD.get(device.name, (FRAGMENTATION, CONTEXT[device.kind]))
    source = "measured on this card" if device.name in BY_CARD else "presumed: not measured on such a card"
    name = "cpu" if device.kind == "cpu" else device.name
    found = lookup(root, name, family, model) if root is not None else None
    if found is None:
        return Overhead(share, context, 1.0, source)
    learnt = [name for name in ("drift", "slack", "context_gib") if getattr(found, name) is not None]
    if learnt:
        whose = f"{family} models" if found.family else "other models"
        source = f"measured in {found.records} runs of {whose} here ({', '.join(learnt)})"
    return Overhead(
        share=share if found.slack is None else found.slack,
        context_gib=context if found.context_gib is None else found.context_gib,
        drift=1.0 if found.drift is None else found.drift,
        source=source,
        flops=found.flops,
        flops_of=found.flops_of,
    )


STANDING = ("weights in 4 bit", "embedding and head", "weights", "adapters", "optimizer")
BLOCK = 1 << 24  # numbers that a merge works on at a time (`ship.changes`)
WORK, PLAIN_WORK = (
    20,
    8,
)  # bytes a number that it needs for them, measured: of a layer that it changes, of another tensor


@dataclass(frozen=True)
class Phase:
    """Sizes in GiB. allocated: tensors on the device at the highest moment, parts their items; peak: with fragmentation
    and context. ram, disk: what is needed beside the device, None where nothing worth saying. note: what it is of.
    """

    allocated: float
    peak: float
    parts: dict[str, float] = field(default_factory=dict)
    ram: float | None = None
    disk: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "allocated_gib": round(self.allocated, 3),
            "peak_gib": round(self.peak, 3),
            "parts": {name: round(size, 4) for name, size in self.parts.items()},
            "ram_gib": None if self.ram is None else round(self.ram, 3),
            "disk_gib": None if self.disk is None else round(self.disk, 3),
            "note": self.note,
        }


def lengths(config: Config, traces: Traces) -> list[int]:
    """The rows of the largest micro-batch that the resolved config allows: at max_seq_len, the last one shorter."""
    train, length = config.train, config.model.max_seq_len
    a_row, tokens = length * (2 if traces.kind == "seq2seq" else 1), int(train.micro_batch_tokens)
    rows = max(1, min(tokens // a_row, int(train.effective_batch)))
    found, left = [length] * rows, tokens - rows * length
    if traces.apart and rows < int(train.effective_batch) and left > 1:
        found.append(min(left, length))
    return found


def training(config: Config, traces: Traces, slack: Overhead) -> Phase:
    """A step at the largest micro-batch."""
    rows = lengths(config, traces)
    found = traces.step(rows, waiting=len(rows) < int(config.train.effective_batch))
    return _traced(found, slack, f"{sum(rows)} tokens at a time")


def every(config: Config, traces: Traces, slack: Overhead, device: Device, trained: Phase) -> dict[str, Phase]:
    """All phases of the run, `trained` first."""
    found = {"training": trained}
    if config.train.eval_strategy != "no":
        rows = lengths(config, traces)
        found["evaluation"] = _traced(traces.evaluation(rows), slack, f"{sum(rows)} tokens at a time")
        if config.eval.train_sample:
            found["generation"] = _generation(config, traces, slack, device)
    found["saving"] = _saving(config, slack, trained, device)
    if config.tuning.mode != "full":
        found["merging"] = _merging(traces)
    return found


def _generation(config: Config, traces: Traces, slack: Overhead, device: Device) -> Phase:
    """Answers side by side; as generation itself does, half as many where they do not fit."""
    prompt, answer = config.model.max_seq_len, config.generation.max_new_tokens

    def at(rows: int) -> Phase:
        note = f"{rows} answers side by side, prompts of {prompt} and answers of {answer} tokens"
        return _traced(traces.generation(rows, prompt, answer), slack, note)

    rows = min(config.eval.batch_size, config.eval.train_sample)
    if slack.peak(traces.standing / GIB) > device.gib:
        return at(1)
    high = at(rows)
    if high.peak <= device.gib or rows == 1:
        return high
    low = at(1)
    a_row = (high.peak - low.peak) / (rows - 1)
    while rows > 1 and low.peak + (rows - 1) * a_row > device.gib:
        rows //= 2
    return low if rows == 1 else at(rows)


def _saving(config: Config, slack: Overhead, trained: Phase, device: Device) -> Phase:
    """A checkpoint: what is trained and the optimizer's state; kept ones, the best, a new one in the making, and what
    the run leaves at its end. From a GPU the weights are written from a copy in RAM; on a CPU from where they are.
    """
    parts = {name: trained.parts[name] for name in STANDING if name in trained.parts}
    weights = parts.get("adapters", 0.0) if config.tuning.mode != "full" else parts.get("weights", 0.0)
    one = weights + parts.get("optimizer", 0.0)
    kept = config.train.save_total_limit + (2 if config.train.load_best_model_at_end else 1)
    allocated = sum(parts.values())
    note = f"{kept} checkpoints of {one:.2f} GiB and the result"
    ram = LIBRARIES["cuda"] + weights if device.kind == "cuda" else None
    return Phase(allocated, slack.peak(allocated), parts, ram, kept * one + weights, note)


def _merging(traces: Traces) -> Phase:
    """Tensor by tensor from the base's 16-bit files: RAM of one's pages, and of a block that is worked on."""
    worked = ((traces.largest_weight, PLAIN_WORK), (traces.widest_layer, WORK))
    ram = LIBRARIES["cpu"] + max(2 * size + work * min(size, BLOCK) for size, work in worked) / GIB
    return Phase(0.0, 0.0, {}, ram, 2 * traces.parameters / GIB, "on the CPU, from file to file; 16-bit")


def _traced(found: Traced, slack: Overhead, note: str) -> Phase:
    parts = {name: size / GIB for name, size in found.parts.items()}
    return Phase(found.peak / GIB, slack.peak(found.peak / GIB), parts, note=note)


WORTH = 0.01  # GiB: a remedy that saves less is left out
Peak = Callable[[Config], float]  # GiB that a config takes, with its `auto`s


@dataclass(frozen=True)
class Suggestion:
    """A change of settings. setting: for `--set`. saves_gib: of the peak; costs: in words; slower: share of time more,
    None where that is not known; fits: whether it is enough by itself.
    """

    setting: str
    saves_gib: float
    costs: str
    slower: float | None
    fits: bool


@dataclass(frozen=True)
class Together:
    """The first remedies that are enough together, in order; all of them where even these are not."""

    settings: list[str]
    peak_gib: float
    fits: bool


@dataclass(frozen=True)
class _Change:
    settings: dict[str, Any]
    costs: str
    slower: float | None = None


def find_suggestions(
    asked: Config, resolved: Config, peak: float, limit: float, measure: Peak, whole: Peak, *, gpu: bool
) -> tuple[list[Suggestion], Together]:
    """Remedies in order of preference, those that save something; and how many of them it takes together.

    peak: GiB of a training step of `resolved`, which `asked` has become; limit: of the device. measure: GiB of another
    config's training step; whole: of its worst phase.
    """
    singles: list[Suggestion] = []
    kept: list[dict[str, Any]] = []
    for change in _changes(asked, resolved, gpu=gpu):
        new = measure(_with(asked, change.settings))
        if peak - new > WORTH:
            singles.append(
                Suggestion(
                    " ".join(_said(change.settings)), round(peak - new, 3), change.costs, change.slower, new <= limit
                )
            )
            kept.append(change.settings)
    merged: dict[str, Any] = {}
    reached, saved = peak, 0.0
    for settings, single in zip(kept, singles, strict=True):
        merged |= settings
        saved += single.saves_gib
        if peak - saved <= limit or single is singles[-1]:  # before, it is not worth tracing
            reached = whole(_with(asked, merged))
            if reached <= limit:
                break
    return singles, Together(_said(merged), round(reached, 3), reached <= limit)


def _changes(asked: Config, resolved: Config, *, gpu: bool) -> Iterator[_Change]:
    train, tuning, length = resolved.train, resolved.tuning, resolved.model.max_seq_len
    if int(train.micro_batch_tokens) > length:
        yield _Change({"train.micro_batch_tokens": length}, "speed: one row at max_seq_len at a time; the same steps")
    if train.gradient_checkpointing is not True:
        yield _Change({"train.gradient_checkpointing": True}, "about 1.45 times the time of a step", 0.45)
    if train.logits == "full":
        yield _Change({"train.logits": "chunked"}, "nothing: the same loss", 0.0)
    if gpu and not train.activation_offload:
        away = {"train.gradient_checkpointing": True, "train.activation_offload": True}
        yield _Change(away, "time: kept activations go to the machine's memory and back")
    if train.logits_tile > 128:
        yield _Change({"train.logits_tile": 128}, "a little speed of the head")
    if gpu:
        yield from _optimizers(train.optim)
    if tuning.mode == "lora":
        yield _Change({"tuning.mode": "qlora"}, "a base rounded to 4 bits, dequantised in every step", 0.3)
    if tuning.mode == "full":
        yield _Change({"tuning.mode": "lora"}, "adapters are trained, not the weights themselves", 0.0)
        yield _Change({"tuning.mode": "qlora"}, "adapters on a base rounded to 4 bits", 0.3)
    elif tuning.lora.r > 4:
        yield _Change({"tuning.lora.r": tuning.lora.r // 2}, "half the capacity of the adapter", 0.0)
    for shorter in (length // 2, length // 4):
        if shorter >= 64:
            cut: dict[str, Any] = {"model.max_seq_len": shorter}
            if asked.train.micro_batch_tokens != "auto":
                cut["train.micro_batch_tokens"] = shorter
            yield _Change(cut, f"rows longer than {shorter} tokens are cut or dropped", 0.0)


def _optimizers(now: str) -> Iterator[_Change]:
    if "8bit" not in now:
        yield _Change({"train.optim": "adamw_8bit"}, "optimizer state rounded to 8 bits", 0.02)
    if not now.startswith("paged"):
        yield _Change(
            {"train.optim": "paged_adamw_8bit"}, "optimizer state in the machine's memory when it is tight", 0.05
        )


def _with(config: Config, settings: dict[str, Any]) -> Config:
    """The config with these dotted keys changed."""
    for key, value in settings.items():
        config = _set(config, key.split("."), value)
    return config


def _set(section: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _set(getattr(section, path[0]), path[1:], value)
    return changed(section, **{path[0]: inner})


def _said(settings: dict[str, Any]) -> list[str]:
    """As `--set` takes them."""
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]


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
    remedies: list[Suggestion]
    method: str
    phases: dict[str, Phase] = field(default_factory=dict)
    together: Together | None = None
    slack: Overhead | None = None
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


def make_plan(
    config: Config,
    description: Mapping[str, Any],
    device: Device,
    *,
    root: Path | None = None,
    fix: bool = True,
) -> Plan:
    """The plan for `config` on `device` of the model that `description`, its config.json, describes: traced.

    Where the micro-batch is left to be measured, it is the most rows at max_seq_len that fit. root: the project's,
    whose records of earlier runs and kept traces are used. fix: look for remedies where it does not fit. Raises
    ConfigError where batch settings contradict each other, ModelError for a family that cannot be traced.
    """
    _refuse_unusable(config, description)
    around = _Surroundings(description, device, root, config.model.name)
    settled, traces, trained = _settle(config, around)
    found = every(settled, traces, around.slack, device, trained)
    peak = max(phase.peak for phase in found.values())
    fits, fixes, together = peak <= device.gib, list[Suggestion](), None
    if fix and not fits:
        gpu = device.kind == "cuda"
        fixes, together = find_suggestions(
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
            fix="name a model as transformers saves it",
        )
    stored = description.get("quantization_config")
    method = stored.get("quant_method", "an unknown way") if isinstance(stored, Mapping) else None
    if method and not (method == "bitsandbytes" and config.tuning.mode == "qlora"):
        raise ModelError(
            f"the weights of {config.model.name} are stored quantised ({method})",
            where="model.name",
            fix="name the full-precision model: qlora makes its own 4-bit weights from it, and merging needs it",
        )


class _Surroundings:
    """What stays the same for every variant of a run: model, device, slack, and traces made so far."""

    def __init__(self, description: Mapping[str, Any], device: Device, root: Path | None, model: str) -> None:
        self.description, self.device, self.root = description, device, root
        self.slack = overhead_of(device, str(description.get("model_type", "")), root, model=model)
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
        found = every(settled, traces, self.slack, self.device, trained)
        return max(phase.peak for phase in found.values())


def _settle(config: Config, around: _Surroundings) -> tuple[Config, Traces, Phase]:
    """The config resolved, with its micro-batch where that is open, its traces, and its training phase."""
    traces = around.traces(around.resolve(config))
    rows = trained = None
    if around.device.kind == "cuda" and _is_open(config):
        rows, trained = _most_rows(config, traces, around)
    settled = around.resolve(config, parameters=traces.parameters, rows=rows)
    return settled, traces, trained or training(settled, traces, around.slack)


def _smaller(config: Config, device: Device) -> list[Suggestion]:
    """The largest of Qwen2.5 that fits, by the closed form: another model is a rough proposal anyway."""
    name = (
        estimate_module.largest_that_fits(device.gib, length=config.model.max_seq_len)
        if device.kind == "cuda"
        else None
    )
    return (
        []
        if name in (None, config.model.name)
        else [Suggestion(f"model.name={name}", 0.0, "a smaller model", None, True)]
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
        return training(around.resolve(config, rows=rows), traces, around.slack)

    effective, room = int(around.resolve(config).train.effective_batch), around.device.gib
    a_row = config.model.max_seq_len * (2 if traces.kind == "seq2seq" else 1)
    most = max(1, min(MOST_TOKENS // a_row, effective))
    around.tight = around.tight or around.slack.peak(traces.standing / estimate_module.GIB) > room
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


FAR = 0.5  # of the free memory: a bound below it needs no trace


def memory_check(
    config: Config, files: ModelFiles, hardware: Hardware, root: Path, *, longest: int, force: bool = False
) -> None:
    """Raises EnvironmentProblem where not even the smallest micro-batch fits what is free on the device.

    config: as asked, with its `auto`s. longest: tokens of the longest row. force: the refusal is a warning. A model
    that cannot be traced is let through, and that is said.
    """
    free = hardware.free_bytes / GIB + (
        CONTEXT["cuda"] if hardware.device == "cuda" else 0.0
    )  # our own context is there
    if bound(files.config, config, files.parameters, longest) < FAR * free:
        return
    shorter = changed(config.model, max_seq_len=min(config.model.max_seq_len, max(1, longest)))
    device = Device(hardware.device, hardware.name, min(free, hardware.total_bytes / GIB))
    try:
        made = make_plan(changed(config, model=shorter), files.config, device, root=root)
    except SftError as error:
        log.warning("the plan of this run cannot be made, so it starts without: %s", error)
        return
    if made.fits:
        return
    said = (
        f"{config.model.name} does not fit {device.name}: {made.worst} needs {made.estimate.peak:.2f} GiB, and"
        f" {device.gib:.2f} are free"
    )
    if force:
        log.warning("%s; --force: it is tried all the same", said)
        return
    raise EnvironmentProblem(said, where=f"{config.tuning.mode}, rows of {longest} tokens", fix=_fix(made))


def bound(description: Mapping[str, Any], config: Config, parameters: int, longest: int) -> float:
    """GiB that a step cannot exceed, of sizes in config.json: generous, and infinite where one of them is not there.

    Weights, gradients and optimizer in fp32; for each token of a micro-batch 32 hidden and 12 feed-forward numbers and
    its attention scores in every layer, all kept, and four of each logit; the cache of all answers.
    """

    def size(*names: str) -> float:
        return next(
            (float(description[name]) for name in names if isinstance(description.get(name), int)), float("inf")
        )

    hidden = size("hidden_size", "n_embd", "d_model")
    inner = [description.get(name) or 0 for name in ("intermediate_size", "ffn_dim", "d_ff", "n_inner")]
    wide = max(4 * hidden, *map(float, inner))
    sides = 2 if description.get("is_encoder_decoder") else 1
    layers = sides * size("num_hidden_layers", "n_layer", "num_layers")
    heads = size("num_attention_heads", "n_head", "num_heads")
    asked = config.train.micro_batch_tokens
    tokens = sides * max(longest, asked if isinstance(asked, int) else min(4096, 16 * longest))
    a_token = layers * (32 * hidden + 12 * wide + 2 * heads * longest) + 4 * size("vocab_size")
    answers = config.eval.batch_size * (config.generation.max_new_tokens + longest) * layers * 4 * hidden
    return (16.0 * parameters + 4.0 * (tokens * a_token + answers)) / GIB


def _fix(made: Plan) -> str:
    lines = [f"--set {r.setting} saves {r.saves_gib:.2f} GiB ({r.costs})" for r in made.remedies if r.saves_gib]
    models = [f"--set {r.setting}" for r in made.remedies if not r.saves_gib]
    if made.together is not None and made.together.fits:
        settings = " ".join(f"--set {setting}" for setting in made.together.settings)
        lines.insert(0, f"it fits with {settings}")
    if made.device.kind == "cuda" and made.card:
        lines.append(f"the smallest card that would do: {made.card}")
    return "\n         ".join(
        [*lines, *models, "--force tries it all the same (make plan shows where the memory goes)"]
    )
