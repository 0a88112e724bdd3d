"""Counts the bytes of every live tensor, and answers operations on tensors that have no values."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

PARTS = (
    "weights in 4 bit", "weights", "embedding and head", "adapters", "gradients", "optimizer", "activations", "logits",
    "dequantised", "weights cast", "consolidation", "gathered",
)  # fmt: skip
MODEL_PARTS = frozenset(("weights", "embedding and head", "adapters"))
GATHERING = frozenset(("all_gather_copy_in", "_allgather_base_", "split_with_sizes_copy", "_reduce_scatter_base_"))


@dataclass(frozen=True)
class Interval:
    """The highest moment between two labels, in bytes. parts: those of the peak. sent: by a trace, to other ranks."""

    label: str
    peak: int
    parts: dict[str, int]
    sent: int = 0


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live storages at every operation, sorted into PARTS; works on real and on fake tensors.

    It sees the results of operations and follows their storages by weak references. What a kernel allocates inside is
    not seen, except in bitsandbytes' 4-bit product, whose dequantised weight is added.
    rounding: bytes that an allocation is rounded up to. vocabulary: the last dimension by which logits are recognised.
    fake: whether the tensors have no values.
    """

    def __init__(self, *, rounding: int, vocabulary: int, fake: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rounding, self.vocabulary, self.fake = rounding, vocabulary, fake
        self.now: dict[str, int] = dict.fromkeys(PARTS, 0)
        self.total = 0
        self.part: str | None = None  # what new storages are counted as, None to recognise them
        self._storages: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._run = fake_ops() if fake else lambda func, args, kwargs: func(*args, **kwargs)
        self._resize = torch.UntypedStorage.resize_
        self.reset()

    def __enter__(self) -> MemoryTracker:
        """Follows resizes too, which are no operations: `fully_shard` frees and allocates a layer's weights by them."""
        tracker, resize = self, self._resize

        def resized(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            ref, part, old = tracker._storages.get(storage._cdata, (None, "", 0))
            if ref is not None and ref() is not None:
                new = tracker.rounded(size)
                tracker._storages[storage._cdata] = (ref, part, new)
                tracker.now[part] += new - old
                tracker.total += new - old
                tracker._update_peak()
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled around a trace, and every call would pay for the guard

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._run(func, args, kwargs or {})
        name = func.overloadpacket.__name__
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(local(tensor), self.part or self._recognise(name, tensor, args))
        if name in GATHERING:  # the sharded weights themselves are arguments of the first
            buffers = out if name == "all_gather_copy_in" else (args, kwargs)
            self.assign([tensor for tensor in tree_iter(buffers) if isinstance(tensor, Tensor)], "gathered")
            if "_base_" in name:  # each rank passes on all parts but one
                self.sent += abs(args[0].nbytes - args[1].nbytes)
        if name == "gemm_4bit":  # dequantises the weight and its scales for itself
            weights = args[2][0] * args[2][1]
            self._update_peak(weights * args[0].element_size() + weights // 64 * 4)
        if name == "_reduce_scatter_base_" and self.fake and self.rounding == 1:  # gloo, on a CPU, copies its input
            self._update_peak(args[1].nbytes, "gathered")
        return out

    def rounded(self, size: int) -> int:
        """Bytes that an allocation of `size` bytes takes."""
        return size + -size % self.rounding

    def assign(self, tensors: Iterable[Tensor], part: str) -> None:
        """Counts the tensors' storages as `part`, whatever they were counted as before."""
        for tensor in map(local, tensors):
            key = tensor.untyped_storage()._cdata
            ref, old, size = self._storages.get(key, (None, "", 0))
            if ref is None or ref() is None:
                self._add(tensor, part)
            elif old != part:
                self.now[old] -= size
                self.now[part] += size
                self._storages[key] = (ref, part, size)

    def reset(self) -> None:
        """Forgets the intervals so far; a first one without a label begins."""
        self.intervals: list[Interval] = []
        self.sent = 0  # bytes to other ranks, as a ring sends them
        self._begin("")

    def mark(self, label: str) -> None:
        """Ends the current interval and begins the next one, called `label`."""
        self.intervals.append(Interval(self._label, self.peak, self.at_peak))
        self._begin(label)

    def finish(self) -> list[Interval]:
        """The intervals since `reset`."""
        self.mark("")
        return self.intervals

    def _begin(self, label: str) -> None:
        self._label, self.peak, self.at_peak = label, self.total, dict(self.now)

    def _add(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        if known is not None and known[0]() is not None:
            return
        size = self.rounded(storage.nbytes())
        self._storages[key] = (weakref.ref(storage, lambda ref: self._remove(key, ref)), part, size)
        self.now[part] += size
        self.total += size
        self._update_peak()

    def _remove(self, key: int, ref: Any) -> None:
        known = self._storages.get(key)
        if known is not None and known[0] is ref:
            del self._storages[key]
            self.now[known[1]] -= known[2]
            self.total -= known[2]

    def _update_peak(self, inside: int = 0, part: str = "dequantised") -> None:
        """inside: bytes of `part` that the operation allocates for itself."""
        if self.total + inside > self.peak:
            self.peak, self.at_peak = self.total + inside, dict(self.now)
            self.at_peak[part] += inside

    def _recognise(self, name: str, tensor: Tensor, args: Any) -> str:
        if tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary and tensor.is_floating_point():
            return "logits"
        if name == "dequantize_4bit":
            return "dequantised"
        if name == "_to_copy":
            _, source, _ = self._storages.get(args[0].untyped_storage()._cdata, (None, "", 0))
            if source in MODEL_PARTS:
                return "weights cast"
            if source == "dequantised":
                return "dequantised"
        return "activations"


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, any other as it is."""
    return getattr(tensor, "_local_tensor", tensor)


aten = torch.ops.aten


def fake_ops() -> Callable[[Any, Any, Any], Any]:
    """A function that runs operations on fake tensors, with a stand-in wherever a value would be read.

    Flags are true, masks choose every position, integers are 1, and floats fall with every read, so that the last of
    several candidates is the best. No layer is dropped.
    """
    reads = itertools.count(1)

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            value = args[0]
            if value.dtype == torch.bool:
                return not getattr(value, "sft_false", False)
            return 1e-6 / next(reads) if value.is_floating_point() else 1
        if packet is aten.nonzero:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
        if packet.__name__ == "_grouped_mm":  # the experts' product: its shape rule accepts only bf16
            half = [args[0].to(torch.bfloat16), args[1].to(torch.bfloat16), *args[2:]]
            return func(*half, **kwargs).to(args[0].dtype)
        # a real mask (see `_FakeModel.trace`) becomes a fake one where it enters a computation
        args = [torch.empty(a.shape, dtype=a.dtype) if type(a) is Tensor and a.ndim == 2 else a for a in args]
        if packet in (aten.index, aten.index_put, aten.index_put_):
            args[1] = _positions(args[1])
        out = func(*args, **kwargs)
        if packet is aten.lt and args[0].ndim == 0 and isinstance(args[1], float):
            out.sft_false = True  # `random number < layer-drop rate`
        return out

    return run


def _positions(indices: Any) -> list[Any]:
    """Indices in which a mask is replaced by as many positions as it has."""
    result: list[Any] = []
    for index in indices:
        mask = index is not None and index.dtype == torch.bool
        result += [index.new_empty(index.numel(), dtype=torch.long)] * index.ndim if mask else [index]
    return result
