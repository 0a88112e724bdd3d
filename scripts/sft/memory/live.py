"""Which tensors are alive, in bytes, at every moment of a computation: real tensors or fake ones alike.

A dispatch mode sees the result of every operation and follows its storage by a weak reference; what happens inside one
kernel is not seen (but bitsandbytes' 4-bit product, whose dequantised weight is added). Every storage belongs to one of
the PARTS; the parts at the highest moment are kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

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

    fake: whether tensors have no values, so that what reads them (a loop's end, a mask's size) is answered here.
    """

    def __init__(self, *, rounding: int, vocabulary: int, fake: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rounding, self.vocabulary, self.fake = rounding, vocabulary, fake
        self.now: dict[str, int] = dict.fromkeys(PARTS, 0)
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = dict(self.now)
        self.default = "activations"
        self.windows: list[Window] = []
        self._label, self._standing = "", 0
        self._held: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if self.fake:
            if packet is torch.ops.aten._local_scalar_dense:
                return self._value(args[0])
            if packet is torch.ops.aten.nonzero:
                return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
            args = _without_masks(packet, [_faked(each) for each in args])
        name = packet.__name__
        out = _grouped(func, args, kwargs) if self.fake and name == "_grouped_mm" else func(*args, **kwargs)
        if self.fake and name == "lt" and args[0].ndim == 0 and isinstance(args[1], float):
            out.sft_false = True  # a random number below a share: layers dropped while training, and none is here
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
        size = storage.nbytes()
        size += -size % self.rounding
        part = part or self.default
        self._held[key] = (weakref.ref(storage, lambda ref: self._gone(key, ref)), part, size)
        self.now[part] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.now)

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

    def _value(self, tensor: Tensor) -> Any:
        """A value for a tensor that has none: true; or ever smaller, so that of candidates the last one is the best."""
        self._reads += 1
        if tensor.dtype == torch.bool:
            return not getattr(tensor, "sft_false", False)
        return 1e-6 / self._reads if tensor.is_floating_point() else 1


def _faked(value: Any) -> Any:
    """A mask that came with its values, when it is computed with: the same without."""
    return torch.empty(value.shape, dtype=value.dtype) if type(value) is Tensor and value.ndim == 2 else value


def _without_masks(packet: Any, args: Any) -> Any:
    """Indexing by a mask as indexing by as many positions: every one counts as chosen."""
    if packet not in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
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
