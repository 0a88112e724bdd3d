"""How many tokens a micro-batch may have, by measuring: the longest rows through forward, backward and optimizer state.

`search` is given the measuring function, so that it is tested without a GPU; `measure_on` makes one for a real model.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sft.errors import EnvironmentProblem
from sft.step.microbatch import backward_window, out_of_memory

MARGIN = 0.1  # share of the device's memory that stays free: fragmentation, evaluation, whoever else is on the card
MOST_TOKENS = 4096  # speed has stopped growing by then
ENOUGH = 1.05  # a doubling that gains less than 5 % is not worth its memory
log = logging.getLogger("sft.memory")


@dataclass(frozen=True)
class Measured:
    """One micro-batch size, tried. peak_bytes: of the device, this process. seconds: of one forward and backward."""

    rows: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Found:
    """The micro-batch to train with: rows of the longest length, the tokens they are, and what was measured."""

    rows: int
    tokens: int
    tried: tuple[Measured, ...]


def search(
    measure: Callable[[int], Measured], *, length: int, most_rows: int, total_bytes: int, most_tokens: int = MOST_TOKENS
) -> Found:
    """Doubles the rows from 1 while they fit with a margin and tokens/s grows; halves the last stride on OOM.

    measure: runs `rows` rows of `length` tokens and may run out of memory. Raises EnvironmentProblem if one row does.
    """
    room, tried = total_bytes * (1 - MARGIN), list[Measured]()

    def attempt(rows: int) -> Measured | None:
        try:
            seen = measure(rows)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            seen = None
        if seen is None:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            log.info("%d rows of %d tokens: out of memory", rows, length)
            return None
        tried.append(seen)
        return seen if seen.peak_bytes <= room else None

    best = attempt(1)
    if best is None:
        if not tried:
            raise EnvironmentProblem(
                f"one row of {length} tokens does not fit in {total_bytes / 2**30:.1f} GiB",
                mend="lower model.max_seq_len or take a smaller model; `make plan` says what each saves",
            )
        best = tried[0]  # it fits, though without the margin
    cap = max(1, min(most_rows, most_tokens // length))
    stride = 1
    while best.rows + stride <= cap:
        seen = attempt(best.rows + stride)
        if seen is None:
            cap = best.rows + stride - 1
            stride = max(1, stride // 2)
            continue
        faster = seen.rows / seen.seconds >= ENOUGH * best.rows / best.seconds
        if not faster:
            break
        best, stride = seen, min(seen.rows, max(1, cap - seen.rows))
    return Found(best.rows, best.rows * length, tuple(tried))


def measure_on(model: Any, *, length: int, device: torch.device, apart: bool, **step: Any) -> Callable[[int], Measured]:
    """A measuring function for a CUDA model: all tokens labelled, twice, the second time with optimizer state there.

    AdamW's two fp32 moments are stood in for by tensors of their size; the model's weights, gradients (left clear) and
    random state are as before. step: `logits`, `tile`, `label_smoothing` of `backward_window`, and `backward`.
    """

    def measure(rows: int) -> Measured:
        ids = torch.arange(rows * length, device=device) % 100
        labels = ids.view(rows, length).clone()
        labels[:, 0] = -100
        batch = {"input_ids": ids, "labels": labels.flatten(), "lengths": torch.full((rows,), length)}
        with torch.random.fork_rng([device]):
            torch.cuda.reset_peak_memory_stats(device)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            moments = [torch.empty_like(parameter, dtype=torch.float32) for parameter in trained for _ in range(2)]
            try:
                started = 0.0
                for _ in range(2):
                    model.zero_grad(set_to_none=True)
                    torch.cuda.synchronize(device)
                    started = time.perf_counter()
                    settings = {"tokens": rows * length, "apart": apart, "replay": False, **step}
                    backward_window(model, batch, **settings)
                    torch.cuda.synchronize(device)
                return Measured(rows, torch.cuda.max_memory_reserved(device), time.perf_counter() - started)
            finally:
                moments.clear()
                model.zero_grad(set_to_none=True)

    return measure
