"""Going on after memory ran out: what is released, how a cut gets finer, how an optimizer's step is taken back."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sft.errors import EnvironmentProblem
from sft.step.window import MicroBatch

log = logging.getLogger("sft.step")


def out_of_memory(error: BaseException | None) -> bool:
    """Whether it means that memory ran out, on the card or (where the allocator says so) beside it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(
        text in said for text in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    )


def release() -> None:
    """Hands back what nobody uses any more. Call it outside of the `except`, whose traceback keeps tensors alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def finer(micros: Sequence[MicroBatch], tokens: int) -> int:
    """The budget for the next try: half of what was computed at once. Raises EnvironmentProblem at single rows."""
    shared = [micro.computed for micro in micros if len(micro.rows) > 1]
    if shared:
        return max(1, min(tokens, max(shared)) // 2)
    longest = max(micros, key=lambda micro: micro.computed)
    raise EnvironmentProblem(
        f"out of memory on a single row of {longest.computed} tokens: no finer cut is left",
        where=f"row {longest.rows[0]} of the step's window",
        mend="lower model.max_seq_len, set train.gradient_checkpointing=true, or lower train.logits_tile;"
        " `make plan` says what each saves",
    )


class CarefulOptimizer:
    """An optimizer whose step, when memory runs out in it, is taken back and taken once more; else it is as it was.

    Its first step is where it allocates its state; the weights are kept in the machine's memory for the time of it. A
    later step is taken again only if nothing was changed yet, which torch's own optimizers let us see; if something
    was, EnvironmentProblem is raised. on_retry: called before the second try.
    """

    def __init__(self, optimizer: Any, on_retry: Callable[[], None]) -> None:
        self.optimizer, self._on_retry = optimizer, on_retry

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)

    def step(self, closure: Any = None) -> None:
        before = _Before(getattr(self.optimizer, "optimizer", self.optimizer))
        try:
            self.optimizer.step(closure)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            before.put_back()
        else:
            return
        release()
        log.warning("out of memory in the optimizer's step: it is taken back and taken again")
        self._on_retry()
        self.optimizer.step(closure)


class _Before:
    """An optimizer as it was before a step: copies of the weights without state, the versions of everything else."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        taken = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.weights = {p: p.detach().to("cpu", copy=True) for p in taken if not optimizer.state.get(p)}
        self.standing = [p for p in taken if p not in self.weights]
        self.versions = self._versions()

    def put_back(self) -> None:
        ours = type(self.optimizer).__module__.startswith("torch.optim")
        if self.standing and not (ours and self.versions == self._versions()):
            raise EnvironmentProblem(
                "memory ran out in the middle of the optimizer's step, and part of the weights are changed already",
                mend="run the same command again: it goes on from the last checkpoint;"
                " --set train.optim=paged_adamw_8bit needs less",
            )
        for weight, kept in self.weights.items():
            self.optimizer.state.pop(weight, None)
            with torch.no_grad():
                weight.copy_(kept)

    def _versions(self) -> list[int]:
        state = (value for p in self.standing for value in self.optimizer.state[p].values())
        return [tensor._version for tensor in (*self.standing, *state) if isinstance(tensor, Tensor)]
