"""Will it fit: the memory that a training step needs, traced before anything but the model's config.json is here.

    python scripts/plan.py --gpu 8GiB
    python scripts/plan.py --gpu "RTX 4060" --set model.max_seq_len=2048 --json

Reads the run's config and the model's config.json; writes nothing. Exit 0 whether it fits or not: the answer is `fits`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from sft import console

if TYPE_CHECKING:
    from sft.memory.devices import Device
    from sft.memory.plan import Plan

EXAMPLES = """
python scripts/plan.py                            # this machine
python scripts/plan.py --gpu "RTX 4060"           # a card, by name or by its memory: --gpu 8GiB
python scripts/plan.py --gpu 24GiB --models       # which Qwen2.5 fits, at this config's settings
"""


def build_parser() -> argparse.ArgumentParser:
    made = console.parser("Say whether a run fits a card, and where its memory goes.", EXAMPLES)
    made.add_argument("--gpu", metavar="CARD", help='`8GiB`, `"RTX 4060"` or `cpu` (default: this machine)')
    made.add_argument("--models", action="store_true", help="for each known model: does it fit?")
    return made


def main(args: argparse.Namespace) -> dict[str, Any]:
    from sft.config.load import load
    from sft.memory import devices, plan, shapes
    from sft.model import hub

    root = console.project_root()
    config = load(args.config, args.set, root=root).config
    device = devices.parse(args.gpu) if args.gpu else devices.here()
    if args.models:
        known = {name: shapes.of_known(name, config.tuning) for name in shapes.known_models()}
        return show_models({name: plan.make_rough(config, each, device) for name, each in known.items()}, device)
    description = shapes.known_models().get(config.model.name)
    if description is None or hub.local_folder(config.model.name, root) is not None:
        description = hub.find(config.model, root, weights=False).config
    made = plan.make(config, description, device)
    show(made)
    return {"model": config.model.name, **made.to_json()}


def show(made: Plan) -> None:
    """A table of where the memory goes, the answer, and what would mend it."""
    from sft.memory import devices

    train, needed = made.config.train, made.estimate
    rows = [(name, f"{size:.2f}") for name, size in needed.parts.items()]
    rows += [("allocated at the peak", f"{needed.allocated:.2f}"), ("with context and slack", f"{needed.peak:.2f}")]
    console.table(f"{made.config.model.name}, {made.config.tuning.mode} ({made.method})", ("part", "GiB"), rows)
    answer = "fits" if made.fits else "does NOT fit"
    console.say(f"{answer} {made.device.name} ({made.device.gib:.1f} GiB)")
    console.say(
        f"a step: {train.effective_batch} rows, {train.batch_size} of {made.config.model.max_seq_len} tokens at a time"
        f" (micro-batches of at most {train.micro_batch_tokens} tokens)"
    )
    if not made.fits:
        if card := devices.smallest_card(needed.peak):
            console.say(f"the smallest card that would do: {card}")
        lines = [(r.setting, f"{r.saves_gib:.2f}", r.costs, "yes" if r.fits else "no") for r in made.remedies]
        console.table("what would help", ("--set", "saves GiB", "costs", "enough alone"), lines)


def show_models(plans: dict[str, Plan], device: Device) -> dict[str, Any]:
    """A table of models, largest that fits named last."""
    rows = [
        (name, f"{made.estimate.peak:.1f}", made.config.train.batch_size, "yes" if made.fits else "no")
        for name, made in plans.items()
    ]
    columns = ("model", "GiB at the peak", "rows at a time", "fits")
    console.table(f"{device.name}, {device.gib:.1f} GiB (closed form, rough)", columns, rows)
    fitting = [name for name, made in plans.items() if made.fits]
    return {
        "largest": fitting[-1] if fitting else None,
        "models": {name: made.to_json() for name, made in plans.items()},
    }


if __name__ == "__main__":
    console.run(build_parser(), main)
