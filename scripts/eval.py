"""Evaluates a model on held-out rows: answers and scores them, tuned, base or both, beside the best constant answer.

    python scripts/eval.py --split test              the newest run on the test split
    python scripts/eval.py --split test --both       its base too, in one go
    python scripts/eval.py --adapters adapters/my-run --limit 100 --samples 3
    python scripts/eval.py --predictions answers.jsonl --metrics rougeL,sari,exact_match --json

Writes outputs/metrics.json, outputs/samples.jsonl and the run's own copies; with --predictions neither model nor file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft import console


def parser() -> argparse.ArgumentParser:
    flags = console.parser(__doc__)
    add = flags.add_argument
    add("--split", choices=["val", "test"], default="val", help="which rows (default: val)")
    add("--limit", type=int, metavar="N", help="only the first N rows; 0: all (default: eval.limit)")
    add("--base", action="store_true", help="score only the base; the tuned scores stay")
    add("--both", action="store_true", help="score the base and the tuned model")
    add("--adapters", type=Path, metavar="DIR", help="an adapter (default: the newest run's)")
    add("--merged", type=Path, metavar="DIR", help="a folder of merged weights")
    add("--metrics", metavar="A,B", help="metrics instead of eval.metrics")
    add("--samples", type=int, default=0, metavar="N", help="print N answers")
    add("--predictions", type=Path, metavar="FILE", help="score the answers in this file, without a model")
    return flags


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Choose the model, read the rows, answer and score them, write the results, print them."""
    root = console.project_root()
    if args.metrics:
        args.set.append(f"eval.metrics=[{args.metrics}]")
    if args.predictions is not None:
        return score_file(args, root)
    from sft import files
    from sft.errors import ConfigError
    from sft.generation import evaluate, load
    from sft.metrics import predictions

    if args.base and args.both:
        raise ConfigError("--base and --both exclude each other", fix="use one of them")
    sides = ["base"] if args.base else ["tuned", "base"] if args.both else ["tuned"]
    target = load.resolve_model(
        Path(args.config), args.set, adapters=args.adapters, merged=args.merged, base=args.base,
        is_default=args.config == console.default_config(), root=root,
    )  # fmt: skip
    split, rows, train = evaluate.held_out_rows(target.config, args.split, args.limit, root, target.folder)
    console.say(f"{target.name}: {len(rows)} rows of the {split} split")
    with console.progress("answering") as advance:
        evaluations = evaluate.evaluate_sides(target, sides, rows, root, advance)
    result = predictions.merge_metrics(
        files.read_json(root / "outputs" / predictions.METRICS), run=target.name, split=split, rows=len(rows),
        sides={side: vars(evaluation) for side, evaluation in evaluations.items()},
        constant=evaluate.constant_baseline(target.config, train, rows),
    )  # fmt: skip
    samples = evaluations[sides[0]].samples
    if len(sides) == 2:
        bases = [{key: sample[key] for key in ("prediction", "scores")} for sample in evaluations["base"].samples]
        samples = [{**sample, "base": base} for sample, base in zip(samples, bases, strict=True)]
    predictions.write_results(root / "outputs", target.run.folder if target.run else None, result, samples)
    show(result, samples[: args.samples])
    return result


def show(result: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
    """Print the tables and some answers."""
    from sft.errors import one_line
    from sft.metrics import predictions

    title = f"{result['run']}, {result['split']} split, {result['rows']} rows"
    console.table(title, *predictions.metrics_table(result))
    if constant := result.get("constant"):
        answer = one_line(constant["answer"], 60)
        console.say(f"best constant answer: what always answering {answer!r} would score; a useful model is well above")
    for side, by_tag in result.get("by_tag", {}).items():
        console.table(f"{side}, by tag", *predictions.tags_table(by_tag))
    if warning := predictions.unequal_rows(result):
        console.warn(warning)
    for sample in samples:
        console.say(predictions.sample_text(sample))
    console.say("\nwritten: outputs/metrics.json, outputs/samples.jsonl")


def score_file(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Score a file of answers; no file is written."""
    from sft.config.load import load, resolve_path
    from sft.metrics import predictions, scoring

    section = load(args.config, args.set, root=root).config.eval
    schema = scoring.read_schema(resolve_path(root, section.json_schema)) if section.json_schema else None
    result = predictions.score_file(
        args.predictions, section.metrics, stemmer=section.rouge_stemmer, json_schema=schema,
        pattern=scoring.compiled(section.format), strict=bool(args.metrics),
    )  # fmt: skip
    table = [[name, f"{value:.6f}"] for name, value in result["metrics"].items()]
    console.table(f"{args.predictions}, {result['rows']} rows", ["metric", "value"], table)
    if "by_tag" in result:
        console.table("by tag", *predictions.tags_table(result["by_tag"]))
    return result


if __name__ == "__main__":
    console.run(parser(), main)
