"""The device that `gpu.py` measures, and training steps of our own on it."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from typing import Any

GIB = 2**30
CONTEXT = 0.6  # GiB of a card that tensors cannot use: the driver's context


class Bench:
    """The device, a time limit, and training steps of our own on it."""

    def __init__(self, device: str, *, tiny: bool) -> None:
        import torch

        self.torch, self.device, self.tiny, self.cuda = torch, device, tiny, device == "cuda"
        self.until = time.monotonic()
        self.total = torch.cuda.get_device_properties(0).total_memory if self.cuda else 0
        self.save: Callable[[dict[str, Any]], object] = lambda _: None  # called with what a section has measured so far
        self.plans: list[Any] = []

    def start(self, minutes: float) -> None:
        self.until = time.monotonic() + 60 * minutes

    def seconds(self) -> float:
        """Seconds until the time limit."""
        return max(0.0, self.until - time.monotonic())

    def workspaces(self) -> float:
        """GiB of cuBLAS beside every model: one workspace for the forward pass, one for autograd's thread."""
        if not self.cuda:
            return 0.0
        matrix = self.torch.ones(64, 64, device="cuda", dtype=self.torch.bfloat16, requires_grad=True)
        (matrix @ matrix).sum().backward()
        del matrix
        self.clear()
        return float(self.torch.cuda.memory_allocated() / GIB)

    def has_time(self) -> bool:
        return time.monotonic() < self.until

    def cap(self, gib: float | None) -> None:
        """Limits the process to this many GiB; None removes the limit."""
        self.clear()
        if self.cuda:
            share = 1.0 if gib is None else min(1.0, gib * GIB / self.total)
            self.torch.cuda.set_per_process_memory_fraction(share)

    def clear(self) -> None:
        gc.collect()
        if self.cuda:
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def now(self) -> float:
        if self.cuda:
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def peaks(self) -> dict[str, float | None]:
        if not self.cuda:
            return {"allocated_gib": None, "reserved_gib": None}
        cuda = self.torch.cuda
        return {
            "allocated_gib": round(cuda.max_memory_allocated() / GIB, 3),
            "reserved_gib": round(cuda.max_memory_reserved() / GIB, 3),
        }

    def optimizer(self, model: Any) -> Any:
        trained = [p for p in model.parameters() if p.requires_grad]
        return self.torch.optim.AdamW(trained, lr=1e-4, fused=self.cuda)

    def step(self, model: Any, optimizer: Any, batch: Any, tokens: int, **settings: Any) -> tuple[float, float, int]:
        """(seconds, gradient norm, micro-batch tokens that fit) of one step. settings: `replay`, or StepConfig's."""
        from sft.step import attention
        from sft.step.step import StepConfig, forward_backward

        replay, packed = settings.pop("replay", True), attention.keeps_rows_apart(model)
        how = {"device": self.device, "packed": packed, "autocast": self.torch.bfloat16, **settings}
        batch, began = {key: value.to(self.device) for key, value in batch.items()}, self.now()
        result = forward_backward(model, batch, StepConfig(micro_batch_tokens=tokens, **how), replay=replay)
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = float(self.torch.nn.utils.clip_grad_norm_(trained, 1.0))
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return self.now() - began, norm, result.config.micro_batch_tokens


def step_batch(lengths: list[int], *, vocabulary: int = 2000, labelled: float = 1.0) -> Any:
    """Rows of these lengths; the last share of each is labelled."""
    from sft.step.batch import Collator

    rng, rows = random.Random(0), []
    for length in lengths:
        ids = [rng.randrange(vocabulary) for _ in range(length)]
        prompt = round(length * (1 - labelled))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Collator("causal")(rows)
