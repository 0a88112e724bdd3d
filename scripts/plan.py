"""Will it fit: the memory that a run needs, traced from the model's config.json before anything else is downloaded.

    python scripts/plan.py                            this machine
    python scripts/plan.py --gpu "RTX 4060"           a card, by name or by its memory: --gpu 8GiB, --gpu cpu
    python scripts/plan.py --gpu 12GiB --png plan.png with a picture of where the memory goes
    python scripts/plan.py --gpu 24GiB --models       which models of the shipped list fit, with this config's settings
    python scripts/plan.py --models my-models.txt     of a file with one name per line, or of names
    python scripts/plan.py --gpu 2x24GiB --shard fsdp two cards that share the weights, and how fast they can be
    python scripts/plan.py --gpu H100 --shard fsdp --clusters --price 2     a table for 8 to 1,024 cards

Writes nothing but the picture of --png. Exits with 0 whether it fits or not: the answer is `fits`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import console

if TYPE_CHECKING:
    from sft.config.load import Loaded


def build_parser() -> argparse.ArgumentParser:
    parser = console.parser(__doc__)
    add = parser.add_argument
    add("--gpu", metavar="CARD", help='`8GiB`, `"RTX 4060"` or `cpu` (default: this machine)')
    add("--models", metavar="NAME", nargs="*", help="which of these fit: names, a file of names, or the shipped list")
    add("--shard", choices=("ddp", "zero2", "fsdp"), default="ddp", help="what several cards share (default: ddp)")
    add("--link", type=float, metavar="GB/S", help="between two cards, in each direction (default: as published)")
    add("--clusters", action="store_true", help="a table for 8 to 1,024 of the card")
    add("--price", type=float, metavar="X", help="of a card's hour, for the cost in that table")
    add("--png", metavar="FILE", type=Path, help="draw where the memory goes")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from sft.errors import ConfigError
    from sft.memory import devices, report
    from sft.memory.plan import make_plan

    root = console.project_root()
    loaded = console.load_config(args)
    if args.clusters and (args.models is not None or args.png):
        raise ConfigError("--clusters goes without --models and --png", where="--clusters", fix="leave the others out")
    if args.models is not None:
        return plan_models(args, loaded, root)
    device = devices.parse(args.gpu) if args.gpu else devices.this_machine()
    description = report.model_config(loaded.config.model, root)
    if args.price is not None and not args.clusters:
        raise ConfigError("a price is for the table of --clusters", where="--price", fix="add --clusters")
    if args.link is not None and not args.link > 0:
        raise ConfigError(f"{args.link:g} is no speed", where="--link", fix="--link 50, in GB/s")
    if args.clusters:
        with console.progress("tracing the model"):
            table, plans = report.scaling_table(loaded.config, description, device, args.shard, args.link, args.price)
        console.table(*table)
        console.say("GiB: of each card; k tokens, GB sent, s link, s math: of a step, sent by each; k/s: thousands")
        console.say("of tokens a second, at best with link and arithmetic overlapped; cost: of 10^9 tokens at k/s")
        return {"model": loaded.config.model.name, "clusters": plans}
    with console.progress("tracing the model"):
        plan = make_plan(loaded.config, description, device, sharding=args.shard, link=args.link)
    for line in report.verdict(plan):
        console.say(line)
    for table in report.tables(plan):
        console.table(*table)
    for line in report.help_lines(plan):
        console.say(console.as_typed(line))
    if args.png:
        report.draw(plan, args.png)
        console.say(f"picture: {args.png}")
    return {"model": loaded.config.model.name, **plan.to_json()}


def plan_models(args: argparse.Namespace, loaded: Loaded, root: Path) -> dict[str, Any]:
    """Plans many models, for a GPU and with QLoRA unless a flag says otherwise: configs/local.yaml may be a CPU's."""
    from sft.config.load import load
    from sft.memory import devices, report

    device = devices.parse(args.gpu) if args.gpu else devices.this_machine()
    if device.kind == "cpu" and not args.gpu:
        device = devices.parse("8GiB")
        console.say('no GPU here: planned for one of 8 GiB (another: --gpu "RTX 4060"; this CPU: --gpu cpu)')
    mode, by_flag = loaded.config.tuning.mode, str(loaded.origin("tuning.mode")).startswith("--set")
    if device.kind == "cuda" and mode != "qlora" and args.config == console.default_config() and not by_flag:
        console.say(
            console.as_typed(
                f"planned with {console.DEFAULT_CONFIG} (qlora); for {mode}: --config {console.LOCAL_CONFIG}"
            )
        )
        loaded = load(root / console.DEFAULT_CONFIG, args.set, root=root)
    names = report.model_names(args.models)
    with console.progress("planning models") as progress:
        results = report.plan_models(names, loaded.config, device, root, progress, args.shard)
    length = loaded.config.model.max_seq_len
    return show_models(results, f"{device.name}, {loaded.config.tuning.mode}, rows of {length} tokens")


def show_models(results: dict[str, Any], title: str) -> dict[str, Any]:
    """A table of models, smallest first; returns them with the largest that fits."""
    rows = [
        (
            name,
            f"{plan['billions']:.2f}",
            f"{plan['peak_gib']:.1f}",
            plan["batch_size"],
            "yes" if plan["fits"] else "no",
        )
        if "peak_gib" in plan
        else (name, "", "", "", "?")
        for name, plan in results.items()
    ]
    console.table(title, ("model", "10^9", "peak GiB", "rows", "fits"), rows)
    console.say("10^9: billions of parameters; rows: in one micro-batch")
    for name, plan in results.items():
        if "error" in plan:
            console.warn(f"{name} cannot be planned: {plan['error']}")
    fitting = [name for name, plan in results.items() if plan.get("fits")]
    return {"largest": fitting[-1] if fitting else None, "fit": fitting, "models": results}


if __name__ == "__main__":
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled here: saves a second of imports
    console.run(build_parser(), main)
