"""Which tensors are alive, in bytes, at every moment of a computation: real tensors or fake ones alike.

A dispatch mode sees the result of every operation and follows its storage by a weak reference; what happens inside one
kernel is not seen (but bitsandbytes' 4-bit product, whose dequantised weight is added). Every storage belongs to one of
the PARTS; the parts at the highest moment are kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sft import files
from sft.config.schema import Config, TrainSection
from sft.errors import ModelError, SftError
from sft.memory import shapes
from sft.model.adapters import head, is_linear
from sft.step import attention as rows
from sft.step import unwrap
from sft.step.batch import Collator, MicroBatch, split_micro_batches
from sft.step.step import StepConfig, stays_on_gpu, token_losses

if TYPE_CHECKING:
    pass


PARTS = (
    "weights in 4 bit",
    "weights",
    "embedding and head",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "dequantised",
    "weights cast",
)
STANDING = frozenset(("weights", "embedding and head", "adapters"))


@dataclass(frozen=True)
class Window:
    """The highest moment, in bytes, between two marks; `label` is what the first of them was called.

    standing: bytes that were there when it began.
    """

    label: str
    total: int
    standing: int
    parts: dict[str, int]


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """rounding: bytes that an allocation is rounded up to. vocabulary: the last size by which logits are known.

    fake: whether tensors have no values (`fakes`).
    """

    def __init__(self, *, rounding: int, vocabulary: int, fake: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rounding, self.vocabulary = rounding, vocabulary
        self.now: dict[str, int] = dict.fromkeys(PARTS, 0)
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = dict(self.now)
        self.default = "activations"
        self.windows: list[Window] = []
        self._label, self._standing = "", 0
        self._held: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._run = Fakes().run if fake else _really

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled around a trace, and every call would pay for the guard

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._run(func, args, kwargs or {})
        name = func.overloadpacket.__name__
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.see(tensor, self._part(name, tensor, args))
        if name == "gemm_4bit":
            self._inside(args)
        return out

    def see(self, tensor: Tensor, part: str | None = None, *, again: bool = False) -> None:
        """Counts the tensor's storage, once; `again` moves one that is known to another part."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._held.get(key)
        if known is not None and known[0]() is not None:
            if again and part is not None and part != known[1]:
                self.now[known[1]] -= known[2]
                self.now[part] += known[2]
                self._held[key] = (known[0], part, known[2])
            return
        size = self.rounded(storage.nbytes())
        part = part or self.default
        self._held[key] = (weakref.ref(storage, lambda ref: self._gone(key, ref)), part, size)
        self.now[part] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.now)

    def rounded(self, size: int) -> int:
        """Bytes that an allocation of `size` bytes takes."""
        return size + -size % self.rounding

    def see_all(self, tensors: Iterable[Tensor], part: str) -> None:
        """Counts each as `part`, whatever it was before."""
        for tensor in tensors:
            self.see(tensor, part, again=True)

    def start(self) -> None:
        """Forgets the windows and the peak: the highest moments from here on."""
        self.windows, self._label, self._standing = [], "", self.total
        self.peak, self.at_peak = self.total, dict(self.now)

    def mark(self, label: str) -> None:
        """Ends a window and begins the next one, called `label`."""
        self.windows.append(Window(self._label, self.peak, self._standing, self.at_peak))
        self._label, self._standing = label, self.total
        self.peak, self.at_peak = self.total, dict(self.now)

    def stop(self) -> list[Window]:
        """The windows since `start`."""
        self.mark("")
        return self.windows

    def _gone(self, key: int, ref: Any) -> None:
        known = self._held.get(key)
        if known is not None and known[0] is ref:
            del self._held[key]
            self.now[known[1]] -= known[2]
            self.total -= known[2]

    def _part(self, name: str, tensor: Tensor, args: Any) -> str:
        if self.default != "activations":
            return self.default
        if tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary and tensor.is_floating_point():
            return "logits"
        if name == "dequantize_4bit":
            return "dequantised"
        if name == "_to_copy":
            source = self._held.get(args[0].untyped_storage()._cdata)
            if source is not None and source[1] in STANDING:
                return "weights cast"
            if source is not None and source[1] == "dequantised":
                return "dequantised"
        return self.default

    def _inside(self, args: Any) -> None:
        """The weight and the scales that the 4-bit product dequantises for itself, beside all that is alive."""
        count = args[2][0] * args[2][1]
        inside = count * args[0].element_size() + count // 64 * 4
        if self.total + inside > self.peak:
            self.peak, self.at_peak = self.total + inside, dict(self.now)
            self.at_peak["dequantised"] += inside


def _really(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


aten = torch.ops.aten
DEVICE = torch.ops.prim.device.default  # asked twice as often as anything is computed
CPU = torch.device("cpu")
PLAIN = {
    aten.mm, aten.bmm, aten.addmm, aten._unsafe_view, aten.clone, aten.cat, aten._to_copy, aten.empty_like,
    aten.zeros_like, aten.ones_like, aten.mean, aten.sum, aten.linalg_vector_norm, aten.bernoulli_,
}  # fmt: skip


class Fakes:
    """Runs operations on fake tensors of one trace."""

    def __init__(self) -> None:
        self._reads = 0

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What `func` makes of these, as far as shapes go; a value where it asks for one."""
        if func is DEVICE:
            return CPU
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            return self._value(args[0])
        if packet is aten.nonzero:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
        if packet.__name__ == "_grouped_mm":
            return _grouped(func, args, kwargs)
        if _is_plain(func) and (mode := _mode(args)) is not None:
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": "meta"}
            with in_kernel_invocation_manager(mode):
                out = func(*args, **kwargs)
            out = out if isinstance(out, FakeTensor) else FakeTensor(mode, out, CPU)
        else:
            out = func(*_without_masks(packet, [_faked(each) for each in args]), **kwargs)
        if packet is aten.lt and args[0].ndim == 0 and isinstance(args[1], float):
            out.sft_false = True  # a random number below a share: layers dropped while training, and none is here
        return out

    def _value(self, tensor: Tensor) -> Any:
        """A value for a tensor that has none: true; or ever smaller, so that of candidates the last one is the best."""
        self._reads += 1
        if tensor.dtype == torch.bool:
            return not getattr(tensor, "sft_false", False)
        return 1e-6 / self._reads if tensor.is_floating_point() else 1


@functools.cache
def _is_plain(func: Any) -> bool:
    """Whether its one result follows from shapes by a kernel of PyTorch's own that is there for them."""
    returns = func._schema.returns
    if func.namespace != "aten" or len(returns) != 1 or str(returns[0].type) != "Tensor" or "out" in func._overloadname:
        return False
    return func.is_view or torch.Tag.pointwise in func.tags or func.overloadpacket in PLAIN


def _mode(args: Any) -> Any:
    """The mode of the fake tensors in `args`; None where one among them is real or bears a value."""
    mode = None
    for each in args:
        for one in each if isinstance(each, list | tuple) else (each,):
            if isinstance(one, FakeTensor) and one.constant is None:
                mode = one.fake_mode
            elif isinstance(one, Tensor):
                return None
    return mode


def _faked(value: Any) -> Any:
    """A mask that came with its values, when it is computed with: the same without."""
    return torch.empty(value.shape, dtype=value.dtype) if type(value) is Tensor and value.ndim == 2 else value


def _without_masks(packet: Any, args: Any) -> Any:
    """Indexing by a mask as indexing by as many positions: every one counts as chosen."""
    if packet not in (aten.index, aten.index_put, aten.index_put_):
        return args
    indices: list[Any] = []
    for each in args[1]:
        if each is not None and each.dtype == torch.bool:
            indices += [each.new_empty(each.numel(), dtype=torch.long) for _ in range(each.ndim)]
        else:
            indices.append(each)
    return (args[0], indices, *args[2:])


def _grouped(func: Any, args: Any, kwargs: Any) -> Any:
    """The experts' product in any precision: its shape rules know bf16 alone."""
    kind = args[0].dtype
    return func(args[0].to(torch.bfloat16), args[1].to(torch.bfloat16), *args[2:], **kwargs).to(kind)


FOLDER = ".cache/planner/traces"
OF_TRAIN = {
    "gradient_checkpointing", "logits", "logits_tile", "max_grad_norm", "label_smoothing", "bf16", "fp16",
    "weight_decay", "activation_offload",
}  # fmt: skip
FACTS = ("kind", "apart", "parameters", "experts", "largest", "widest", "standing", "moments")
NUMBERS = (1, 4)  # bytes of a number in an optimizer's state
log = logging.getLogger("sft.memory")


def moments(optim: str, device: str) -> tuple[int, int] | None:
    """(how many, bytes of each) numbers an optimizer keeps of a trained weight on the device; None where it is traced.

    8-bit optimizers keep a byte a moment, paged ones keep their state in the machine's memory, SGD and Adafactor about
    none. On a CPU AdamW's step allocates, so it is followed itself.
    """
    if device == "cpu" and optim in ("auto", "adamw_torch"):
        return None
    none = optim.startswith("paged") or "sgd" in optim or "adafactor" in optim
    return 0 if none else 2, 1 if "8bit" in optim else 4


class Traces:
    """As a Tracer, but a trace that is kept is not made again, and the model is drawn when the first one is missing.

    Traces with their optimizer's state, wherever it is. root: the project's, None to keep nothing. Raises ModelError as
    a Tracer does.
    """

    def __init__(self, config: Config, description: Mapping[str, Any], *, device: str, root: Path | None) -> None:
        self.config, self.description, self.device = config, description, device
        self.key = self._key()
        self.path = None if root is None else root / FOLDER / f"{self.key}.json"
        self.kept = {} if self.path is None else files.read_json(self.path)
        self._made: list[Tracer] = []

    def beside(self, other: Traces) -> Traces:
        """This, on the drawn model and the traces of another with the same key."""
        self.kept, self._made = other.kept, other._made
        return self

    @property
    def standing(self) -> int:
        """Bytes on the device before any pass: no phase takes less."""
        return int(self._fact("standing")) + self._state()

    @property
    def kind(self) -> Any:
        """`causal` or `seq2seq`."""
        return self._fact("kind")

    @property
    def apart(self) -> bool:
        """Whether rows are packed without padding."""
        return bool(self._fact("apart"))

    @property
    def parameters(self) -> int:
        """Of the base model."""
        return int(self._fact("parameters"))

    @property
    def sixteen_bit_experts(self) -> int:
        """Weights of experts that stay in 16 bit where linear layers are 4-bit, because they are no linear layers."""
        return int(self._fact("experts"))

    @property
    def largest_weight(self) -> int:
        """Numbers of the base's largest tensor."""
        return int(self._fact("largest"))

    @property
    def widest_layer(self) -> int:
        """Numbers of its largest linear layer but the head."""
        return int(self._fact("widest"))

    def step(self, lengths: Sequence[int], *, waiting: bool) -> Traced:
        """See `Tracer.step`."""
        return self._trace(f"step {list(lengths)} {waiting}", lambda t: t.step(lengths, waiting=waiting))

    def evaluation(self, lengths: Sequence[int]) -> Traced:
        """See `Tracer.evaluation`."""
        return self._trace(f"evaluation {list(lengths)}", lambda t: t.evaluation(lengths))

    def generation(self, rows: int, prompt: int, answer: int) -> Traced:
        """See `Tracer.generation`."""
        return self._trace(f"generation {rows} {prompt} {answer}", lambda t: t.generation(rows, prompt, answer))

    def _trace(self, name: str, make: Callable[[Tracer], Traced]) -> Traced:

        if name not in self.kept:
            self._keep(name, vars(make(self._drawn())))
        found, state = Traced(**self.kept[name]), self._state()
        parts = {part: size + state if part == "optimizer" else size for part, size in found.parts.items()}
        return Traced({part: size for part, size in parts.items() if size}, found.peak + state, found.standing + state)

    def _state(self) -> int:
        """Bytes of optimizer state that a trace is without."""
        kept = moments(self.config.train.optim, self.device)
        return 0 if kept is None else kept[0] * int(self._fact("moments")[str(kept[1])])

    def _fact(self, name: str) -> Any:
        if name not in self.kept:
            tracer = self._drawn()
            for fact in FACTS:
                self._keep(fact, getattr(tracer, fact))
        return self.kept[name]

    def _drawn(self) -> Tracer:

        if not self._made:
            self._made.append(Tracer(self.config, self.description, device=self.device))
        return self._made[0]

    def _keep(self, name: str, value: Any) -> None:
        self.kept[name] = value
        if self.path is not None:
            try:
                files.write_json(self.path, self.kept)
            except (OSError, SftError) as error:
                log.debug("a trace could not be kept: %s", error)

    def _key(self) -> str:
        train = self.config.train.model_dump(include=OF_TRAIN)
        followed = moments(self.config.train.optim, self.device) is None
        known = [dict(self.description), self.config.tuning.model_dump(), train, followed, self.device, _code()]
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:24]


@functools.cache
def _code() -> str:
    """What a trace depends on besides its inputs: our code of a step, and the libraries'."""
    rooms = Path(__file__).parents[1]
    sources = sorted(path for room in ("memory", "step", "model") for path in (rooms / room).glob("*.py"))
    said = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return said + "".join(version(name) for name in ("torch", "transformers", "peft"))


SHALLOW = {1: 3}  # periods of the shallower model, by the layers of a period; the deeper one has one more
LONG = 2  # the same where a period is of several layers


@dataclass(frozen=True)
class Stack:
    """Layers of one list that repeat: `times` periods of `period` layers after the first `start`."""

    layers: nn.ModuleList
    start: int
    period: int
    times: int


def stacks(model: nn.Module) -> list[Stack]:
    """The model's outermost lists of layers, those that repeat often enough to be worth it."""
    found: list[Stack] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside or not isinstance(module, nn.ModuleList):
            continue
        inside |= {id(inner) for inner in module.modules()}
        stack = _repeating(module, _lists(model, len(module)))
        if stack is not None:
            found.append(stack)
    return found


def shorten_model(model: nn.Module, *, deeper: bool) -> int:
    """Takes the same number of periods out of every stack, as many as can be missed; returns that number.

    deeper: one less. 0 where nothing repeats.
    """
    found = stacks(model)
    out = min((stack.times - _shallow(stack.period) for stack in found), default=0) - deeper
    if out <= 0:
        return 0
    for stack in found:
        end = stack.start + stack.period * (stack.times - out)
        kept = [*stack.layers[:end], *stack.layers[stack.start + stack.period * stack.times :]]
        stack.layers._modules = {str(index): layer for index, layer in enumerate(kept)}
    return out


def layers(model: nn.Module) -> list[list[nn.Module]]:
    """The layers of each outermost list, to be marked when they begin."""
    found: list[list[nn.Module]] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            inside |= {id(inner) for inner in module.modules()}
            found.append(list(module))
    return found


def unfold(shallow: Sequence[Window], deep: Sequence[Window], out: int) -> list[Window] | None:
    """The windows of the full model, of which `out` periods were left out of `shallow` and one less of `deep`.

    Of windows that repeat, the first and the last ones: those between lie between them. None where the two are not
    the same but for the repeating.
    """
    runs = [[(label, list(run)) for label, run in itertools.groupby(w, lambda x: x.label)] for w in (shallow, deep)]
    if [label for label, _ in runs[0]] != [label for label, _ in runs[1]]:
        return None
    full: list[Window] = []
    for (_, few), (_, more) in zip(*runs, strict=True):
        half, longer = (len(few) + 1) // 2, len(more) - len(few)
        if longer < 0:
            return None
        same = [*more[:half], *more[longer + half :]]
        full += [_grown(one, other, out) for one, other in zip(few, same, strict=True)]
    return full


def _grown(shallow: Window, deep: Window, out: int) -> Window:
    parts = {name: size + out * (deep.parts[name] - size) for name, size in shallow.parts.items()}
    total, standing = (
        (one + out * (other - one)) for one, other in ((shallow.total, deep.total), (shallow.standing, deep.standing))
    )
    return Window(shallow.label, total, standing, parts)


def _repeating(stack: nn.ModuleList, lists: list[Sequence[Any]]) -> Stack | None:
    kinds = [_kind(layer, [each[index] for each in lists]) for index, layer in enumerate(stack)]
    best: Stack | None = None
    for period in range(1, len(kinds) // LONG):
        start = len(kinds) - period
        while start > 0 and kinds[start - 1] == kinds[start - 1 + period]:
            start -= 1
        times = (len(kinds) - start) // period
        found = Stack(stack, start, period, times)
        left = len(kinds) - times * period
        drawn = (2 * _shallow(period) + 1) * period + 2 * left
        if drawn < len(kinds) and (best is None or _saved(found) > _saved(best)):
            best = found
    return best


def _saved(stack: Stack) -> int:
    return stack.period * (stack.times - _shallow(stack.period))


def _shallow(period: int) -> int:
    return SHALLOW.get(period, LONG)


def _kind(layer: nn.Module, listed: list[Any]) -> str:
    """All that a layer is made of: classes, shapes and plain settings, but for the number that it bears."""
    said: list[Any] = list(listed)
    for name, module in layer.named_modules():
        tensors = {**module._parameters, **module._buffers}
        shapes = [(key, tuple(tensor.shape)) for key, tensor in tensors.items() if tensor is not None]
        plain = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | None)}
        settings = sorted((key, value) for key, value in plain.items() if key not in ("layer_idx", "layer_id"))
        said.append((name, type(module).__name__, shapes, settings))
    return repr(said)


def _lists(model: nn.Module, length: int) -> list[Sequence[Any]]:
    """What the config says layer by layer."""
    config: Any = getattr(model, "config", None)
    values = vars(config).values() if config is not None else ()
    return [value for value in values if isinstance(value, list | tuple) and len(value) == length]


NAME = "sft_traced"
_lengths: list[int] = []
_device = ["cuda"]


def choose(device: str, description: Mapping[str, Any]) -> tuple[str, bool]:
    """The attention to draw the model with, and whether rows go through it padding-free, as training would choose.

    description: the model's config.json. An Ampere card or newer is assumed where the device is a GPU.
    """
    if not rows.supports(description):
        return rows.fallback(description), False
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    _device[:] = [device]
    return NAME, True


def rows_are(lengths: Sequence[int]) -> None:
    """The lengths of the rows that the next trace packs."""
    _lengths[:] = lengths


def optimizer(trained: list[nn.Parameter], train: TrainSection, live: Live, *, device: str) -> Any:
    """An optimizer with its state in place, where its step allocates something worth following; else None.

    Where it is None (`memo.moments`) state is beside the trace: on a GPU AdamW is fused and works in place.
    """
    if moments(train.optim, device) is not None:
        return None
    live.default = "optimizer"
    try:
        made = torch.optim.AdamW(trained, lr=1e-4, weight_decay=train.weight_decay)
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        made.step()
        made.zero_grad()
        return made
    finally:
        live.default = "activations"


def _mask(batch_size: int, q_length: int, kv_length: int, *_: Any, **__: Any) -> Tensor | None:
    """None for packed rows, whose boundaries take nothing; else the mask of padded rows, as SDPA takes it."""
    return torch.empty((batch_size, 1, q_length, kv_length), dtype=torch.bool) if batch_size > 1 else None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`step.attention.rows_attention` on fake tensors: [B, heads, T, width] to [B, T, heads, width]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.shape[0] > 1 or query.shape[2] != key.shape[2]:
        return _padded(module, query, key, value, attention_mask, dropout, scaling)
    if _device[0] == "cuda":
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        out: Tensor = _Flash.apply(q, k, v)  # type: ignore[no-untyped-call]
        return out[None], None
    parts = [
        sdpa_attention_forward(module, q, k, v, None, dropout=dropout, scaling=scaling, is_causal=True)[0]
        for q, k, v in zip(*(torch.split(t, _lengths, dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=1), None


def _padded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, None]:
    """Padded rows, or a cache: transformers' SDPA; on a GPU its fused kernel, for which shared keys are spread out."""
    if _device[0] == "cpu":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: Tensor = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)[0]
        return out, None
    shared = query.shape[1] // key.shape[1]
    spread = [each.repeat_interleave(shared, 1) for each in (key, value)] if shared > 1 and mask is not None else []
    made = torch.empty((query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), dtype=query.dtype)
    del spread
    return made, None


class _Flash(torch.autograd.Function):
    """What FlashAttention 2 for rows of different lengths allocates (varlen_attn): [T, heads, width] each.

    Kept for the backward pass: its inputs, its output and one fp32 a row and head. There: the gradients, the query's
    summed in fp32, those of shared keys and values once a query head before they are added up.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype)
        sums = torch.empty((query.shape[1], query.shape[0]), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, sums = ctx.saved_tensors
        summed = [torch.empty(query.shape, dtype=torch.float32), torch.empty_like(sums)]
        shared = query.shape[1] != key.shape[1]
        wide = [torch.empty_like(query), torch.empty_like(query)] if shared else []
        grads = tuple(torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value))
        del summed, wide
        return grads  # type: ignore[return-value]


BACKWARD, STEP, ANSWER = "backward", "optimizer", "answer"  # windows that are no layer's


class Passes:
    """A model's passes. An optimizer that is followed has its state at once: every phase of a run stands beside it."""

    def __init__(self, model: nn.Module, config: Config, live: Live, *, device: str) -> None:
        self.model, self.config, self.live = model, config, live
        self.offload = config.train.activation_offload and device == "cuda"
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        sort_weights(model, live)
        places = dict[int, str]()
        for index, stack in enumerate(layers(model)):
            for layer in stack:
                layer.register_forward_pre_hook(lambda *_, label=str(index): live.mark(label))
                places |= {id(weight): str(index) for weight in layer.parameters()}
        for weight in self.trained:
            self._watch(weight, places.get(id(weight), ""))
        self.optimizer = optimizer(self.trained, config.train, live, device=device)

    def _watch(self, weight: nn.Parameter, label: str) -> None:
        """Counts the weight's gradient as one, and marks its arrival."""

        def arrived(arriving: Tensor) -> None:
            assert arriving.grad is not None
            self.live.see(arriving.grad, "gradients", again=True)
            self.live.mark(label)

        weight.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]

    def step(self, micro: MicroBatch, *, waiting: bool) -> list[Window]:
        """One optimizer step of one micro-batch. waiting: gradients of earlier ones are there."""
        train, live = self.config.train, self.live
        self.model.train()
        if waiting:
            live.default = "gradients"
            for weight in self.trained:
                weight.grad = torch.zeros_like(weight)
            live.default = "activations"
        live.start()
        with computing(self.config), _away() if self.offload else contextlib.nullcontext():
            loss = self._loss(micro)
        live.mark(BACKWARD)
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        live.mark(STEP)
        if train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained, train.max_grad_norm)
        if self.optimizer is not None:
            self.optimizer.step()
        for weight in self.trained:
            weight.grad = None
        return live.stop()

    def _loss(self, micro: MicroBatch) -> Tensor:
        train = self.config.train
        config = StepConfig(
            objective=train.objective,
            logits=train.logits,
            logits_tile=train.logits_tile,
            label_smoothing=train.label_smoothing,
        )
        return token_losses(self.model, micro, config).sum() / micro.labelled

    def evaluation(self, micro: MicroBatch) -> list[Window]:
        """The loss of one micro-batch, without gradients."""
        self.model.eval()
        self.live.start()
        with torch.no_grad(), computing(self.config):
            self._loss(micro)
        return self.live.stop()

    def generation(self, micro: MicroBatch, prompt: int, answer: int) -> list[Window]:
        """The prompts of `micro` read at once, then the last token of answers of `answer` tokens, all in the cache."""
        self.model.eval()
        base: Any = unwrap(self.model)
        self.live.start()
        with torch.no_grad(), computing(self.config):
            ids = micro.inputs["input_ids"]
            inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True}
            one = torch.ones((len(ids), 1), dtype=torch.long)
            if micro.seq2seq:
                inputs = {
                    "encoder_outputs": base.get_encoder()(input_ids=ids),
                    "decoder_input_ids": one,
                }
            elif "logits_to_keep" in inspect.signature(base.forward).parameters:
                inputs["logits_to_keep"] = 1
            out = self.model(**inputs)
            cache = out.past_key_values
            _draw_choice(out)
            del out
            self.live.mark(ANSWER)
            _lengthen(cache, max(0, answer - 2))
            self.live.mark(ANSWER)
            inputs |= {"decoder_input_ids": one} if micro.seq2seq else {"input_ids": one}
            out = self.model(**inputs, past_key_values=cache)
            _draw_choice(out)
        return self.live.stop()


def _away() -> Any:
    """`step.offload` as the GPU's memory sees it: what leaves is gone, what comes back is new."""

    def away(tensor: Tensor) -> Any:
        return tensor if stays_on_gpu(tensor) else (tensor.shape, tensor.dtype)

    def back(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1])

    return torch.autograd.graph.saved_tensors_hooks(away, back)


def _draw_choice(out: Any) -> None:
    """The last position's logits in fp32 and their best: what choosing a token takes."""
    out.logits[:, -1, :].float().argmax(-1)


def _lengthen(cache: Any, tokens: int) -> None:
    """Puts keys and values of `tokens` more positions into every layer of a cache, by its own rule."""
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(cache, "layers", ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if tokens and isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == 4:
            more = [each.new_empty((*each.shape[:2], tokens, each.shape[3])) for each in (keys, values)]
            layer.update(*more)


def sort_weights(model: nn.Module, live: Live) -> None:
    """Says of every tensor of the model which part it is."""
    base: Any = unwrap(model)
    top = head(base)
    adapted = any(not weight.requires_grad for weight in model.parameters())
    four_bit = any(shapes.is_four_bit(weight) for weight in model.parameters())
    edges = {id(p) for m in base.modules() if m is top or isinstance(m, nn.Embedding) for p in m.parameters()}
    rest = "embedding and head" if four_bit else "weights"
    for weight in model.parameters():
        if shapes.is_four_bit(weight):
            live.see_all([weight, *shapes.constants(weight)], "weights in 4 bit")
        elif weight.requires_grad and adapted:
            live.see(weight, "adapters", again=True)
        else:
            small = weight.ndim < 2 and four_bit  # norms and biases stand with the rest that is not quantised
            live.see(weight, "embedding and head" if id(weight) in edges or small else "weights", again=True)
    live.see_all(model.buffers(), rest)


def micro_batch(kind: Any, lengths: Sequence[int], *, apart: bool) -> MicroBatch:
    """Rows of these lengths, all labelled, in one micro-batch; all of the longest length where they are not packed."""
    if not apart:
        lengths = [max(lengths)] * len(lengths)
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in lengths]
    (made,) = split_micro_batches(Collator(kind)(rows), tokens=2 * max(lengths) * len(lengths), packed=apart)
    return made


def compute_dtype(config: Config) -> torch.dtype:
    """The type that the resolved config computes in."""
    if config.train.bf16 is True:
        return torch.bfloat16
    return torch.float16 if config.train.fp16 is True else torch.float32


@contextlib.contextmanager
def computing(config: Config) -> Iterator[None]:
    """Autocast as training has it. Fake tensors are the CPU's, whatever they stand for."""
    dtype = compute_dtype(config)
    if dtype == torch.float32:
        yield
        return
    with torch.autocast("cpu", dtype=dtype):
        yield


ROUNDING = {"cuda": 512, "cpu": 1}  # bytes: CUDA's caching allocator hands out multiples of 512


@dataclass(frozen=True)
class Traced:
    """Bytes. parts: what was alive at the highest moment, by kind; peak: their sum. standing: before it began.

    A Tracer's is without the optimizer's state where that merely stands there; `memo.Traces` adds it.
    """

    parts: dict[str, int]
    peak: int
    standing: int


class Tracer:
    """Traces one model at one config, which must be resolved for `device` (but for its batch sizes).

    description: the model's config.json. fold: False draws every layer. Of the base, in numbers: parameters; largest
    tensor; widest linear layer but the head; experts: in tensors of three dimensions, which 4-bit leaves as they are.
    standing: bytes before any pass; moments: those of a number for every trained weight, by the bytes of one. Raises
    ModelError for a family that transformers has not, or that cannot be followed without values.
    """

    def __init__(self, config: Config, description: Mapping[str, Any], *, device: str, fold: bool = True) -> None:
        self.config, self.description, self.device = config, description, device
        self.parameters = self.out = self.largest = self.widest = self.experts = 0
        self.kind: Any = "seq2seq" if description.get("is_encoder_decoder") else "causal"
        self.drawn = [_Drawn(self, False if fold else None)]
        if self.out:
            self.drawn.append(_Drawn(self, True))
        self.kind, self.apart = self.drawn[0].kind, self.drawn[0].apart
        self.standing = self._unfolded([drawn.passes.live.total for drawn in self.drawn])
        self.moments = {str(size): self._unfolded([drawn.moment(size) for drawn in self.drawn]) for size in NUMBERS}

    def _unfolded(self, bytes_: Sequence[int]) -> int:
        """Of the full depth, by those of what is drawn."""
        return bytes_[0] + self.out * (bytes_[-1] - bytes_[0])

    def step(self, lengths: Sequence[int], *, waiting: bool) -> Traced:
        """The peak of a step whose largest micro-batch has rows of these lengths, all labelled.

        For an encoder-decoder these are the lengths of a source and of its target. waiting: whether gradients of
        other micro-batches of the same step are there already.
        """
        return self._follow(lengths, lambda passes, micro: passes.step(micro, waiting=waiting))

    def evaluation(self, lengths: Sequence[int]) -> Traced:
        """The peak of an evaluation's forward pass over such rows, in the middle of a run."""
        return self._follow(lengths, lambda passes, micro: passes.evaluation(micro))

    def generation(self, rows: int, prompt: int, answer: int) -> Traced:
        """The peak of answering `rows` prompts of `prompt` tokens side by side with `answer` tokens each."""
        return self._follow(
            [prompt] * rows, lambda passes, micro: passes.generation(micro, prompt, answer), padded=True
        )

    def _follow(
        self, lengths: Sequence[int], act: Callable[[Passes, MicroBatch], list[Window]], *, padded: bool = False
    ) -> Traced:
        rows_are(lengths)
        real = micro_batch(self.kind, lengths, apart=self.apart and not padded)
        seen = [drawn.follow(real, act) for drawn in self.drawn]
        windows = seen[0] if len(seen) == 1 else unfold(seen[0], seen[1], self.out)
        if windows is None:
            log.debug("%s: its layers do not repeat as they seem to; it is traced whole", self.config.model.name)
            self.drawn, self.out = [_Drawn(self, None)], 0
            windows = self.drawn[0].follow(real, act)
        top = max(windows, key=lambda window: window.total)
        return Traced(top.parts, top.total, windows[0].standing)


class _Drawn:
    """The model at one depth: shallow, one period deeper, or (None) with every layer."""

    def __init__(self, owner: Tracer, deeper: bool | None) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        config, device = owner.config, owner.device
        dtype = compute_dtype(config)
        with shapes.reading(config.model.name):
            attention, self.apart = choose(device, owner.description)

        def shorten(model: Any) -> None:
            sizes = [(weight.numel(), weight.ndim) for weight in model.parameters()]
            owner.parameters = sum(size for size, _ in sizes)
            owner.largest = max(size for size, _ in sizes)
            top = head(model)
            owner.widest = max((m.weight.numel() for m in model.modules() if is_linear(m) and m is not top), default=0)
            if shapes.experts(model.config.get_text_config()):
                owner.experts = sum(size for size, dimensions in sizes if dimensions == 3)
            if deeper is not None:
                out = shorten_model(model, deeper=deeper)
                owner.out = owner.out or out

        self.name = config.model.name
        self.model = shapes.draw(
            owner.description,
            self.name,
            config.tuning,
            torch.float32 if config.tuning.mode == "full" else dtype,
            attention=attention,
            checkpointing=config.train.gradient_checkpointing is True,
            shorten=shorten,
        )
        base: Any = unwrap(self.model)
        self.kind: Any = "seq2seq" if getattr(base.config, "is_encoder_decoder", False) else "causal"
        self.real_masks = device == "cpu"
        self.fakes = FakeTensorMode()
        vocabulary = int(base.config.get_text_config().vocab_size)
        live = Live(rounding=ROUNDING[device], vocabulary=vocabulary, fake=True)
        with self._faking(live):
            shapes.fill(self.model, dtype)
            self.passes = Passes(self.model, config, live, device=device)

    def moment(self, size: int) -> int:
        """Bytes of a number of `size` bytes for every trained weight, allocated weight by weight."""
        live = self.passes.live
        return sum(live.rounded(weight.numel() * size) for weight in self.passes.trained)

    def follow(self, real: MicroBatch, act: Callable[[Passes, MicroBatch], list[Window]]) -> list[Window]:
        """The windows of `act` on a micro-batch of the shapes of `real`."""
        mask = real.inputs.get("attention_mask")
        seen = None if mask is None or not self.real_masks else mask.bool()
        with self._faking(self.passes.live):
            inputs = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in real.inputs.items()}
            if seen is not None:  # rows of one length need no mask: transformers sees that of a real tensor alone
                inputs["attention_mask"] = seen
            targets = torch.empty(real.targets.shape, dtype=torch.long)
            micro = MicroBatch(inputs, targets, real.rows, real.computed, real.labelled, real.seq2seq)
            return act(self.passes, micro)

    @contextlib.contextmanager
    def _faking(self, live: Live) -> Iterator[None]:
        step_log = logging.getLogger("sft.step")
        before, step_log.level = step_log.level, logging.ERROR
        try:
            with self.fakes, live, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except ModelError:
            raise
        except Exception as error:  # whatever a model's own code does with tensors that have no values
            log.debug("tracing %s failed", self.name, exc_info=True)
            raise ModelError(
                f"{self.name} cannot be planned: its code needs values, and a plan has shapes alone"
                f" ({type(error).__name__}: {' '.join(str(error).split())[:160]})",
                where="config.json",
                fix="train it with --force: the batch size is measured on the card",
            ) from None
        finally:
            step_log.level = before
