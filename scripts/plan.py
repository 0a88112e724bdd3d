"""Will it fit: the memory that a run needs, traced before anything but the model's config.json is here.

    python scripts/plan.py --gpu "RTX 4060" --set model.max_seq_len=2048 --json

Reads the run's config and the model's config.json; writes nothing but the picture asked for, and keeps its traces in
.cache/planner. Exit 0 whether it fits or not: the answer is `fits`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from sft import console

EXAMPLES = """
python scripts/plan.py                            # this machine
python scripts/plan.py --gpu "RTX 4060"           # a card, by name or by its memory: --gpu 8GiB, --gpu cpu
python scripts/plan.py --gpu 12GiB --png plan.png # with a picture of where the memory goes
python scripts/plan.py --gpu 24GiB --models       # which models of the shipped list fit, at this config's settings
python scripts/plan.py --models my-models.txt     # of a file with a name a line, or of names
"""


def build_parser() -> argparse.ArgumentParser:
    made = console.parser("Say whether a run fits a card, and where its memory goes.", EXAMPLES)
    made.add_argument("--gpu", metavar="CARD", help='`8GiB`, `"RTX 4060"` or `cpu` (default: this machine)')
    made.add_argument(
        "--models", metavar="NAME", nargs="*", help="which of these fit: names, a file of names, or the shipped list"
    )
    made.add_argument("--png", metavar="FILE", type=Path, help="draw where the memory goes")
    return made


def main(args: argparse.Namespace) -> dict[str, Any]:
    from sft.config.load import load
    from sft.memory import devices, plan
    from sft.memory import report as answer
    from sft.memory import report as catalogue

    root = console.project_root()
    config = load(args.config, args.set, root=root).config
    device = devices.parse(args.gpu) if args.gpu else devices.here()
    if args.models is not None:
        names = catalogue.listed(args.models)
        with console.progress("planning models") as report:
            found = catalogue.each(names, config, device, root, report)
        return show_models(found, device, f"{config.tuning.mode}, rows of {config.model.max_seq_len} tokens")
    with console.progress("tracing the model"):
        made = plan.make_plan(config, catalogue.description(config.model, root), device, root=root)
    took = answer.duration(made, config, catalogue.description(config.model, root), root)
    show(answer.tables(made), answer.lines(made, took))
    if args.png:
        from sft.memory import report as picture

        picture.draw(made, args.png)
        console.say(f"picture: {args.png}")
    return {"model": config.model.name, **made.to_json(), "time": took and took.to_json()}


def show(tables: list[Any], lines: list[str]) -> None:
    """Tables and sentences of the answer."""
    for title, columns, rows in tables[:2]:
        console.table(title, columns, rows)
    for line in lines:
        console.say(line)
    for title, columns, rows in tables[2:]:
        console.table(title, columns, rows)


def show_models(found: dict[str, Any], device: Any, settings: str) -> dict[str, Any]:
    """A table of models, smallest first, and the largest that fits."""
    rows = [
        (name, f"{one['billions']:.2f}", f"{one['peak_gib']:.1f}", one["batch_size"], "yes" if one["fits"] else "no")
        if "peak_gib" in one
        else (name, "", "", "", "?")
        for name, one in found.items()
    ]
    console.table(f"{device.name}, {settings}", ("model", "10^9", "peak GiB", "rows", "fits"), rows)
    console.say("10^9: parameters; rows: at a time, in a micro-batch")
    for name, one in found.items():
        if "error" in one:
            console.warn(f"{name} is not planned: {one['error']}")
    fitting = [name for name, one in found.items() if one.get("fits")]
    return {"largest": fitting[-1] if fitting else None, "fit": fitting, "models": found}


if __name__ == "__main__":
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled here: spares a second of imports
    console.run(build_parser(), main)
