"""One micro-batch's loss, and the whole window's forward and backward.

The gradient of a window is that of its mean loss over labelled tokens, however it is cut: every micro-batch adds its
sum of losses divided by the same normaliser. So when memory runs out, the gradients formed so far are dropped, the
random state is put back, and the same rows are replayed in finer micro-batches; plainly, where the compiler failed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sft.model import kernels
from sft.step import attention, unwrap
from sft.step.head import chunked_loss, full_loss
from sft.step.losses import wide
from sft.step.recovery import finer, out_of_memory, release
from sft.step.window import IGNORED, Batch, MicroBatch, cut, labelled

__all__ = ["Logits", "backward_window", "loss_sum", "out_of_memory"]
Logits = Literal["chunked", "full"]
log = logging.getLogger("sft.step")


def loss_sum(
    model: nn.Module, micro: MicroBatch, *, logits: Logits = "chunked", tile: int = 512, label_smoothing: float = 0.0
) -> tuple[Tensor, int]:
    """The sum of cross-entropy over the micro-batch's labelled tokens (fp32 scalar), and how many there are.

    Under no_grad this is the evaluation loss; `logits` and `tile` change memory and time, never the value.
    """
    inputs: dict[str, Any] = dict(micro.inputs)
    if micro.seq2seq:
        inputs["decoder_input_ids"] = _decoder_inputs(unwrap(model), micro.targets)
    if logits == "full":
        return full_loss(model, inputs, micro.targets, label_smoothing), micro.labelled
    return chunked_loss(model, inputs, micro.targets, tile=tile, smoothing=label_smoothing), micro.labelled


def backward_window(
    model: nn.Module,
    batch: Batch,
    *,
    tokens: int,
    rows: int | None = None,
    apart: bool | None = None,
    normaliser: int | float | Tensor | None = None,
    backward: Callable[[Tensor], object] | None = None,
    logits: Logits = "chunked",
    tile: int = 512,
    label_smoothing: float = 0.0,
    on_budget: Callable[[int], None] | None = None,
    replay: bool = True,
) -> Tensor:
    """Forward and backward of a whole window; leaves its gradients on the model and returns its mean loss, detached.

    tokens, rows: the budget of a micro-batch. apart: None asks the model (`attention.keeps_rows_apart`). normaliser:
    labelled tokens of the window over all ranks, this window's own by default. backward: e.g. accelerator.backward.
    on_budget: told the new token budget when memory ran out and it was lowered; keep it for the windows to come.
    replay: False lets the error through when memory runs out (a probe wants to know).
    Gradients must be clear at the start: when memory runs out, all of them are dropped and formed again.
    Raises EnvironmentProblem if a single row does not fit.
    """
    apart = attention.keeps_rows_apart(model) if apart is None else apart
    count = labelled(batch) if normaliser is None else normaliser
    state = _random_state(batch["labels"].device)
    while True:
        micros = [micro for micro in cut(batch, tokens=tokens, rows=rows, apart=apart) if micro.labelled]
        try:
            return _run(model, micros, count, backward or torch.Tensor.backward, logits, tile, label_smoothing)
        except (RuntimeError, MemoryError) as error:
            short = out_of_memory(error)
            if not (replay and (short or kernels.compiler_failed(error))):
                raise
            said = " ".join(str(error).split())[:200]
        model.zero_grad(set_to_none=True)
        release()
        _put_back(state, batch["labels"].device)
        if not short:
            kernels.give_back(model)
            log.warning("torch.compile failed: this step is replayed, and layers are computed plainly (%s)", said)
            continue
        tokens = finer(micros, tokens)
        log.warning("out of memory: this step is replayed in micro-batches of at most %d tokens", tokens)
        if on_budget is not None:
            on_budget(tokens)


def _run(
    model: nn.Module,
    micros: list[MicroBatch],
    count: int | float | Tensor,
    backward: Callable[[Tensor], object],
    logits: Logits,
    tile: int,
    smoothing: float,
) -> Tensor:
    total: Tensor | None = None
    for index, micro in enumerate(micros):
        quiet = getattr(model, "no_sync", None) if index + 1 < len(micros) else None
        with quiet() if quiet is not None else contextlib.nullcontext():
            loss, _ = loss_sum(model, micro, logits=logits, tile=tile, label_smoothing=smoothing)
            loss = loss / count
            backward(loss)
        total = loss.detach() if total is None else total + loss.detach()
        del loss
    if total is None:
        parameter = next(model.parameters())
        return torch.zeros((), dtype=wide(parameter.dtype), device=parameter.device)
    return total


def _decoder_inputs(base: nn.Module, labels: Tensor) -> Tensor:
    """The target shifted right behind the model's start token, [B, L], as seq2seq models are taught."""
    make = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if callable(make):
        made: Tensor = make(labels=labels)
        return made
    config: Any = base.config
    pad = config.pad_token_id or 0
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else pad
    shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, pad)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _put_back(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
