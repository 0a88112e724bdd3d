"""The rehearsal: before the first step, the longest real rows go through all that a run will do, memory measured.

Training (with the optimizer's state standing in its place), the evaluation loss, answers and a save: a run that would
run out of memory in its third hour does so now, where it costs a minute. On the way the micro-batch is settled: raised
until speed stops growing or memory says stop; gradient checkpointing is left off where memory allows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from sft.memory import probe
from sft.memory.probe import DoesNotFitError, Found, Gauge, Measured
from sft.model import adapters
from sft.step import unwrap
from sft.step.batch import Collator
from sft.step.step import StepConfig, evaluate_loss, forward_backward, out_of_memory, release_memory

LIMIT = 60.0  # seconds for all of it but the compiler; growing the micro-batch stops at half
WORTH = 2048  # tokens: where that much fits without checkpointing, nothing is gained by trying with it
Feature = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """One thing that a run does, once. Bytes: highest of tensors, and held by the allocator."""

    name: str
    allocated_bytes: int
    reserved_bytes: int
    seconds: float


@dataclass(frozen=True)
class Rehearsed:
    """What came of it. tokens: of a micro-batch. evaluating: what evaluation was lowered to, None where it was not."""

    tokens: int
    checkpointing: bool
    tokens_per_second: float
    stages: list[Stage] = field(default_factory=list)
    evaluating: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Rehearsed:
        return cls(**{**kept, "stages": [Stage(**stage) for stage in kept["stages"]]})

    @property
    def said(self) -> str:
        stages = ", ".join(f"{stage.name} {stage.reserved_bytes / 2**30:.2f} GiB" for stage in self.stages)
        return f"{stages}; {self.tokens_per_second:,.0f} tokens/s"


@dataclass
class Scene:
    """What is rehearsed with. rows, validation: real ones, with their lengths in tokens.

    most_rows: of a step, on this rank. fixed: the micro-batch in tokens where the config gives it. free: whether
    checkpointing may be chosen. state_bytes: of the optimizer, for each trained number. answer, save: what
    the run calls between its steps, None where it never does.
    """

    model: Any
    step_config: StepConfig
    rows: Sequence[Feature]
    lengths: Sequence[int]
    validation: Sequence[Feature]
    most_rows: int
    gauge: Gauge
    fixed: int | None = None
    free: bool = True
    state_bytes: int = 8
    answer: Callable[[], object] | None = None
    save: Callable[[], object] | None = None
    backward: Callable[[torch.Tensor], object] = torch.Tensor.backward
    limit: float = LIMIT


def rehearse(scene: Scene) -> Rehearsed:
    """Settles the micro-batch, then goes through the rest. The model, its gradients and the random state are as before.

    Raises EnvironmentProblem where not even one row fits, or no row of the evaluation does.
    """
    began = time.monotonic()
    devices = [scene.step_config.device] if torch.device(scene.step_config.device).type == "cuda" else []
    with torch.random.fork_rng(devices):
        found, checkpointing = _choose(scene, began)
        set_checkpointing(scene.model, checkpointing)
        tokens = scene.fixed or found.tokens
        stages = [Stage("training", found.best.allocated_bytes, found.best.peak_bytes, found.best.seconds)]
        scene.step_config = replace(scene.step_config, micro_batch_tokens=tokens)
        longest = sorted(scene.validation, key=lambda row: -len(row["input_ids"]))[: scene.most_rows]
        rest: dict[str, Callable[[], object] | None] = {
            "evaluation": (lambda: _evaluate(scene, longest)) if longest else None,
            "generation": (lambda: _answer(scene)) if scene.answer else None,
            "save": scene.save,
        }
        for name, act in rest.items():
            if act is not None and time.monotonic() - began < scene.limit:
                stages.append(_stage(scene, name, act))
    return Rehearsed(tokens, checkpointing, found.best.speed, stages, scene.step_config.eval_tokens)


def set_checkpointing(model: Any, on: bool) -> None:
    """Switches recomputation on or off on a model that may have adapters already."""
    adapters.set_checkpointing(unwrap(model), on)


def is_checkpointing(model: Any) -> bool:
    return bool(getattr(unwrap(model), "is_gradient_checkpointing", False))


def longest_batch(rows: Sequence[Feature], lengths: Sequence[int], tokens: int) -> list[Feature]:
    """The longest rows, as many as `tokens` hold; at least one."""
    taken, room = list[Feature](), tokens
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if taken and lengths[index] > room:
            break
        taken.append(rows[index])
        room -= lengths[index]
    return taken


def _choose(scene: Scene, began: float) -> tuple[Found, bool]:
    """The micro-batch, and whether activations are recomputed: not where enough fits without, or that is faster."""
    asked = is_checkpointing(scene.model)
    if not (asked and scene.free):
        return _search(scene, began), asked
    set_checkpointing(scene.model, False)
    without: Found | None = None
    with contextlib.suppress(DoesNotFitError):
        without = _search(scene, began)
    if without is not None and without.best.peak_bytes > scene.gauge.total * (1 - probe.MARGIN):
        without = None  # it fits, but for the margin
    if without is not None and (scene.fixed or without.tokens >= WORTH or not _grew(without, scene)):
        return without, False
    release_memory()
    set_checkpointing(scene.model, True)
    found = _search(scene, began)
    return (found, True) if without is None or found.best.speed >= without.best.speed else (without, False)


def _grew(found: Found, scene: Scene) -> bool:
    """Whether memory, not speed or the size of a step, ended its growth: with checkpointing it could go further."""
    last = max(found.tried, key=lambda one: one.rows)
    return found.rows < scene.most_rows and last is found.best


def _search(scene: Scene, began: float) -> Found:
    length = max(scene.lengths)
    if scene.fixed is not None:
        try:
            measured = _measure(scene, scene.fixed)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise DoesNotFitError(f"a micro-batch of {scene.fixed} tokens does not fit") from None
        return Found(max(1, scene.fixed // length), scene.fixed, (measured,), measured)
    return probe.search(
        lambda rows: _measure(scene, rows * length),
        length=length,
        most_rows=scene.most_rows,
        total_bytes=scene.gauge.total,
        time_left=lambda: time.monotonic() - began < scene.limit / 2,
    )


def _measure(scene: Scene, tokens: int) -> Measured:
    """Forward and backward of the longest rows in one micro-batch, twice: the second time is measured."""
    release_memory()  # what a larger one left with the allocator would count as this one's
    config, model = scene.step_config, scene.model
    features = longest_batch(scene.rows, scene.lengths, tokens)
    batch = {name: tensor.to(config.device) for name, tensor in Collator(config.kind)(features).items()}
    real = sum(int(batch[key].sum()) for key in ("lengths", "source_lengths") if key in batch)
    config = replace(config, micro_batch_tokens=max(tokens, real))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    state = [weight.new_empty(weight.numel() * scene.state_bytes, dtype=torch.uint8) for weight in trained]
    try:
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            scene.gauge.start()
            began = time.perf_counter()
            forward_backward(model, batch, config, backward=scene.backward, replay=False)
            allocated, reserved = scene.gauge.peaks()
        return Measured(len(features), reserved, time.perf_counter() - began, real, allocated)
    finally:
        state.clear()
        model.zero_grad(set_to_none=True)


def _evaluate(scene: Scene, rows: Sequence[Feature]) -> None:
    scene.step_config = evaluate_loss(scene.model, rows, scene.step_config).config


def _answer(scene: Scene) -> None:
    assert scene.answer is not None
    with scene.step_config.forward_context():
        scene.answer()


def _stage(scene: Scene, name: str, act: Callable[[], object]) -> Stage:
    release_memory()
    scene.gauge.start()
    began, was_training = time.perf_counter(), scene.model.training
    scene.model.eval()
    try:
        act()
    finally:
        scene.model.train(was_training)
    allocated, reserved = scene.gauge.peaks()
    return Stage(name, allocated, reserved, time.perf_counter() - began)
