"""How many tokens a micro-batch may have, by measuring; what measures is given (`training.rehearsal` for a run)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from sft.errors import EnvironmentProblem
from sft.step.step import out_of_memory, release_memory

MARGIN = 0.1  # share of the device's memory that stays free: fragmentation, evaluation, whoever else is on the card
MOST_TOKENS = 4096  # speed has stopped growing by then
ENOUGH = 1.05  # a doubling that gains less than 5 % is not worth its memory
log = logging.getLogger("sft.memory")


class DoesNotFitError(EnvironmentProblem):
    """Not even one row fits into memory."""


class Gauge(Protocol):
    """How the device's memory is read. Bytes."""

    total: int

    def start(self) -> None: ...
    def peaks(self) -> tuple[int, int]: ...  # since `start`: of tensors, and held by the allocator


class CudaGauge:
    """The process's own memory on its GPU, within `set_per_process_memory_fraction`'s cap where there is one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        free, total = torch.cuda.mem_get_info(device)
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
        self.total = int(min(share * total, free + torch.cuda.memory_reserved(device)))  # what others hold is not ours

    def start(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> tuple[int, int]:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)


@dataclass(frozen=True)
class Measured:
    """One micro-batch size, tried. peak_bytes: of the device, this process. seconds: of one forward and backward.

    tokens: real ones that were computed, 0 where only rows were counted. allocated_bytes: of tensors alone.
    """

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
class Found:
    """The micro-batch to train with: rows of the longest length, the tokens they are, and what was measured."""

    rows: int
    tokens: int
    tried: tuple[Measured, ...]
    best: Measured


def search(
    measure: Callable[[int], Measured],
    *,
    length: int,
    most_rows: int,
    total_bytes: int,
    most_tokens: int = MOST_TOKENS,
    time_left: Callable[[], bool] = lambda: True,
) -> Found:
    """Doubles the rows from 1 while they fit with a margin and tokens/s grows; halves the last stride on OOM.

    measure: runs `rows` rows of `length` tokens and may run out of memory. time_left: asked before each further try.
    Raises DoesNotFitError if one row runs out of memory.
    """
    room, cap = total_bytes * (1 - MARGIN), max(1, min(most_rows, most_tokens // length))
    best = _attempt(measure, 1, length)  # it is taken even where it fits without the margin
    if best is None:
        raise DoesNotFitError(
            f"one row of {length} tokens does not fit in {total_bytes / 2**30:.1f} GiB",
            fix="lower model.max_seq_len or take a smaller model; `make plan` says what each saves",
        )
    tried, stride = [best], 1
    while best.rows + stride <= cap and time_left():
        seen = _attempt(measure, best.rows + stride, length)
        tried += [seen] if seen is not None else []
        if seen is None or seen.peak_bytes > room:
            cap = best.rows + stride - 1
            stride = max(1, stride // 2)
            continue
        if seen.speed < ENOUGH * best.speed:
            break
        best, stride = seen, min(seen.rows, max(1, cap - seen.rows))
    return Found(best.rows, best.rows * length, tuple(tried), best)


def _attempt(measure: Callable[[int], Measured], rows: int, length: int) -> Measured | None:
    """What was measured; None where memory ran out."""
    try:
        return measure(rows)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    release_memory()  # the error, and what its frames held, are gone
    log.info("%d rows of %d tokens: out of memory", rows, length)
    return None
