"""Where a model is written to: may it be written, is there room?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sft.errors import EnvironmentProblem


def need(out: Path, size: int, what: str) -> None:
    """Raises EnvironmentProblem unless `out` can be made, on a disk with `size` bytes free and some to spare."""
    place = out.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "you may not write there" if place.is_dir() else "it is a file"
        raise EnvironmentProblem(f"{out} cannot be made in {place}: {why}", where="--out", mend="name another: --out")
    wanted, free = size + (64 << 20), shutil.disk_usage(place).free
    if wanted > free:
        raise EnvironmentProblem(
            f"{what} needs {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} are free",
            where=str(place),
            mend="make room there, take a smaller type (fp16, bf16, q8_0), or --out on another disk",
        )
