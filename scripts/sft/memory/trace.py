"""The peak memory of a training step, an evaluation or a generation, from shapes alone.

Our own step runs on a model whose tensors have shapes but no values (`FakeTensorMode`), and a `MemoryTracker` follows
it. From top to bottom: a stand-in for attention allocates what the GPU's kernel does; `Phases` are the passes of a run;
layers that repeat are traced a few times and extrapolated; `Tracer` puts these together.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sft.config.auto import optimizer_state
from sft.config.schema import PAIRED, PREFERENCES, Config
from sft.errors import ModelError
from sft.memory import shapes
from sft.memory.scaling import operations_per_token
from sft.memory.tracker import Interval, MemoryTracker, local
from sft.model import kernels, shard
from sft.model.adapters import head, unwrap
from sft.step import attention
from sft.step.batch import Collator, MicroBatch, split_micro_batches
from sft.step.ewc import Consolidation, trained_weights
from sft.step.optimizer import TORCH, begin_training, create_optimizer
from sft.step.step import StepConfig, compute_dtype, stays_on_gpu, token_losses

BUCKET_BYTES = 25 * 2**20  # of gradients that copies of a model add up together, or a single larger one
ROUNDING = {"cuda": 512, "cpu": 1}  # bytes: CUDA's caching allocator hands out multiples of 512
log = logging.getLogger("sft.memory")
Sharding = Literal["ddp", "zero2", "fsdp"]  # what ranks share: nothing; gradients and optimizer; the weights too


# ---- attention as the device's kernels allocate

ATTENTION = "sft_traced"


_row_lengths: list[int] = []  # of the packed rows that are traced: the CPU's stand-in splits by them
_on_gpu = [True]  # whether a GPU is traced


def attention_for(description: Mapping[str, Any]) -> tuple[str, bool]:
    """(the attention function to build the model with, whether rows are packed without padding), as training chooses.

    An Ampere GPU or newer is assumed where the device is a GPU.
    """
    if not attention.supports(description):
        return attention.padded(description), False
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)
    return ATTENTION, True


def _mask(batch_size: int, q_length: int, kv_length: int, *_: Any, **__: Any) -> Tensor | None:
    """None for packed rows, whose boundaries take no memory to speak of; else the mask of padded rows for SDPA."""
    return torch.empty((batch_size, 1, q_length, kv_length), dtype=torch.bool) if batch_size > 1 else None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The memory of `step.attention.rows_attention`: [B, heads, T, width] to [B, T, heads, width]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    (cuda,) = _on_gpu
    if query.shape[0] > 1 or query.shape[2] != key.shape[2]:  # padded rows, or a KV cache
        if not cuda:
            out: Tensor = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling
            )[0]
            return out, None
        shared = query.shape[1] // key.shape[1]  # the fused kernel takes a mask only with repeated keys and values
        repeated = shared > 1 and attention_mask is not None
        spread = [tensor.repeat_interleave(shared, 1) for tensor in (key, value)] if repeated else []
        out = torch.empty((query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), dtype=query.dtype)
        del spread
        return out, None
    if cuda:
        out = _FlashAttention.apply(*(tensor[0].transpose(0, 1) for tensor in (query, key, value)))  # type: ignore[no-untyped-call]
        return out[None], None
    return attention.row_by_row(module, query, key, value, _row_lengths, dropout, scaling), None


class _FlashAttention(torch.autograd.Function):
    """What FlashAttention 2 with row boundaries (varlen_attn) allocates, for [T, heads, width] each.

    Saved for backward: the inputs, the output and one fp32 number a row and head. In backward: the gradients, the
    query's accumulated in fp32, those of shared keys and values once per query head before they are summed.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype)
        sums = torch.empty((query.shape[1], query.shape[0]), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, sums = ctx.saved_tensors
        accumulated = [torch.empty(query.shape, dtype=torch.float32), torch.empty_like(sums)]
        shared = query.shape[1] != key.shape[1]
        per_head = [torch.empty_like(query), torch.empty_like(query)] if shared else []
        gradients = tuple(torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value))
        del accumulated, per_head
        return gradients


# ---- the phases of a run


def traced_optimizer(optim: str, device: str) -> str:
    """The optimizer that is stepped in a trace, because its step allocates: Adafactor and Muon, and on a CPU all but
    fused AdamW and bitsandbytes' own; "" for none.
    """
    by_name = optim in TORCH or optim.startswith("schedule_free")
    traced = optim in ("adafactor", "muon") or (device == "cpu" and by_name and optim != "adamw_torch_fused")
    return "adamw_torch" if (optim, device) == ("auto", "cpu") else optim if traced else ""


BACKWARD, OPTIMIZER, ANSWER = "backward", "optimizer", "answer"  # labels of intervals that belong to no layer


class Phases:
    """The passes of a run on one model, real or fake, followed by a tracker.

    Layers and arriving gradients begin an interval each. An optimizer whose step allocates (most on a CPU) is stepped
    for real; the state of the others is only counted (`Tracer.optimizer_bytes`), for their step works in place. copies:
    other processes train copies of the model.
    """

    def __init__(
        self, model: nn.Module, config: Config, tracker: MemoryTracker, *, device: str, copies: bool = False
    ) -> None:
        self.model, self.config, self.tracker, self.copies = model, config, tracker, copies
        self.offload = config.train.activation_offload and device == "cuda"
        train, dtype = config.train, compute_dtype(config.train)
        self.step_config = StepConfig(  # autocast is the CPU's, as fake tensors are, whatever device is traced
            objective=train.objective,
            logits=train.logits,
            logits_tile=train.logits_tile,
            label_smoothing=train.label_smoothing,
            preference=train.preference,
            z_loss=train.z_loss,
            autocast=None if dtype == torch.float32 else dtype,
        )
        if train.kernels == "fused":
            kernels.use_fused_lora(model)
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        _assign_weights(model, tracker)
        stack_of = dict[int, str]()  # of a weight: the index of its list of layers, whose intervals share a label
        for index, layers in enumerate(_layer_lists(model)):
            for layer in layers:
                layer.register_forward_pre_hook(lambda *_, label=str(index): tracker.mark(label))
                stack_of |= {id(weight): str(index) for weight in layer.parameters()}
        for weight in self.trained:
            hook = functools.partial(self._gradient_arrived, stack_of.get(id(weight), ""))
            weight.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self.ewc: Consolidation | None = None
        if train.ewc.strength:
            tracker.part = "consolidation"
            fisher = {name: torch.zeros_like(weight) for name, weight in trained_weights(model).items()}
            self.ewc = Consolidation.around(model, fisher, train.ewc.strength)
            tracker.part = None
        self.optimizer: Any = None
        if name := traced_optimizer(train.optim, device):
            self._zero_gradients(part="optimizer")
            self.optimizer = create_optimizer(model, train.model_copy(update={"optim": name, "learning_rate": 1e-4}))
            begin_training(self.optimizer)
            self.optimizer.step()
            self.optimizer.zero_grad()
            tracker.part = None

    def _gradient_arrived(self, label: str, weight: Any) -> None:
        self.tracker.assign([weight.grad], "gradients")
        self.tracker.mark(label)

    def _zero_gradients(self, *, part: str) -> None:
        """Gradients for all trained weights; they and all that follows count as `part`."""
        self.tracker.part = part
        for weight in self.trained:
            weight.grad = torch.zeros_like(weight)

    def step(self, micro: MicroBatch, *, accumulating: bool) -> list[Interval]:
        """One optimizer step of one micro-batch. accumulating: gradients of earlier micro-batches exist already."""
        train, tracker = self.config.train, self.tracker
        self.model.train()
        if accumulating:
            self._zero_gradients(part="gradients")
            tracker.part = None
        tracker.reset()
        with _offloading() if self.offload else contextlib.nullcontext():
            loss = self._loss(micro)
        tracker.mark(BACKWARD)
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        tracker.mark(OPTIMIZER)
        if self.copies:  # ranks add up their gradients in buckets, of which one exists beside them
            flat = torch.empty(max(BUCKET_BYTES, *(weight.nbytes for weight in self.trained)), dtype=torch.uint8)
            tracker.assign([flat], "gathered")
            del flat
        if self.ewc is not None:
            self.ewc.add_gradients()
        if train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained, train.max_grad_norm)
        if self.optimizer is not None:
            self.optimizer.step()
        for weight in self.trained:
            weight.grad = None
        return tracker.finish()

    def _loss(self, micro: MicroBatch) -> Tensor:
        with self.step_config.forward_context():
            return token_losses(self.model, micro, self.step_config).sum() / micro.labelled

    def evaluation(self, micro: MicroBatch) -> list[Interval]:
        """The loss of one micro-batch, without gradients."""
        self.model.eval()
        self.tracker.reset()
        with torch.no_grad():
            self._loss(micro)
        return self.tracker.finish()

    def generation(self, micro: MicroBatch, answer: int) -> list[Interval]:
        """The prompts of `micro` in one pass, then the last token of answers of `answer` tokens, all in the cache."""
        self.model.eval()
        base: Any = unwrap(self.model)
        self.tracker.reset()
        with torch.no_grad(), self.step_config.forward_context():
            ids = micro.inputs["input_ids"]
            token = torch.ones((len(ids), 1), dtype=torch.long)
            inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True}
            if micro.seq2seq:
                inputs = {"encoder_outputs": base.get_encoder()(input_ids=ids), "decoder_input_ids": token}
            elif "logits_to_keep" in inspect.signature(base.forward).parameters:
                inputs["logits_to_keep"] = 1
            out = self.model(**inputs)
            cache = out.past_key_values
            out.logits[:, -1, :].float().argmax(-1)
            del out
            self.tracker.mark(ANSWER)
            _extend_cache(cache, max(0, answer - 2))
            self.tracker.mark(ANSWER)
            inputs |= {"decoder_input_ids": token} if micro.seq2seq else {"input_ids": token}
            out = self.model(**inputs, past_key_values=cache)
            out.logits[:, -1, :].float().argmax(-1)
        return self.tracker.finish()


def _assign_weights(model: nn.Module, tracker: MemoryTracker) -> None:
    """Counts every tensor of the model as the part that it belongs to."""
    base: Any = unwrap(model)
    top = head(base)
    adapted = hasattr(model, "peft_config")
    packed = [module for module in base.modules() if shapes.is_four_bit(module)]
    four_bit, ids = bool(packed), {id(module.weight) for module in packed}
    edges = {id(p) for m in base.modules() if m is top or isinstance(m, nn.Embedding) for p in m.parameters()}
    for module in packed:
        tracker.assign([module.weight, *shapes.scales(module)], "weights in 4 bit")
    for weight in model.parameters():
        if id(weight) in ids:
            continue
        if weight.requires_grad and adapted:
            tracker.assign([weight], "adapters")
        else:  # beside 4-bit weights, norms and biases count with the embedding
            small = weight.ndim < 2 and four_bit
            tracker.assign([weight], "embedding and head" if id(weight) in edges or small else "weights")
    tracker.assign(model.buffers(), "embedding and head" if four_bit else "weights")


def _offloading() -> Any:
    """`step.offload_activations` as the GPU's memory sees it: what leaves is freed, what comes back is new."""

    def pack(tensor: Tensor) -> Any:
        return tensor if stays_on_gpu(tensor) else (tensor.shape, tensor.dtype)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else torch.empty(packed[0], dtype=packed[1])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _extend_cache(cache: Any, tokens: int) -> None:
    """Adds keys and values of `tokens` positions to every layer of a KV cache, by the cache's own rule."""
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(cache, "layers", ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if tokens and isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == 4:
            layer.update(*(tensor.new_empty((*tensor.shape[:2], tokens, tensor.shape[3])) for tensor in (keys, values)))


def micro_batch(kind: Any, lengths: Sequence[int], *, packed: bool, objective: str = "response") -> MicroBatch:
    """Rows of these lengths, every token labelled, as one micro-batch; padded to the longest unless packed. Each two of
    them are a pair where the objective compares two answers.
    """
    if not packed:
        lengths = [max(lengths)] * len(lengths)
    sides = [(length, 0) for length in lengths]
    if objective in PAIRED:
        sides = list(zip(lengths[::2], lengths[1::2], strict=True))
    elif objective == "kto":
        sides = [(length, length) for length in lengths]
    rows: list[dict[str, Any]] = [{"input_ids": [1] * sum(both), "labels": [1] * sum(both)} for both in sides]
    if objective in PREFERENCES:
        rating = int(objective == "kto")
        rows = [{**row, "chosen": both[0], "rating": rating} for row, both in zip(rows, sides, strict=True)]
    (micro,) = split_micro_batches(Collator(kind)(rows), tokens=2 * max(lengths) * len(lengths), packed=packed)
    return micro


# ---- extrapolation over layers that repeat


class _Stack(NamedTuple):
    """A list of layers of which, after `start`, `times` periods of `period` layers are alike."""

    layers: nn.ModuleList
    start: int
    period: int
    times: int

    @property
    def shallow(self) -> int:
        """Periods that the shallower of the two traced models has; the deeper one has one more."""
        return 3 if self.period == 1 else 2


def remove_layers(model: nn.Module, *, deeper: bool) -> int:
    """Removes as many periods as possible from every list of layers, the same number from each; returns that number.

    deeper: leaves one more. 0 if nothing repeats often enough.
    """
    config: Any = getattr(model, "config", None)
    settings = [value for value in vars(config).values() if isinstance(value, list | tuple)] if config else []
    stacks = [stack for layers in _layer_lists(model) if (stack := _repeating(layers, settings)) is not None]
    removed = min((stack.times - stack.shallow for stack in stacks), default=0) - deeper
    if removed <= 0:
        return 0
    for stack in stacks:
        first, last = (stack.start + stack.period * times for times in (stack.times - removed, stack.times))
        left = [*stack.layers[:first], *stack.layers[last:]]
        stack.layers._modules = {str(index): layer for index, layer in enumerate(left)}
    return removed


def _layer_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The model's outermost lists of layers."""
    lists: list[nn.ModuleList] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            inside |= {id(inner) for inner in module.modules()}
            lists.append(module)
    return lists


def _repeating(layers: nn.ModuleList, settings: Sequence[Any]) -> _Stack | None:
    """The repetition in a list of layers that saves most; None if tracing two shallow models saves nothing.

    settings: lists of the model's config; those as long as `layers` say something about each layer.
    """
    by_layer = [values for values in settings if len(values) == len(layers)]
    kinds = [_layer_kind(layer, [values[index] for values in by_layer]) for index, layer in enumerate(layers)]
    best, most_saved = None, 0
    for period in range(1, len(kinds) // 2):
        start = len(kinds) - period
        while start > 0 and kinds[start - 1] == kinds[start - 1 + period]:
            start -= 1
        stack = _Stack(layers, start, period, (len(kinds) - start) // period)
        saved = period * (stack.times - stack.shallow)
        if saved > most_saved and 2 * (len(kinds) - saved) + period < len(kinds):
            best, most_saved = stack, saved
    return best


def _layer_kind(layer: nn.Module, settings: list[Any]) -> str:
    """Everything that a layer consists of, except its index: classes, shapes and plain settings."""
    parts: list[Any] = list(settings)
    for name, module in layer.named_modules():
        tensors = {**module._parameters, **module._buffers}
        sizes = [(key, tuple(tensor.shape)) for key, tensor in tensors.items() if tensor is not None]
        plain = [(key, value) for key, value in vars(module).items() if isinstance(value, int | float | str | None)]
        own = sorted((key, repr(value)) for key, value in plain if key not in ("layer_idx", "layer_id"))
        parts.append((name, type(module).__name__, sizes, own))
    return repr(parts)


def extrapolate(shallow: Sequence[Interval], deep: Sequence[Interval], removed: int) -> list[Interval] | None:
    """The intervals of the full model, from a trace without `removed` periods of layers and one with one period more.

    Of intervals that repeat, the first and the last ones, which bound those between. None if the two traces differ
    in more than the repetition.
    """
    runs = [
        [(label, list(run)) for label, run in itertools.groupby(trace, lambda interval: interval.label)]
        for trace in (shallow, deep)
    ]
    if [label for label, _ in runs[0]] != [label for label, _ in runs[1]]:
        return None
    full: list[Interval] = []
    for (label, few), (_, more) in zip(*runs, strict=True):
        half, extra = (len(few) + 1) // 2, len(more) - len(few)
        if extra < 0:
            return None
        for one, other in zip(few, [*more[:half], *more[extra + half :]], strict=True):
            parts = {part: size + removed * (other.parts[part] - size) for part, size in one.parts.items()}
            full.append(Interval(label, one.peak + removed * (other.peak - one.peak), parts))
    return full


# ---- the tracer


@functools.cache
def fake_mesh(ranks: int) -> Any:
    """A mesh of this process and of ranks that do not exist: its collectives only have shapes."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d
    from torch.distributed.device_mesh import DeviceMesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    world, wait = list(range(ranks)), timedelta(minutes=1)
    group, _ = c10d._new_process_group_helper(
        ranks, 0, world, "fake", FakeStore(), c10d.GroupName(f"plan of {ranks}"), timeout=wait
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in world}
    mesh = DeviceMesh.from_group(group, "cpu")
    if alone:
        c10d._update_default_pg(None)
    return mesh


class Tracer:
    """Traces one model under one config, which must be resolved for `device` (except its batch sizes).

    description: the model's config.json. extrapolated: False traces every layer. parameters: of the base model. kind:
    `causal` or `seq2seq`. packed: whether rows go without padding. Nothing is traced twice. What is traced has the
    optimizer's state only where its step allocates: add `optimizer_bytes`. Raises ModelError for a family that
    transformers does not implement or that cannot run without values. Of several ranks one is traced.
    """

    def __init__(
        self,
        config: Config,
        description: Mapping[str, Any],
        *,
        device: str,
        extrapolated: bool = True,
        ranks: int = 1,
        sharding: Sharding = "ddp",
    ) -> None:
        self.config, self.description, self.device = config, description, device
        self.parameters = self.attention = self.head = 0
        self.multiplied: int | None = None
        self.removed = 0  # periods of layers that the shallower model is without
        self._results: dict[tuple[Any, ...], Interval] = {}
        self.ranks, self.sharding = ranks, sharding
        self.mesh = None if sharding == "ddp" else fake_mesh(ranks)
        self._models = [_FakeModel(self, deeper=False if extrapolated else None)]
        if self.removed:
            self._models.append(_FakeModel(self, deeper=True))
        self.kind, self.packed = self._models[0].kind, self._models[0].packed
        self.pairs = config.train.objective in PAIRED

    def optimizer_bytes(self, optim: str) -> int:
        """Bytes of optimizer state on the device beside a trace; paged state is in the machine's memory."""
        if traced_optimizer(optim, self.device) or optim.startswith("paged"):
            return 0
        moments, size = optimizer_state(optim)
        rounded = self._models[0].tracker.rounded
        return moments * self._trained(lambda weight: rounded(local(weight).numel() * size))

    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all trained weights."""
        return self._trained(lambda weight: weight.nbytes)

    def _trained(self, size: Callable[[Tensor], int]) -> int:
        """The sum over the trained weights of the full depth."""
        shallow, *deep = (sum(map(size, model.phases.trained)) for model in self._models)
        return shallow + self.removed * (sum(deep) - shallow)

    def operations_per_token(self, length: int) -> float | None:
        """Of a training step on rows of `length` tokens; None for a mixture of experts, which uses a few of them."""
        if self.multiplied is None:
            return None
        trained, repeated = self._trained(Tensor.numel), self.config.train.gradient_checkpointing is True
        adapters = 0 if self.config.tuning.mode == "full" else trained
        return operations_per_token(
            self.multiplied,
            adapters,
            min(trained, self.multiplied + adapters),
            self.attention,
            length,
            self.multiplied - self.head if repeated else 0,
        )

    def step(self, lengths: Sequence[int], *, accumulating: bool) -> Interval:
        """The peak of a step whose largest micro-batch has rows of these lengths, every token labelled.

        An encoder-decoder has a source and a target of each length; with a preference objective, each two rows are a
        pair. accumulating: gradients of earlier micro-batches of
        the same step exist already.
        """
        return self._trace(("step", accumulating), lengths, functools.partial(Phases.step, accumulating=accumulating))

    def evaluation(self, lengths: Sequence[int]) -> Interval:
        """The peak of an evaluation's forward pass over such rows, in the middle of a run."""
        return self._trace(("evaluation",), lengths, Phases.evaluation)

    def generation(self, rows: int, prompt: int, answer: int) -> Interval:
        """The peak of answering `rows` prompts of `prompt` tokens side by side, with `answer` tokens each."""
        run = functools.partial(Phases.generation, answer=answer)
        return self._trace(("generation", answer), [prompt] * rows, run, pad=True)

    def _trace(
        self,
        phase: tuple[Any, ...],
        lengths: Sequence[int],
        run: Callable[[Phases, MicroBatch], list[Interval]],
        *,
        pad: bool = False,
    ) -> Interval:
        key = (*phase, *lengths)
        if key in self._results:
            return self._results[key]
        _on_gpu[:], _row_lengths[:] = [self.device == "cuda"], lengths
        objective = "response" if pad else self.config.train.objective
        micro = micro_batch(self.kind, lengths, packed=self.packed and not pad, objective=objective)
        traces = [model.trace(micro, run) for model in self._models]
        shallow, *deep = (model.tracker.sent for model in self._models)
        sent = shallow + self.removed * (sum(deep) - shallow)
        intervals = traces[0] if len(traces) == 1 else extrapolate(traces[0], traces[1], self.removed)
        if intervals is None:
            log.debug("%s: its layers do not repeat as they seem to; every layer is traced", self.config.model.name)
            self._models, self.removed = [_FakeModel(self, deeper=None)], 0
            intervals = self._models[0].trace(micro, run)
            sent = self._models[0].tracker.sent
        top = max(intervals, key=lambda interval: interval.peak)
        self._results[key] = replace(top, parts={part: size for part, size in top.parts.items() if size}, sent=sent)
        return self._results[key]


def _arithmetic(base: Any) -> tuple[int, int, int | None]:
    """(layers times the width of all heads, weights of the head, weights in matrix products or None for a mixture
    of experts)."""
    config = base.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return 0, 0, None
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    top, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    looked_up = 0 if top is not None and top.weight is embedding.weight else embedding.weight.numel()
    matrices = sum(weight.numel() for weight in base.parameters() if weight.ndim > 1)
    return config.num_hidden_layers * width, 0 if top is None else top.weight.numel(), matrices - looked_up


class _FakeModel:
    """The model at one depth (shallow, one period deeper, or with every layer) with fake storage."""

    def __init__(self, tracer: Tracer, *, deeper: bool | None) -> None:
        config, self.device = tracer.config, tracer.device
        self.name, dtype = config.model.name, compute_dtype(config.train)
        with shapes.model_errors(self.name):
            chosen, packed = attention_for(tracer.description)
        self.packed = packed and (config.tuning.adapter == "lora" or config.tuning.mode == "full")

        def on_base(base: Any) -> None:
            tracer.parameters = sum(weight.numel() for weight in base.parameters())
            tracer.attention, tracer.head, tracer.multiplied = _arithmetic(base)
            if deeper is not None:
                removed = remove_layers(base, deeper=deeper)
                tracer.removed = tracer.removed or removed

        model = shapes.meta_model(
            tracer.description,
            self.name,
            config.tuning,
            torch.float32 if config.tuning.mode == "full" else dtype,
            attention=chosen,
            checkpointing=config.train.gradient_checkpointing is True,
            on_base=on_base,
            sharded=tracer.mesh is not None,
        )
        base_config: Any = unwrap(model).config
        self.kind: Any = "seq2seq" if getattr(base_config, "is_encoder_decoder", False) else "causal"
        self._fake_mode = FakeTensorMode()
        vocabulary = int(base_config.get_text_config().vocab_size)
        self.tracker = MemoryTracker(rounding=ROUNDING[self.device], vocabulary=vocabulary, fake=True)
        with self._faking():
            shapes.add_storage(model, dtype)
            if tracer.mesh is not None:
                shard.shard(model, tracer.mesh, dtype=dtype, reshard=tracer.sharding == "fsdp")
                for layer in filter(shapes.is_four_bit, model.modules()):  # bitsandbytes would make a new, real tensor
                    layer.register_forward_pre_hook(lambda it, _: setattr(it.weight, "quant_state", it.quant_state))
            copies = tracer.ranks > 1 and tracer.sharding == "ddp"
            self.phases = Phases(model, config, self.tracker, device=self.device, copies=copies)

    def trace(self, real: MicroBatch, run: Callable[[Phases, MicroBatch], list[Interval]]) -> list[Interval]:
        """The intervals of `run` on a micro-batch of the shapes of `real`."""
        mask = real.inputs.get("attention_mask")
        with self._faking():
            inputs = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in real.inputs.items()}
            if mask is not None and self.device == "cpu":  # transformers drops an all-true mask, if it can read it
                inputs["attention_mask"] = mask.bool()
            targets = torch.empty(real.targets.shape, dtype=torch.long)
            counts = tuple(count + 1 for count in real.counts)  # a mask without values chooses the last position too
            return run(self.phases, replace(real, inputs=inputs, targets=targets, counts=counts))

    @contextlib.contextmanager
    def _faking(self) -> Iterator[None]:
        try:
            with quiet("sft.step"), self._fake_mode, self.tracker, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except ModelError:
            raise
        except Exception as error:  # whatever a model's own code does with tensors that have no values
            log.debug("tracing %s failed", self.name, exc_info=True)
            raise ModelError(
                f"{self.name} cannot be planned: its code needs the values of tensors, and a plan has only their shapes"
                f" ({type(error).__name__}: {' '.join(str(error).split())[:160]})",
                where="config.json",
                fix="train it with --force: the batch size is measured on the card",
            ) from None


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Only errors from the logger `name` for a while."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
