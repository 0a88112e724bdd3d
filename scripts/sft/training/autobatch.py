"""Chooses the micro-batch by measuring on the GPU, before the first step, within a minute.

The longest real rows go through all that a run does: training (with the optimizer's state allocated), the evaluation
loss, answers at their full length and a save. A run that would run out of memory in its third hour does so now. On the
way the micro-batch is doubled until speed stops growing or memory ends, and gradient checkpointing is switched off
where enough fits without it. The result is cached under `.cache/memory_probe` for the next start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft import files, runs
from sft.config.auto import optimizer_state
from sft.errors import EnvironmentProblem, SftError
from sft.model import adapters
from sft.step import unwrap
from sft.step.batch import Collator
from sft.step.step import StepConfig, evaluate_loss, forward_backward, out_of_memory, release_memory
from sft.training import checkpoint as ckpt
from sft.training import distributed

if TYPE_CHECKING:
    from sft.training.job import Job, SampleAnswers
    from sft.training.loop import Feature

CACHE = ".cache/memory_probe"  # under the project's root
TIME_LIMIT = 60.0  # seconds for all measurements; growing the micro-batch ends at half of them
MARGIN = 0.1  # share of the GPU's memory that stays free: fragmentation, evaluation, other programs
MOST_TOKENS = 4096  # speed has stopped growing by then
WORTH_GROWING = 1.05  # doubling must gain 5 % in speed to be worth its memory
ENOUGH_TOKENS = 2048  # where so many fit without checkpointing, it is not tried with checkpointing
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "liger_kernel")
log = logging.getLogger("sft.training")


class DoesNotFitError(EnvironmentProblem):
    """Not even one row, or not the configured micro-batch, fits into memory."""


class CudaGauge:
    """This process's memory on its GPU, within `set_per_process_memory_fraction` if that is set. Bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        free, total = torch.cuda.mem_get_info(device)
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
        self.total = int(min(share * total, free + torch.cuda.memory_reserved(device)))

    def start(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> tuple[int, int]:
        """(of tensors, reserved by the allocator) since `start`."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)


@dataclass(frozen=True)
class Measurement:
    """One step of one micro-batch: its rows, real tokens, reserved and allocated bytes at the peak, seconds."""

    rows: int
    peak_bytes: int
    seconds: float
    tokens: int = 0
    allocated_bytes: int = 0

    @property
    def speed(self) -> float:
        """Tokens (or rows) a second."""
        return (self.tokens or self.rows) / self.seconds


@dataclass(frozen=True)
class Result:
    """What was measured. eval_tokens: the budget that evaluation was lowered to, None if it was not.

    peaks: for each stage the GiB of tensors and the GiB reserved.
    """

    tokens: int
    checkpointing: bool
    tokens_per_second: float
    eval_tokens: int | None = None
    peaks: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        stages = [f"{name} {reserved:.2f} GiB ({used:.2f} in tensors)" for name, (used, reserved) in self.peaks.items()]
        return f"{', '.join(stages)}; {self.tokens_per_second:,.0f} tokens/s"


def choose(
    job: Job,
    model: Any,
    step: StepConfig,
    folder: Path,
    checkpoint: Path | None,
    root: Path,
    answer: SampleAnswers | None,
) -> tuple[StepConfig, dict[str, Any]]:
    """The step with the micro-batch to use, and the values of section `train` that were chosen ({} on the CPU).

    folder: the run's. Where the config leaves them open, a resumed run uses the values of its checkpoint, so that it
    continues bit for bit. Raises EnvironmentProblem if no row fits.
    """
    if job.device.device != "cuda":
        return step, {}
    train, unresolved = job.config.train, job.unresolved
    is_free = (unresolved.batch_size, unresolved.grad_accum, unresolved.micro_batch_tokens) == ("auto", "auto", "auto")
    eval_tokens = None
    if checkpoint is not None:
        session = ckpt.read_state(checkpoint, ckpt.SESSION)
        tokens = int(session["asked_budget"][0] if is_free else train.micro_batch_tokens)
        is_open = unresolved.gradient_checkpointing == "auto"
        checkpointing = bool(session["checkpointing"] if is_open else train.gradient_checkpointing)
        reason = "as in the checkpoint" if is_free else "as configured"
    else:
        cache = root / CACHE / f"{_cache_key(job, None if is_free else int(train.micro_batch_tokens))}.json"
        result = _read_cache(cache)
        if result is None:
            adapter = ckpt.is_adapter(model) and distributed.rank() == 0
            result = MemoryProbe(
                model,
                step,
                job.rows.train,
                [int(length) for length in job.rows.train.lengths()],  # type: ignore[attr-defined]
                job.rows.validation,
                CudaGauge(torch.device("cuda", torch.cuda.current_device())),
                most_rows=-(-int(train.effective_batch) // distributed.world()),
                fixed_tokens=None if is_free else int(train.micro_batch_tokens),
                checkpointing_is_free=unresolved.gradient_checkpointing == "auto",
                state_bytes=0 if train.optim.startswith("paged") else math.prod(optimizer_state(train.optim)),
                answer=partial(answer.probe, model) if answer else None,
                save=partial(_trial_save, model, folder) if adapter else None,
            ).run()
            log.info("measured on this GPU: %s", result)
            _write_cache(cache, result)
        tokens = -distributed.largest([-result.tokens], step.device)[0]  # the smallest over ranks
        checkpointing, eval_tokens = result.checkpointing, result.eval_tokens
        reason = f"measured, {'with' if checkpointing else 'without'} gradient checkpointing"
    set_checkpointing(model, checkpointing)
    log.info("micro-batches of at most %d tokens (%s)", tokens, reason)
    settings: dict[str, Any] = {"micro_batch_tokens": tokens, "gradient_checkpointing": checkpointing}
    if is_free:
        effective = int(train.effective_batch)
        rows = min(effective, max(1, tokens // job.config.model.max_seq_len))
        settings |= {"batch_size": rows, "grad_accum": -(-effective // rows)}
    return replace(step, micro_batch_tokens=tokens, eval_tokens=eval_tokens), settings


def _trial_save(model: Any, folder: Path) -> None:
    trial = folder / ".memory_probe"
    trial.mkdir(exist_ok=True)
    try:
        ckpt.save_weights(model, trial)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _cache_key(job: Job, fixed_tokens: int | None) -> str:
    """A hash of all that a measurement depends on."""
    train = job.config.train
    depends = {
        "gpu": [job.device.name, job.device.total_bytes],
        "model": [job.files.name, job.files.fingerprint(), job.config.model.max_seq_len, job.rows.longest],
        "tuning": job.config.tuning.model_dump(),
        "precision": [train.bf16, train.fp16],
        "step": [train.effective_batch, distributed.world(), train.logits, train.logits_tile, train.optim],
        "memory": [train.activation_offload, train.kernels, job.unresolved.gradient_checkpointing, fixed_tokens],
        "answers": [job.config.eval.batch_size, job.config.generation.max_new_tokens, len(job.rows.answer_rows)],
        "versions": runs.versions(LIBRARIES),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _read_cache(path: Path) -> Result | None:
    try:
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    log.info("measured before on this GPU: %s", result)
    return result


def _write_cache(path: Path, result: Result) -> None:
    if distributed.rank() == 0:
        try:
            files.write_json(path, asdict(result))
        except (OSError, SftError) as error:
            log.warning("the measurement could not be cached for the next start: %s", error)


@dataclass
class MemoryProbe:
    """The measurements for one model.

    lengths: of the rows, in tokens. gauge: a CudaGauge. most_rows: of a step, on this rank. fixed_tokens: the
    configured micro-batch, None if it is free. state_bytes: of the optimizer for each trained number. answer, save:
    what the run does between steps, None if it never does.
    """

    model: Any
    step: StepConfig
    rows: Sequence[Feature]
    lengths: Sequence[int]
    validation: Sequence[Feature]
    gauge: Any
    most_rows: int
    fixed_tokens: int | None = None
    checkpointing_is_free: bool = True
    state_bytes: int = 8
    answer: Callable[[], object] | None = None
    save: Callable[[], object] | None = None
    time_limit: float = TIME_LIMIT

    def run(self) -> Result:
        """Measures; leaves weights, gradients and random state as they were. Raises EnvironmentProblem."""
        self.end = time.monotonic() + self.time_limit
        on_cuda = torch.device(self.step.device).type == "cuda"
        with torch.random.fork_rng([self.step.device] if on_cuda else []):
            tokens, best, checkpointing = self._with_or_without_checkpointing()
            set_checkpointing(self.model, checkpointing)
            self.step = replace(self.step, micro_batch_tokens=tokens)
            peaks = {"training": (best.allocated_bytes / 2**30, best.peak_bytes / 2**30)}
            stages = {
                "evaluation": self._evaluate if self.validation else None,
                "generation": self._answer if self.answer else None,
                "save": self.save,
            }
            for name, call in stages.items():
                if call is not None and time.monotonic() < self.end:
                    peaks[name] = self._measure_stage(call)
        return Result(tokens, checkpointing, best.speed, self.step.eval_tokens, peaks)

    def _with_or_without_checkpointing(self) -> tuple[int, Measurement, bool]:
        """(tokens, measurement, checkpointing) of the micro-batch to use: without recomputing activations where enough
        fits without, or where that is faster.
        """
        configured = is_checkpointing(self.model)
        if not (configured and self.checkpointing_is_free):
            tokens, best, _ = self._search()
            return tokens, best, configured
        set_checkpointing(self.model, False)
        without: tuple[int, Measurement] | None = None
        with contextlib.suppress(DoesNotFitError):
            tokens, best, memory_ended_growth = self._search()
            if best.peak_bytes <= self.gauge.total * (1 - MARGIN):
                if self.fixed_tokens or tokens >= ENOUGH_TOKENS or not memory_ended_growth:
                    return tokens, best, False
                without = tokens, best
        release_memory()
        set_checkpointing(self.model, True)
        tokens, best, _ = self._search()
        if without is None or best.speed >= without[1].speed:
            return tokens, best, True
        return *without, False

    def _search(self) -> tuple[int, Measurement, bool]:
        """(tokens, measurement, whether memory ended the growth) of the best micro-batch."""
        length, fixed = max(self.lengths), self.fixed_tokens
        if fixed is None:
            best, memory_ended_growth = search(
                lambda rows: self._measure(rows * length),
                length=length,
                most_rows=self.most_rows,
                total_bytes=self.gauge.total,
                time_left=lambda: time.monotonic() < self.end - self.time_limit / 2,
            )
            return best.rows * length, best, memory_ended_growth
        measurement = _none_if_out_of_memory(lambda: self._measure(fixed))
        if measurement is None:
            raise DoesNotFitError(f"a micro-batch of {fixed} tokens does not fit")
        return fixed, measurement, False

    def _measure(self, tokens: int) -> Measurement:
        """Forward and backward of the longest rows in one micro-batch, twice: the second time is measured."""
        release_memory()  # memory that a larger try left reserved would count here
        features = longest_batch(self.rows, self.lengths, tokens)
        batch = {name: tensor.to(self.step.device) for name, tensor in Collator(self.step.kind)(features).items()}
        real = sum(int(batch[name].sum()) for name in ("lengths", "source_lengths") if name in batch)
        step = replace(self.step, micro_batch_tokens=max(tokens, real))
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        state = [weight.new_empty(weight.numel() * self.state_bytes, dtype=torch.uint8) for weight in trained]
        try:
            for _ in range(2):
                self.model.zero_grad(set_to_none=True)
                self.gauge.start()
                began = time.perf_counter()
                forward_backward(self.model, batch, step, replay=False)
                allocated, reserved = self.gauge.peaks()
            return Measurement(len(features), reserved, time.perf_counter() - began, real, allocated)
        finally:
            state.clear()
            self.model.zero_grad(set_to_none=True)

    def _evaluate(self) -> None:
        longest = sorted(self.validation, key=lambda row: -len(row["input_ids"]))[: self.most_rows]
        self.step = evaluate_loss(self.model, longest, self.step).config

    def _answer(self) -> None:
        assert self.answer is not None
        with self.step.forward_context():
            self.answer()

    def _measure_stage(self, call: Callable[[], object]) -> tuple[float, float]:
        """GiB in tensors and GiB reserved at the peak of `call`, in evaluation mode."""
        release_memory()
        self.gauge.start()
        training = self.model.training
        self.model.eval()
        try:
            call()
        finally:
            self.model.train(training)
        allocated, reserved = self.gauge.peaks()
        return allocated / 2**30, reserved / 2**30


def search(
    measure: Callable[[int], Measurement],
    *,
    length: int,
    most_rows: int,
    total_bytes: int,
    time_left: Callable[[], bool] = lambda: True,
) -> tuple[Measurement, bool]:
    """Doubles the rows from 1 while they fit with a margin and speed grows; halves the stride when memory runs out.

    measure: runs `rows` rows of `length` tokens and may run out of memory. Returns the best measurement, and whether
    memory ended the growth. Raises DoesNotFitError if one row runs out of memory.
    """
    usable, most = total_bytes * (1 - MARGIN), max(1, min(most_rows, MOST_TOKENS // length))
    best = _none_if_out_of_memory(lambda: measure(1))  # a single row is used even if it leaves no margin
    if best is None:
        raise DoesNotFitError(
            f"one row of {length} tokens does not fit in {total_bytes / 2**30:.1f} GiB",
            fix="lower model.max_seq_len or choose a smaller model; `make plan` shows what each saves",
        )
    memory_ended_growth, stride = False, 1
    while best.rows + stride <= most and time_left():
        rows = best.rows + stride
        measurement = _none_if_out_of_memory(partial(measure, rows))
        if measurement is None or measurement.peak_bytes > usable:
            memory_ended_growth, most, stride = True, rows - 1, max(1, stride // 2)
            continue
        if measurement.speed < WORTH_GROWING * best.speed:
            return best, False
        best, stride = measurement, min(measurement.rows, max(1, most - measurement.rows))
    return best, memory_ended_growth


def _none_if_out_of_memory(measure: Callable[[], Measurement]) -> Measurement | None:
    try:
        return measure()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    release_memory()  # now that the error, whose traceback holds tensors, is gone
    return None


def longest_batch(rows: Sequence[Feature], lengths: Sequence[int], tokens: int) -> list[Feature]:
    """The longest rows that fit into `tokens` tokens; at least one."""
    batch, left = list[Any](), tokens
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[index] > left:
            break
        batch.append(rows[index])
        left -= lengths[index]
    return batch


def set_checkpointing(model: Any, on: bool) -> None:
    """Switches recomputing of activations on or off, also on a model that has adapters."""
    adapters.set_checkpointing(unwrap(model), on)


def is_checkpointing(model: Any) -> bool:
    return bool(getattr(unwrap(model), "is_gradient_checkpointing", False))
