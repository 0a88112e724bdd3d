"""How layers are computed: plainly, by Liger's kernels, or compiled. A way is proven on the model before it serves.

The proof is a forward and a backward of two short rows, kept apart as the run keeps them, plainly and then the other
way with the same dropout: the loss and the gradients of what is trained must agree, relative to their size within SAME.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from sft.errors import EnvironmentProblem
from sft.memory.probe import ENOUGH, Measured
from sft.model import kernels
from sft.model.kernels import Way
from sft.step import unwrap
from sft.step.batch import Collator
from sft.step.step import StepConfig, forward_backward, out_of_memory, release_memory

# rounding makes 2e-7 of two layers in fp32, 1e-3 in fp16, 8 times that in bf16; more, as a root, of more layers
SAME = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
LONG = 1800.0  # seconds that a run must take for the compiler, whose start takes about a minute, to be tried
SEEN = 1 << 16  # numbers of each weight's gradient that are compared
ROWS = (list(range(3, 10)), list(range(14, 2, -1)))
log = logging.getLogger("sft.training")
T = TypeVar("T")


def ask(model: Any, way: Way, config: StepConfig, *, backend: str = "bnb", found: bool = False) -> None:
    """The way that the config asks for, or that was found before. Where it cannot serve, it is plain, and said.

    Raises EnvironmentProblem where the config asks for Liger and it cannot serve.
    """
    own = backend == "unsloth" and way != kernels.PLAIN
    reason = "unsloth has kernels of its own" if own else take(model, way, config)
    if reason is None:
        return
    if way == kernels.LIGER and not found:
        raise EnvironmentProblem(
            f"Liger's kernels cannot be used: {reason}", where="train.kernels", fix="--set train.kernels=auto"
        )
    log.warning("layers were to be %s, but %s: they are computed plainly", way, reason)


def take(model: Any, way: Way, config: StepConfig) -> str | None:
    """Computes layers this way from here on if it is proven, else plainly; returns what stood against it."""
    if way == kernels.way_of(model):
        return None
    kernels.give_back(model)
    reason = None if way == kernels.PLAIN else kernels.why_not(unwrap(model), way, device=config.device)
    if reason is None and way != kernels.PLAIN:
        reason = _prove(model, way, config)
        release_memory()
    return reason


def fastest(
    model: Any, config: StepConfig, wanted: Sequence[Way], measure: Callable[[], Measured | None], run_tokens: float
) -> Measured | None:
    """Tries the ways; leaves the model in the one that is fastest, by more than chance. None where nothing was tried.

    measure: a step the way it is computed now, None where it cannot be. run_tokens: of the whole run, on this rank.
    """
    best = measure() if wanted else None
    if best is None:
        return None
    for way in wanted:
        if way == kernels.COMPILED and run_tokens / best.speed < LONG:
            continue
        before = kernels.way_of(model)
        reason = take(model, way, config)
        if reason is None:
            seen = measure()
            failed = "it does not fit, or the compiler fails" if way == kernels.COMPILED else "it does not fit"
            reason = failed if seen is None else f"{seen.speed / best.speed:.2f} times as fast as {before}"
            if seen is not None and seen.speed >= ENOUGH * best.speed:
                log.info("layers are computed %s: %s", way, reason)
                best = seen
                continue
        log.info("layers are not computed %s: %s", way, reason)
        kernels.take(model, before)
    return best


def or_plainly(model: Any, act: Callable[[], T]) -> T:
    """What comes of `act`; of a second try with plain layers, which then stay, where the compiler fails in it."""
    try:
        return act()
    except RuntimeError as error:
        if kernels.way_of(model) != kernels.COMPILED or out_of_memory(error) or not kernels.compiler_failed(error):
            raise
        said = " ".join(str(error).split())[:200]
    kernels.give_back(model)
    release_memory()
    log.warning("torch.compile failed: layers are computed plainly from here on (%s)", said)
    return act()


def _prove(model: Any, way: Way, config: StepConfig) -> str | None:
    """Takes it; gives it back where it fails or differs, and says how."""
    plain = _loss_and_gradients(model, config)
    try:
        kernels.take(model, way)
        if kernels.way_of(model) != way:
            return "this model has no layers that it could serve"
        pairs = zip(_loss_and_gradients(model, config), plain, strict=True)
        off = float(torch.stack([(found - expected).norm() / expected.norm() for found, expected in pairs]).max())
    except Exception as error:  # a compiler, a kernel or a driver raises anything
        kernels.give_back(model)
        model.zero_grad(set_to_none=True)
        return f"it fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    dtype = config.autocast or next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    if off <= SAME[dtype]:
        return None
    kernels.give_back(model)
    return f"it is not equal: loss or gradients are {off:.1e} off, and {SAME[dtype]:.0e} is allowed in {dtype}"


def _loss_and_gradients(model: Any, config: StepConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the two rows: the loss, and the first numbers of each trained weight's gradient, in one row on the CPU."""
    device = torch.device(config.device)
    rows = [{"id": "", "input_ids": ids, "labels": list(ids)} for ids in ROWS]
    batch = {name: tensor.to(device) for name, tensor in Collator(config.kind)(rows).items()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        loss, _ = forward_backward(model, batch, replace(config, micro_batch_tokens=64, max_rows=None), replay=False)
    grads = [weight.grad.flatten()[:SEEN].double().cpu() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss.double().cpu(), torch.cat(grads)
