"""What Triton's interpreter lacks for Liger's kernels, which call CUDA's library and get floats as scalars."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl
from liger_kernel.ops import geglu, rms_norm
from triton.runtime import interpreter


@triton.jit
def rsqrt(x):  # type: ignore[no-untyped-def]
    return 1.0 / tl.sqrt(x)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


def prepare(patch: pytest.MonkeyPatch) -> None:
    convert = interpreter._implicit_cvt

    def scalar(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    patch.setattr(interpreter, "_implicit_cvt", scalar)
    patch.setattr(rms_norm, "rsqrt", rsqrt)
    patch.setattr(geglu, "tanh", tanh)
