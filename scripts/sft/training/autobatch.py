"""Chooses the micro-batch by measuring, before the first step: on a GPU speed and memory, within a minute.

The longest real rows go through forward and backward, with the optimizer's state allocated. The micro-batch is doubled
until speed stops growing or memory ends, and gradient checkpointing is switched off where enough fits without it.
Evaluation, answers and saves are not tried: they lower themselves when memory runs out in them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

from sft.config.auto import optimizer_state
from sft.errors import EnvironmentProblem
from sft.model import adapters
from sft.model.adapters import unwrap
from sft.model.hardware import memory
from sft.model.shard import is_sharded
from sft.step.batch import Collator, split_micro_batches
from sft.step.step import StepConfig, forward_backward, out_of_memory, release_memory, token_losses
from sft.training import distributed
from sft.training.checkpoint import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from sft.training.job import Job
    from sft.training.loop import Feature

TIME_LIMIT = 60.0  # seconds; growing the micro-batch ends at half of them
MARGIN = 0.1  # share of the GPU's memory that stays free: fragmentation, evaluation, other programs
MOST_TOKENS = 4096  # speed has stopped growing by then
WORTH_GROWING = 1.05  # doubling must gain 5 % in speed to be worth its memory
ENOUGH_TOKENS = 2048  # where so many fit without checkpointing, it is not tried with checkpointing
log = logging.getLogger("sft.training")


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

    def peak(self) -> int:
        """Reserved by the allocator since `start`."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device)


class Measurement(NamedTuple):
    """A training step in micro-batches of at most `tokens` tokens: its peak in bytes, real tokens a second."""

    tokens: int
    checkpointing: bool
    peak_bytes: int
    tokens_per_second: float


def choose(job: Job, model: Any, step: StepConfig, checkpoint: Path | None = None) -> tuple[StepConfig, dict[str, Any]]:
    """The step with the micro-batch to use, and the values of section `train` that were chosen.

    Where the config leaves them open, a resumed run uses the values of its checkpoint, so that it continues bit for
    bit. Raises EnvironmentProblem if no row fits.
    """
    train, unresolved = job.config.train, job.unresolved
    progress = None if checkpoint is None else Progress.read(checkpoint)
    if is_sharded(model):  # running out of memory on one rank cannot be tried
        if progress and unresolved.micro_batch_tokens == "auto":
            return replace(step, micro_batch_tokens=int(progress.asked_budget[0])), {}
        return step, {}
    if job.device.device != "cuda":
        if unresolved.micro_batch_tokens != "auto":
            return step, {}
        tokens = (
            progress.asked_budget[0]
            if progress
            else cpu_tokens(model, step, job.rows.train[int(job.rows.train.lengths().argmax())])
        )
        return replace(step, micro_batch_tokens=tokens), {"micro_batch_tokens": tokens}
    is_free = (unresolved.batch_size, unresolved.grad_accum, unresolved.micro_batch_tokens) == ("auto", "auto", "auto")
    tokens, checkpointing = int(train.micro_batch_tokens), bool(train.gradient_checkpointing)
    if progress is not None:
        tokens = int(progress.asked_budget[0]) if is_free else tokens
        checkpointing = progress.checkpointing if unresolved.gradient_checkpointing == "auto" else checkpointing
    else:
        best = MemoryProbe(
            model,
            step,
            job.rows.train,
            [int(length) for length in job.rows.train.lengths()],  # type: ignore[attr-defined]
            CudaGauge(torch.device("cuda", torch.cuda.current_device())),
            most_rows=-(-int(train.effective_batch) // distributed.world()),
            fixed_tokens=None if is_free else tokens,
            checkpointing=None if unresolved.gradient_checkpointing == "auto" else checkpointing,
            state_bytes=0 if train.optim.startswith("paged") else math.prod(optimizer_state(train.optim)),
        ).run()
        log.info("measured: %.2f GiB at the peak, %.0f tokens/s", best.peak_bytes / 2**30, best.tokens_per_second)
        tokens = -distributed.largest([-best.tokens], step.device)[0]  # the smallest over ranks
        checkpointing = best.checkpointing
    adapters.set_checkpointing(unwrap(model), checkpointing)
    how = "with" if checkpointing else "without"
    log.info("micro-batches of at most %d tokens, %s gradient checkpointing", tokens, how)
    settings: dict[str, Any] = {"micro_batch_tokens": tokens, "gradient_checkpointing": checkpointing}
    if is_free:
        effective = int(train.effective_batch)
        rows = min(effective, max(1, tokens // job.config.model.max_seq_len))
        settings |= {"batch_size": rows, "grad_accum": -(-effective // rows)}
    return replace(step, micro_batch_tokens=tokens), settings


def cpu_tokens(model: Any, step: StepConfig, row: Feature) -> int:
    """The step's token budget, halved until what a forward pass stores for it fits half of the free memory.

    That is measured on one long row (weights that are cast count too, whatever its length), without a backward pass.
    """
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    stored: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = storage
        return torch.empty(0)  # a graph that has no backward pass never frees what it gets here

    (micro,) = split_micro_batches(Collator(step.kind)([row]), tokens=1, packed=step.packed)
    with torch.random.fork_rng([]), saved_tensors_hooks(note, lambda tensor: tensor), step.forward_context():
        token_losses(model, micro, step)
    of_token = sum(storage.nbytes() for storage in stored.values()) / micro.computed
    tokens, half = step.micro_batch_tokens, memory()[1] / 2
    while tokens > 1 and tokens * of_token > half:
        tokens //= 2
    if tokens < step.micro_batch_tokens:
        log.info("micro-batches of at most %d tokens: more would take over half of the free memory", tokens)
    return tokens


@dataclass
class MemoryProbe:
    """The measurements for one model.

    lengths: of the rows, in tokens. gauge: a CudaGauge. most_rows: of a step, on this rank. fixed_tokens: the
    configured micro-batch, None if it is free. checkpointing: as configured, None if it is free. state_bytes: of the
    optimizer for each trained number.
    """

    model: Any
    step: StepConfig
    rows: Sequence[Feature]
    lengths: Sequence[int]
    gauge: Any
    most_rows: int
    fixed_tokens: int | None = None
    checkpointing: bool | None = None
    state_bytes: int = 8
    time_limit: float = TIME_LIMIT

    def run(self) -> Measurement:
        """The fastest that leaves the margin; the model's weights, gradients and random state stay as they were.

        Raises EnvironmentProblem if not even one row, or not the configured micro-batch, fits.
        """
        on_cuda = torch.device(self.step.device).type == "cuda"
        results: list[Measurement] = []
        with torch.random.fork_rng([self.step.device] if on_cuda else []):
            for checkpointing in [False, True] if self.checkpointing is None else [self.checkpointing]:
                adapters.set_checkpointing(unwrap(self.model), checkpointing)
                result = self._search(checkpointing)
                results += [] if result is None else [result]
                if result is not None and self._fits(result) and result.tokens >= min(self._most, ENOUGH_TOKENS):
                    break
        release_memory()
        if not results:
            tokens, gib = self.fixed_tokens or max(self.lengths), self.gauge.total / 2**30
            raise EnvironmentProblem(
                f"{'one row' if self.fixed_tokens is None else 'a micro-batch'} of {tokens} tokens does not fit in"
                f" {gib:.1f} GiB",
                fix="lower model.max_seq_len or choose a smaller model; `make plan` shows what each saves",
            )
        best = max(results, key=lambda result: (self._fits(result), result.tokens_per_second))
        adapters.set_checkpointing(unwrap(self.model), best.checkpointing)
        return best

    @property
    def _most(self) -> int:
        """Tokens of the largest micro-batch to try."""
        longest = max(self.lengths)
        return self.fixed_tokens or longest * max(1, min(self.most_rows, MOST_TOKENS // longest))

    def _fits(self, result: Measurement) -> bool:
        return bool(result.peak_bytes <= self.gauge.total * (1 - MARGIN))

    def _search(self, checkpointing: bool) -> Measurement | None:
        """The best of doubled micro-batches: until memory or time ends, or speed stops growing. None if none fits.

        The smallest one is used even if it leaves no margin.
        """
        end = time.monotonic() + self.time_limit / 4
        tokens = self.fixed_tokens or max(self.lengths)
        best = self._measure(tokens, checkpointing)
        while best is not None and tokens < self._most and time.monotonic() < end:
            tokens = min(2 * tokens, self._most)
            larger = self._measure(tokens, checkpointing)
            if larger is None or not self._fits(larger):
                break
            if larger.tokens_per_second < WORTH_GROWING * best.tokens_per_second:
                break
            best = larger
        return best

    def _measure(self, tokens: int, checkpointing: bool) -> Measurement | None:
        """Forward and backward of the longest rows in one micro-batch, twice: the second time is measured.

        None if memory runs out.
        """
        release_memory()  # memory that a larger try left reserved would count here
        features = longest_batch(self.rows, self.lengths, tokens)
        batch = {name: tensor.to(self.step.device) for name, tensor in Collator(self.step.kind)(features).items()}
        real = sum(int(batch[name].sum()) for name in ("lengths", "source_lengths") if name in batch)
        step = replace(self.step, micro_batch_tokens=max(tokens, real))
        state: list[torch.Tensor] = []
        try:
            trained = [weight for weight in self.model.parameters() if weight.requires_grad]
            state += [weight.new_empty(weight.numel() * self.state_bytes, dtype=torch.uint8) for weight in trained]
            for _ in range(2):
                self.model.zero_grad(set_to_none=True)
                self.gauge.start()
                began = time.perf_counter()
                forward_backward(self.model, batch, step, replay=False)
                peak = self.gauge.peak()
            return Measurement(tokens, checkpointing, peak, real / (time.perf_counter() - began))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return None
        finally:
            state.clear()
            self.model.zero_grad(set_to_none=True)


def longest_batch(rows: Sequence[Feature], lengths: Sequence[int], tokens: int) -> list[Feature]:
    """The longest rows that fit into `tokens` tokens; at least one."""
    batch, left = list[Any](), tokens
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[index] > left:
            break
        batch.append(rows[index])
        left -= lengths[index]
    return batch
