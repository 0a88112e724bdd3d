"""Going on after memory ran out: what is released, how a cut gets finer, how an optimizer's step is taken back."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sft.errors import EnvironmentProblem
from sft.model import kernels
from sft.step import attention, unwrap
from sft.step.batch import IGNORED, Batch, MicroBatch, count_labels, split_micro_batches
from sft.step.loss import chunked_loss, full_loss, wide

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
        fix="lower model.max_seq_len, set train.gradient_checkpointing=true, or lower train.logits_tile;"
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
                fix="run the same command again: it goes on from the last checkpoint;"
                " --set train.optim=paged_adamw_8bit needs less",
            )
        for weight, kept in self.weights.items():
            self.optimizer.state.pop(weight, None)
            with torch.no_grad():
                weight.copy_(kept)

    def _versions(self) -> list[int]:
        state = (value for p in self.standing for value in self.optimizer.state[p].values())
        return [tensor._version for tensor in (*self.standing, *state) if isinstance(tensor, Tensor)]


SMALL = 2**20  # bytes: what is smaller stays, for it is not worth the way
GAPS = 1.25  # times the room of the numbers that strides may take up and still be kept


def offloading() -> saved_tensors_hooks:
    """A context in which what autograd keeps leaves a GPU for pinned memory, and comes back when it is needed.

    As `torch.autograd.graph.save_on_cpu`, but that weights stay, which are on the GPU anyway, and strides come back:
    attention's kernels want the padding of a mask's rows, and an expanded mask is kept once. The same bits come back.
    Strides that take up much more room than the numbers do (half of a fused projection) are not kept.
    """

    def away(tensor: Tensor) -> Tensor | tuple[torch.device, torch.Size, Tensor]:
        once = tensor[tuple(slice(None) if step else slice(0, 1) for step in tensor.stride())]
        if stays(tensor) or stays(once):
            return tensor
        spans = 1 + sum((size - 1) * step for size, step in zip(once.shape, once.stride(), strict=True))
        like = once if once.numel() <= spans <= GAPS * once.numel() else torch.empty(once.shape, device="meta")
        kept = torch.empty_strided(once.shape, like.stride(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, tensor.shape, kept.copy_(once, non_blocking=tensor.is_cuda)

    def back(found: Tensor | tuple[torch.device, torch.Size, Tensor]) -> Tensor:
        if isinstance(found, Tensor):
            return found
        device, shape, kept = found
        there = torch.empty_strided(kept.shape, kept.stride(), dtype=kept.dtype, device=device)
        return there.copy_(kept, non_blocking=True).expand(shape)

    return saved_tensors_hooks(away, back)


def stays(tensor: Tensor) -> bool:
    """Whether it is left on the GPU: weights, and what is small."""
    whole = tensor if tensor._base is None else tensor._base
    return isinstance(whole, nn.Parameter) or tensor.numel() * tensor.element_size() < SMALL


Logits = Literal["chunked", "full"]


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
    count = count_labels(batch) if normaliser is None else normaliser
    state = _random_state(batch["labels"].device)
    while True:
        micros = [
            micro for micro in split_micro_batches(batch, tokens=tokens, rows=rows, apart=apart) if micro.labelled
        ]
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
