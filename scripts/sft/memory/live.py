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

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sft.memory.fakes import Fakes

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
