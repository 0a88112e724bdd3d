"""Rebuilds the demo model from generated text, or rewrites the shipped samples.

    python dev/make_demo_model.py                              models/demo, about half an hour on two cores
    python dev/make_demo_model.py --steps 5 --out /tmp/demo    a few steps, to see that it works
    python dev/make_demo_model.py --samples                    data/samples/support_desk.jsonl

It reads nothing. It writes the model, its tokenizer, `build_log.jsonl` (figures every 100 steps) and `build.json` (what
was built, when, with what). A build that was stopped goes on from the checkpoint in its folder.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from sft.console import out, parser, project_root, run


def arguments() -> argparse.ArgumentParser:
    flags = parser(__doc__, config=False)
    flags.add_argument("--out", type=Path, metavar="PATH", help="where it goes (default: models/demo, data/samples)")
    flags.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: the recipe's)")
    flags.add_argument("--seed", type=int, metavar="N", help="seed of text and weights (default: the recipe's)")
    flags.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    flags.add_argument("--samples", action="store_true", help="write the samples instead of building the model")
    return flags


def main(args: argparse.Namespace) -> dict[str, Any]:
    return write_samples(args) if args.samples else build_model(args)


def write_samples(args: argparse.Namespace) -> dict[str, Any]:
    from demo_model.samples import support_desk_jsonl
    from sft.files import write_text

    path = args.out or project_root() / "data/samples/support_desk.jsonl"
    rows = support_desk_jsonl()
    write_text(path, rows)
    return {"path": str(path), "rows": rows.count("\n")}


def build_model(args: argparse.Namespace) -> dict[str, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from demo_model import build, pretrain
    from sft.files import write_json

    folder = args.out or project_root() / "models/demo"
    overrides = {"steps": args.steps, "seed": args.seed}
    recipe = build.Recipe(**{key: value for key, value in overrides.items() if value is not None})
    device = pretrain.prepare(args.threads)
    folder.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out()) as bars:
        bar = bars.add_task("tokenizer", total=recipe.steps)

        def report(at: pretrain.Progress) -> None:
            bars.update(bar, completed=at.step, description=f"loss {at.loss:.3f}")

        tokenizer = build.train_tokenizer(recipe)
        model = build.new_model(recipe, len(tokenizer)).to(device)
        last = pretrain.pretrain(model, tokenizer, recipe, folder, report)
    build.save(model, tokenizer, folder)
    figures = build.figures(recipe, model) | asdict(last)
    write_json(folder / "build.json", figures)
    (folder / pretrain.CHECKPOINT).unlink(missing_ok=True)
    return figures


if __name__ == "__main__":
    run(arguments(), main)
