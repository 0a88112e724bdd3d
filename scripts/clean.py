"""Removes what the kit generated: processed data, runs, adapters, logs. Never data/raw, never configs, never models.

python scripts/clean.py            asks first
python scripts/clean.py --force    does not
"""

from __future__ import annotations

import argparse
import shutil
from typing import Any

from sft import console
from sft.files import format_bytes, size

GENERATED = (
    "data/processed",
    "data/advised",
    "data/processed_with_style",
    "data/rendered",
    "outputs",
    "adapters",
    ".cache",
)


def parser() -> argparse.ArgumentParser:
    result = console.parser(__doc__, config=False)
    result.add_argument("--force", action="store_true", help="do not ask first")
    return result


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Lists the generated folders, asks, removes them."""
    from sft.report import tensorboard

    root = console.project_root()
    paths = [root / name for name in GENERATED if (root / name).exists()]
    if not paths:
        console.say("nothing to remove")
        return {"removed": []}
    for path in paths:
        count = sum(file.is_file() for file in path.rglob("*"))
        console.say(f"  {path.relative_to(root)}: {count} files, {format_bytes(size(path))}")
    if not console.confirmed("Remove all of these? Trained adapters go too.", args.force, "make clean FORCE=1"):
        console.say("nothing was removed")
        return {"removed": []}
    tensorboard.stop(root / "outputs" / "tb")
    for path in paths:
        shutil.rmtree(path)
    console.say("removed; data/raw, configs and models were not touched")
    return {"removed": [str(path.relative_to(root)) for path in paths]}


if __name__ == "__main__":
    console.run(parser(), main)
