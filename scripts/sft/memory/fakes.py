"""Operations on tensors that have no values: answered where one is read, and quick where nothing but a shape is asked.

FakeTensorMode works out every operation with care for cases that a step does not have. Of those that are plain (views,
pointwise ones, products) PyTorch's own meta kernels are asked directly: the same shapes and storages in half the time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

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
