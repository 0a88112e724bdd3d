"""Measures a model on held-out rows: answers them, scores the answers, and sets base, tuned and a parrot side by side.

python scripts/eval.py --split test              the newest run on the test split
python scripts/eval.py --split test --both       its base too, in one go
python scripts/eval.py --predictions FILE        scores answers made elsewhere; loads no model
Writes outputs/metrics.json, outputs/samples.jsonl and the run's own copies.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft import console

EXAMPLES = """
python scripts/eval.py --split test --both
python scripts/eval.py --adapters adapters/my-run --limit 100 --samples 3
python scripts/eval.py --predictions answers.jsonl --metrics rougeL,sari,exact_match --json
"""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    made = console.parser("Measure a model on held-out rows.", EXAMPLES)
    made.add_argument("--split", choices=["val", "test"], default="val", help="which rows (default: val)")
    made.add_argument("--limit", type=int, metavar="N", help="the first N rows; 0 is all (default: eval.limit)")
    made.add_argument("--base", action="store_true", help="score the base alone and keep the tuned side's scores")
    made.add_argument("--both", action="store_true", help="score the base and the tuned model")
    made.add_argument("--adapters", type=Path, metavar="DIR", help="an adapter (default: the newest run's)")
    made.add_argument("--merged", type=Path, metavar="DIR", help="a folder of merged weights")
    made.add_argument("--metrics", metavar="A,B", help="metrics instead of eval.metrics")
    made.add_argument("--samples", type=int, default=0, metavar="N", help="print N answers")
    made.add_argument("--predictions", type=Path, metavar="FILE", help="score this file of answers, with no model")
    return made


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Choose the model, read the rows, answer and score them, write, show."""
    root = console.project_root()
    if args.metrics:
        args.set.append(f"eval.metrics=[{args.metrics}]")
    if args.predictions is not None:
        return score_file(args, root)
    from sft.data import store
    from sft.errors import ConfigError, DataError
    from sft.generation import load as targets

    if args.base and args.both:
        raise ConfigError("--base is one side, --both is two", fix="give one of them")
    target = targets.resolve_model(
        Path(args.config), args.set, adapters=args.adapters, merged=args.merged, base=args.base,
        is_default=args.config == console.default_config(), root=root,
    )  # fmt: skip
    stage = store.paths(target.config.data, root)
    path = stage.test if args.split == "test" else stage.val
    if path is None:
        raise DataError(f"there are no {args.split} rows", where=f"data.{args.split}_path", fix="make process")
    limit = target.config.eval.limit if args.limit is None else args.limit
    rows = store.read_rows(path)[: limit or None]
    return evaluate(args, root, target, stage.train, rows)


def evaluate(args: argparse.Namespace, root: Path, target: Any, train: Path | None, rows: list[Any]) -> dict[str, Any]:
    """The sides that are asked for, the best constant answer, the files and the table."""
    from sft import files
    from sft.generation import evaluate as sides
    from sft.report import results

    wanted = ["base"] if args.base else ["tuned", "base"] if args.both else ["tuned"]
    console.say(f"{target.name}: {len(rows)} rows of the {args.split} split")
    with console.progress("answering") as advance:
        found = sides.evaluate_base_and_tuned(target, wanted, rows, root, advance)
    result = results.merged(
        files.read_json(root / "outputs" / results.METRICS), run=target.name, split=args.split, rows=len(rows),
        sides={side: one.metrics for side, one in found.items()}, constant=sides.constant(target, train, rows),
        fields={side: one.fields for side, one in found.items()},
        tags={side: one.by_tag for side, one in found.items()},
    )  # fmt: skip
    first = found.get("tuned") or found["base"]
    samples = results.both_sides(first.samples, found["base"].samples) if len(found) == 2 else first.samples
    results.write(root / "outputs", target.run.folder if target.run else None, result, samples)
    show(result, samples[: args.samples])
    return result


def show(result: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
    """The table, and some answers."""
    from sft.report import results

    console.table(f"{result['run']}, {result['split']} split, {result['rows']} rows", *results.table(result))
    for side, by_tag in result.get("by_tag", {}).items():
        console.table(f"{side}, by tag", *results.tags_table(by_tag))
    if other := results.other_rows(result):
        console.warn(other)
    for sample in samples:
        console.say(results.sample_text(sample))
    console.say("\nwritten: outputs/metrics.json, outputs/samples.jsonl")


def score_file(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Scores a file of answers; touches nothing."""
    from sft.config.load import load, resolve_path
    from sft.metrics import predictions, scoring
    from sft.report import results

    section = load(args.config, args.set, root=root).config.eval
    loaded = scoring.load(resolve_path(root, section.json_schema)) if section.json_schema else None
    found = predictions.score_file(
        args.predictions, section.metrics, stemmer=section.rouge_stemmer, json_schema=loaded,
        pattern=scoring.compiled(section.format), strict=bool(args.metrics),
    )  # fmt: skip
    table = [[name, f"{value:.6f}"] for name, value in found.metrics.items()]
    console.table(f"{args.predictions}, {found.rows} rows", ["metric", "value"], table)
    if found.by_tag:
        console.table("by tag", *results.tags_table(found.by_tag))
    return {"rows": found.rows, "metrics": found.metrics} | ({"by_tag": found.by_tag} if found.by_tag else {})


if __name__ == "__main__":
    console.run(parser(), main)
