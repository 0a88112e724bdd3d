"""One training step: forward and backward of a step batch, evaluation loss, and recovery when memory runs out.

`StepConfig` says how a batch is computed. `forward_backward` splits the batch into micro-batches, leaves the gradient
of its mean loss on the model, and replays the step in smaller micro-batches when memory runs out; `evaluate_loss` does
the same for evaluation. Both return the config to use from then on, with the budget that fitted.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sft.config.schema import PREFERENCES, PreferenceSection, TrainSection
from sft.errors import EnvironmentProblem, one_line
from sft.model import kernels
from sft.model.adapters import unwrap
from sft.step import attention
from sft.step.batch import (
    IGNORED,
    Batch,
    Collator,
    Kind,
    MicroBatch,
    filler,
    loss_weight,
    row_indices,
    split_micro_batches,
)
from sft.step.loss import loss_dtype
from sft.step.objectives import OBJECTIVES, ObjectiveName
from sft.step.preferences import SUMS, PreferenceName, drift_sum, frozen, pair_losses, reference

log = logging.getLogger("sft.step")
EVALUATED_TOGETHER = 256  # rows that are split into micro-batches together when evaluating


@dataclass(frozen=True)
class StepConfig:
    """How a step batch is computed. All but `objective`, `label_smoothing`, `z_loss`, `neftune_alpha` and `preference`
    change memory and time, not the step.

    micro_batch_tokens: computed tokens of a micro-batch, padding included. max_rows: most rows of a micro-batch, None
    for any number. eval_tokens: the budget that evaluation was lowered to when memory ran out in it, else None.
    packed: rows share a sequence without padding (`attention.keeps_rows_apart`). logits_tile: positions of one tile of
    the chunked head. autocast: the 16-bit type to compute in, None for the weights' own. offload: activations wait in
    the machine's memory for the backward pass. lockstep: where weights are sharded, the largest of a number over all
    ranks, who run their forward and backward passes together; else None.
    """

    kind: Kind = "causal"
    device: str = "cpu"
    micro_batch_tokens: int = 4096
    max_rows: int | None = None
    packed: bool = False
    objective: ObjectiveName | PreferenceName = "response"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    neftune_alpha: float | None = None
    logits: Literal["chunked", "full"] = "chunked"
    logits_tile: int = 512
    autocast: torch.dtype | None = None
    offload: bool = False
    eval_tokens: int | None = None
    preference: PreferenceSection = field(default_factory=PreferenceSection)
    lockstep: Callable[[int], int] | None = None

    @property
    def budget(self) -> list[Any]:
        """What decides how a batch is split: tokens, rows, packed or padded."""
        return [self.micro_batch_tokens, self.max_rows, self.packed]

    def in_lockstep(self, micros: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches, with fillers up to the number of the rank that has most where weights are sharded."""
        if self.lockstep is None:
            return micros
        missing = self.lockstep(len(micros)) - len(micros)
        paired, rated = self.objective in PREFERENCES, self.objective == "kto"
        return micros + [filler(self.kind, self.device, packed=self.packed, paired=paired, rated=rated)] * missing

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        """The precision of a forward pass, and where its activations wait; not for the backward pass."""
        precision = torch.autocast(
            torch.device(self.device).type, dtype=self.autocast, enabled=self.autocast is not None
        )
        with precision, offload_activations() if self.offload else contextlib.nullcontext():
            yield


def compute_dtype(train: TrainSection) -> torch.dtype:
    """The 16-bit type that the resolved config computes in, else fp32."""
    if train.bf16 is True:
        return torch.bfloat16
    return torch.float16 if train.fp16 is True else torch.float32


def make_step_config(
    train: TrainSection, model: nn.Module, kind: Kind, device: str, *, max_rows: int | None = None
) -> StepConfig:
    """The step's settings out of a resolved config. max_rows: `batch_size` where the user gave it."""
    dtype = compute_dtype(train)
    return StepConfig(
        kind=kind,
        device=device,
        micro_batch_tokens=int(train.micro_batch_tokens),
        max_rows=max_rows,
        packed=kind == "causal" and attention.keeps_rows_apart(model),
        objective=train.objective,
        label_smoothing=train.label_smoothing,
        z_loss=train.z_loss,
        neftune_alpha=train.neftune_alpha,
        logits=train.logits,
        logits_tile=train.logits_tile,
        autocast=None if dtype == torch.float32 else dtype,
        offload=train.activation_offload and device != "cpu",
        preference=train.preference,
    )


class StepResult(NamedTuple):
    """loss: mean loss of the batch, a detached scalar. config: to use from here on. measures: the sums that
    `preferences.means` takes, [SUMS]; zeros without preferences.
    """

    loss: Tensor
    config: StepConfig
    measures: Tensor


@dataclass(frozen=True)
class EvaluationLoss:
    """row_sums: each row's loss summed over its labelled tokens, fp64 [R]; row_counts: its labelled tokens, int64 [R].

    Both on the CPU, in the order of the rows; a pair has one loss. config: to use from here on. measures: as in
    StepResult, fp64.
    """

    row_sums: Tensor
    row_counts: Tensor
    config: StepConfig
    measures: Tensor

    @property
    def loss_sum(self) -> float:
        return float(self.row_sums.sum())

    @property
    def count(self) -> int:
        return int(self.row_counts.sum())


def token_losses(model: nn.Module, micro: MicroBatch, config: StepConfig) -> Tensor:
    """The objective's weighted loss of each labelled token of a micro-batch, [N] in fp32 (fp64 for a model in fp64);
    of pairs one loss each.
    """
    if micro.counts:
        return pair_losses(model, micro, config).losses
    return OBJECTIVES[config.objective](model, micro, config)  # type: ignore[index]


def forward_backward(
    model: nn.Module,
    batch: Batch,
    config: StepConfig,
    *,
    normalizer: int | float | Tensor | None = None,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
    replay: bool = True,
    reduce: Callable[[Tensor], Tensor] = torch.Tensor.detach,
) -> StepResult:
    """Forward and backward of a whole step batch; leaves the gradient of its mean loss on the model.

    normalizer: `loss_weight` of the batch over all ranks; that of this batch by default. backward: for example
    `accelerator.backward`. replay: False lets an out-of-memory error through, as sharded weights do: other ranks wait
    in the middle of the step. reduce: a sum over all ranks, for kto. The batch is empty for a rank without rows.
    Gradients must be clear at the start: when memory runs out, all of them are dropped and formed again, with the same
    random numbers, in smaller micro-batches. Raises EnvironmentProblem if a single row does not fit.
    """
    normalizer = loss_weight(batch) if normalizer is None else normalizer
    device = batch["labels"].device if batch else next(model.parameters()).device
    random_state, gpu_state = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    drift = None if config.objective == "kto" else torch.zeros(())
    while True:
        micros = [micro for micro in _split(batch, config, config.micro_batch_tokens) if micro.labelled]
        micros = config.in_lockstep(micros)
        try:
            if drift is None:
                drift = (reduce(drift_sum(model, batch, config)) / normalizer).clamp(min=0)
            loss, measures = _accumulate(model, micros, config, normalizer, backward, drift)
            return StepResult(loss, config, measures)
        except (RuntimeError, MemoryError) as error:
            memory = out_of_memory(error)
            if memory and config.lockstep is not None:
                raise _cannot_repeat(micros, config) from error
            if not (replay and (memory or kernels.compiler_failed(error))):
                raise
            message = one_line(error, 200)
        model.zero_grad(set_to_none=True)
        release_memory()
        torch.set_rng_state(random_state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, device)
        if memory:
            tokens = smaller_budget(micros, config.micro_batch_tokens)
            config = replace(config, micro_batch_tokens=tokens)
            log.warning("out of memory: replaying this step in micro-batches of at most %d tokens", tokens)
        else:
            kernels.restore_plain_layers(model)
            log.warning("torch.compile failed: replaying this step with plain layers (%s)", message)


def _cannot_repeat(micros: Sequence[MicroBatch], config: StepConfig) -> EnvironmentProblem:
    return EnvironmentProblem(
        "memory ran out on a rank, and where ranks share the weights it cannot repeat the step alone",
        where=f"micro-batches of at most {config.micro_batch_tokens} tokens",
        fix=f"--set train.micro_batch_tokens={smaller_budget(micros, config.micro_batch_tokens)}",
    )


def _split(batch: Batch, config: StepConfig, tokens: int) -> list[MicroBatch]:
    return split_micro_batches(batch, tokens=tokens, rows=config.max_rows, packed=config.packed) if batch else []


def evaluate_loss(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    config: StepConfig,
    reduce: Callable[[Tensor], Tensor] = torch.Tensor.detach,
) -> EvaluationLoss:
    """The cross-entropy of rows `{"input_ids", "labels"}` without gradients, whatever the objective is; each label
    counts 1. Of pairs the objective's loss.

    reduce: a sum over all ranks, for the drift of kto, which is that of all their rows. Leaves the model's training
    mode as it is. When memory runs out, goes on in smaller micro-batches. Raises EnvironmentProblem if a single row
    does not fit.
    """
    drift = 0.0
    if config.objective == "kto" and all("rating" in row for row in rows):
        drift, config = _evaluated_drift(model, rows, config, reduce)
    sums, counts = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.long)
    sizes = [(len(row["input_ids"]), len(row["labels"])) for row in rows]
    order = sorted(range(len(rows)), key=sizes.__getitem__)
    collate, start, measures = Collator(config.kind), 0, torch.zeros(SUMS, dtype=torch.float64)
    plain = replace(config, objective="response", label_smoothing=0.0, z_loss=0.0)
    while (config.lockstep or int)(len(order) - start):
        chosen = order[start : start + EVALUATED_TOGETHER]
        features = [rows[i] for i in chosen]
        batch = {name: tensor.to(config.device) for name, tensor in collate(features).items()} if features else {}
        batch.pop("weights", None)
        tokens = min(config.eval_tokens or config.micro_batch_tokens, config.micro_batch_tokens)
        micros = config.in_lockstep(_split(batch, config, tokens))
        try:
            settings = plain if batch and "ratings" not in batch else config
            sums[chosen], counts[chosen], more = _evaluate_batch(model, batch, micros, settings, drift)
            measures += more
            start += len(chosen)
            continue
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if config.lockstep is not None:
                raise _cannot_repeat(micros, config) from error
        release_memory()
        config = replace(config, eval_tokens=smaller_budget(micros, tokens))
        log.warning("out of memory in evaluation: continuing in micro-batches of at most %d tokens", config.eval_tokens)
    return EvaluationLoss(sums, counts, config, measures)


def _evaluated_drift(
    model: nn.Module, rows: Sequence[Mapping[str, Any]], config: StepConfig, reduce: Callable[[Tensor], Tensor]
) -> tuple[float, StepConfig]:
    """kto's drift from the reference over all rated rows: the mean log-ratio of their other answers, at least 0."""
    others = [{key: row[key][row["chosen"] :] for key in ("input_ids", "labels")} for row in rows]
    plain = replace(config, objective="response")
    with frozen(model):
        result = evaluate_loss(model, others, plain)
    with reference(model):
        before = evaluate_loss(model, others, result.config)
    sums = torch.tensor([before.loss_sum - result.loss_sum, len(rows)], dtype=torch.float64, device=config.device)
    total, count = reduce(sums).tolist()
    return max(0.0, total / max(1.0, count)), replace(before.config, objective="kto")


def _accumulate(
    model: nn.Module,
    micros: Sequence[MicroBatch],
    config: StepConfig,
    normalizer: int | float | Tensor,
    backward: Callable[[Tensor], object],
    drift: Tensor,
) -> tuple[Tensor, Tensor]:
    """Adds the gradients of all micro-batches; returns their loss, divided by the normalizer, and summed measures."""
    parameter = next(model.parameters())
    device = micros[0].targets.device if micros else parameter.device  # offloaded weights are elsewhere
    total = torch.zeros((), dtype=loss_dtype(parameter.dtype), device=device)
    measures = total.new_zeros(SUMS)
    for micro in micros:
        with config.forward_context(), noisy_embeddings(model, micro, config.neftune_alpha):
            if micro.counts:
                losses, measured = pair_losses(model, micro, config, drift)
                measures = measures + (measured.sum(0) if micro.rows else 0)
            else:
                losses = token_losses(model, micro, config)
            loss = losses.sum() / normalizer if micro.rows else losses.sum() * 0
            del losses
        backward(loss)
        total = total + loss.detach()
        del loss
    return total, measures


@torch.no_grad()
def _evaluate_batch(
    model: nn.Module, batch: Batch, micros: Sequence[MicroBatch], config: StepConfig, drift: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's summed loss, fp64 [R], its number of labelled tokens, int64 [R], and the sums of the pairs' measures,
    on the CPU.
    """
    rows = len(batch.get("ratings", batch.get("lengths", ())))
    sums, counts = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.long)
    measures = torch.zeros(SUMS, dtype=torch.float64)
    for micro in micros:
        with config.forward_context():
            if micro.counts:
                losses, measured = pair_losses(model, micro, config, drift)
                if not micro.rows:
                    continue
                compared = list(micro.rows) if micro.ratings else [row // 2 for row in micro.rows[::2]]
                sums[compared], counts[compared] = losses.double().cpu(), 1
                measures += measured.double().cpu().sum(0)
                continue
            losses = token_losses(model, micro, config)
        if not micro.rows:
            continue
        indices = row_indices(micro, batch)[micro.targets != IGNORED].cpu()
        sums.index_add_(0, indices, losses.double().cpu())  # on the CPU, where the order of additions is fixed
        counts += indices.bincount(minlength=rows)
    return sums, counts, measures


def out_of_memory(error: BaseException | None) -> bool:
    """Whether the error means that memory ran out, on the GPU or (where the allocator reports it) on the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error)
    texts = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(text in message for text in texts)


def release_memory() -> None:
    """Frees unused memory. Call it outside of the `except` block, whose traceback keeps tensors alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller_budget(micros: Sequence[MicroBatch], tokens: int) -> int:
    """The token budget for the next try: half of the largest micro-batch. Raises EnvironmentProblem at single rows."""
    shared = [micro.computed for micro in micros if len(micro.rows) > (2 if micro.counts and not micro.ratings else 1)]
    if shared:
        return max(1, min(tokens, max(shared)) // 2)
    longest = max(micros, key=lambda micro: micro.computed)
    raise EnvironmentProblem(
        f"out of memory on a single row of {longest.computed} tokens, which cannot be split",
        where=f"row {longest.rows[0]} of the step's batch",
        fix="lower model.max_seq_len, set train.gradient_checkpointing=true, or lower train.logits_tile;"
        " `make plan` shows what each saves",
    )


def optimizer_step(optimizer: Any, on_retry: Callable[[], None]) -> None:
    """`optimizer.step()`; if the first step, which allocates the state, runs out of memory, restores the weights and
    retries once.

    For its duration a copy of the weights waits in the machine's memory. Raises EnvironmentProblem if a later step
    runs out of memory, which may have changed part of the weights. on_retry: called before the second try.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    weights = [weight for group in inner.param_groups for weight in group["params"] if weight.grad is not None]
    first = not any(inner.state.get(weight) for weight in weights)
    copies = [weight.detach().to("cpu", copy=True) for weight in weights if first]
    try:
        optimizer.step()
        return
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if not first:
            raise EnvironmentProblem(
                "memory ran out in the middle of the optimizer's step, and part of the weights may have changed",
                fix="run the same command again: it resumes from the last checkpoint;"
                " --set train.optim=paged_adamw_8bit needs less memory",
            ) from error
    inner.state.clear()
    with torch.no_grad():
        for weight, copy in zip(weights, copies, strict=True):
            weight.copy_(copy)
    release_memory()
    log.warning("out of memory in the optimizer's step: the weights are restored and the step is retried")
    on_retry()
    optimizer.step()


@contextlib.contextmanager
def noisy_embeddings(model: nn.Module, micro: MicroBatch, alpha: float | None) -> Iterator[None]:
    """NEFTune (Jain et al., 2023): uniform noise in +-alpha / sqrt(L * d) on the embeddings of a row of L tokens, width
    d, where gradients are formed. L is the row's own length, packed or padded; of an encoder-decoder, the source's.
    """
    if alpha is None:
        yield
        return
    ids, mask = micro.inputs["input_ids"], micro.inputs.get("attention_mask")
    if mask is not None:
        lengths = mask.sum(1, keepdim=True)
    else:
        rows = (micro.inputs["position_ids"] == 0).cumsum(1) - 1
        lengths = rows.flatten().bincount()[rows]

    def add_noise(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if inputs[0].data_ptr() != ids.data_ptr() or not torch.is_grad_enabled():  # a decoder's own tokens
            return output
        size = alpha / (lengths * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * size[..., None].to(output.dtype)

    embedding: Any = unwrap(model).get_input_embeddings()  # type: ignore[operator]
    hook = embedding.register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()


SMALL = 2**20  # bytes: smaller tensors stay on the GPU, where the transfer would cost more than they do
MOST_GAPS = 1.25  # a tensor whose strides span more than this times its numbers is stored without its strides


def offload_activations() -> saved_tensors_hooks:
    """A context in which tensors saved for the backward pass leave the GPU for pinned memory until they are needed.

    As `torch.autograd.graph.save_on_cpu`, but weights stay on the GPU, and strides are restored: attention kernels need
    the padding of a mask's rows, and an expanded mask is stored once. The same bits come back. Strides that span much
    more than the numbers do (half of a fused projection) are dropped.
    """

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, torch.Size, Tensor]:
        once = tensor[tuple(slice(None) if step else slice(0, 1) for step in tensor.stride())]
        if stays_on_gpu(tensor) or stays_on_gpu(once):
            return tensor
        span = 1 + sum((size - 1) * step for size, step in zip(once.shape, once.stride(), strict=True))
        like = once if once.numel() <= span <= MOST_GAPS * once.numel() else torch.empty(once.shape, device="meta")
        stored = torch.empty_strided(once.shape, like.stride(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, tensor.shape, stored.copy_(once, non_blocking=tensor.is_cuda)

    def unpack(packed: Tensor | tuple[torch.device, torch.Size, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, shape, stored = packed
        tensor = torch.empty_strided(stored.shape, stored.stride(), dtype=stored.dtype, device=device)
        return tensor.copy_(stored, non_blocking=True).expand(shape)

    return saved_tensors_hooks(pack, unpack)


def stays_on_gpu(tensor: Tensor) -> bool:
    """Whether offloading leaves the tensor where it is: weights, and small tensors."""
    whole = tensor if tensor._base is None else tensor._base
    return isinstance(whole, nn.Parameter) or tensor.numel() * tensor.element_size() < SMALL
