"""Merges an adapter into its full-precision base, checks the result, and leaves a model that any library can load.

    python scripts/merge_lora.py                                          adapters/last -> outputs/merged_fp16
    python scripts/merge_lora.py --adapters adapters/run --out DIR --dtype bf16
    python scripts/merge_lora.py --out DIR --test                         load DIR and generate an answer
    python scripts/merge_lora.py --set model.name=/new/place/of/the/base

Reads the adapter, the config beside it (which names base and template) and the base's full-precision weights, tensor by
tensor; writes safetensors, tokenizer, chat template, stop tokens and merge.json with the figures.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft import console


def parser() -> argparse.ArgumentParser:
    flags = console.parser(__doc__)
    add = flags.add_argument
    add("--adapters", metavar="DIR", type=Path, help="the adapter's folder (default: adapters/last)")
    add("--out", metavar="DIR", type=Path, help="the result (default: outputs/merged_DTYPE)")
    add("--dtype", choices=["fp16", "bf16", "fp32"], default="fp16", help="its dtype (default: fp16)")
    add("--test", action="store_true", help="do not merge: load --out and generate an answer")
    add("--prompt", help="the question for --test (default: the first held-out row of its run)")
    return flags


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Merges with a progress bar and prints the figures; or, with --test, asks the merged model a question."""
    from sft.ship.verify import smoke_test

    root = console.project_root()
    out = args.out or root / "outputs" / f"merged_{args.dtype}"
    if not args.test:
        return _merge(args, out, root)
    result = smoke_test(out, args.prompt, root)
    console.say(result.summary())
    return asdict(result)


def _merge(args: argparse.Namespace, out: Path, root: Path) -> dict[str, Any]:
    from rich.filesize import decimal

    from sft.config.load import display_path, load
    from sft.ship.merge import merge

    loaded = load(args.config, args.set, root=root)
    base = loaded.config.model.name if str(loaded.origin("model.name")).startswith("--set") else None
    with console.progress("merging") as advance:
        report = merge(args.adapters or root / "adapters" / "last", out, args.dtype, root, advance, base=base)
    shown = display_path(out, root)
    rows = [
        ("base", report.base),
        ("adapter", display_path(Path(report.adapter).resolve(), root)),
        ("tensors changed", f"{report.tensors}, {report.changed_share:.1%} of their numbers"),
        ("adapter on the full-precision base -> merged model", ""),
        ("  on rows", f"{report.held_out_rows} of {report.held_out_of} of {report.held_out}"),
        ("  on tokens", f"{report.held_out_tokens:,}"),
        ("  loss", f"{report.loss_adapter:.4f} -> {report.loss_merged:.4f}"),
        ("  same most likely token", f"{report.top1_agreement:.2%}"),
        ("  KL divergence", f"{report.mean_kl:.2g} nats per token"),
        ("  largest logit difference", f"{report.max_logit_difference:.2g}"),
        ("size", f"{decimal(report.bytes)}, {report.dtype}"),
        ("time", f"{report.seconds:.0f} s"),
    ]
    console.table(f"merged into {shown}", ["", "value"], rows)
    if report.trained_on != report.measured_on:
        what = f"The adapter was trained on the {report.trained_on} base, but merged into the full-precision one and"
        command = console.as_typed(f"python scripts/eval.py --merged {shown}")
        console.say(f"{what} measured on it. To measure the difference: {command}")
    commands = (f"python scripts/merge_lora.py --test --out {shown}", f"python scripts/infer.py --merged {shown}")
    if os.environ.get("SFT_MAKE"):
        commands = (f"make merge-test OUT={shown}", f'make infer ARGS="--merged {shown}"')
    console.say(console.as_typed("next: {}\n      {}".format(*commands)))
    return asdict(report)


if __name__ == "__main__":
    console.run(parser(), main)
