"""Is the tuned model better than its base, and what has it forgotten? Both answer the same rows, greedily; one report.

    python scripts/compare.py                              the newest run on its test rows
    python scripts/compare.py --adapters adapters/first adapters/second --general my_questions.jsonl --limit 200
    python scripts/compare.py --judge-url http://localhost:8000/v1 --judge-model NAME      (key: JUDGE_API_KEY)

Writes outputs/<run>/report/: index.html, compare.json, answers.jsonl and the model card, README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sft import console


def parser() -> argparse.ArgumentParser:
    flags = console.parser(__doc__)
    add = flags.add_argument
    add("--adapters", type=Path, nargs="+", default=[], metavar="DIR", help="adapters, or whole models")
    add("--split", choices=["val", "test"], help="which rows (default: test if there is one, else val)")
    add("--limit", type=int, metavar="N", help="only the first N rows; 0: all (default: eval.limit)")
    add("--general", metavar="FILE", help="general questions instead of ours, or `none`")
    add("--judge-url", metavar="URL", help="an OpenAI-style address, such as http://localhost:8000/v1")
    add("--judge-model", metavar="NAME", help="the model's name at that address")
    add("--judge-limit", type=int, default=50, metavar="N", help="rows to judge (default 50; 0: all)")
    add("--seed", type=int, default=0, help="seed of the bootstrap (default 0)")
    return flags


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Choose models and rows, answer, compare, ask the judge, write the report."""
    from sft.config.load import display_path
    from sft.errors import ConfigError
    from sft.generation import evaluate
    from sft.report import compare
    from sft.report.judge import Judge

    root, is_default = console.project_root(), args.config == console.default_config()
    targets = compare.targets(Path(args.config), args.set, args.adapters, is_default, root)
    split, rows, train = evaluate.held_out_rows(targets[0].config, args.split, args.limit, root, targets[0].folder)
    general = [] if args.general == "none" else compare.general_rows(Path(args.general) if args.general else None, root)
    if bool(args.judge_url) != bool(args.judge_model):
        raise ConfigError("a judge needs both --judge-url and --judge-model", fix="give both, or neither")
    judge = Judge(args.judge_url, args.judge_model) if args.judge_url else None
    if judge is not None:
        judge.check()
    names = ", ".join(compare.unique_names(targets))
    console.say(f"{names}: {len(rows)} rows of the {split} split, {len(general)} general questions")
    with console.progress("answering") as advance:
        measured = compare.measure_sides(targets, rows, general, root, advance)
    constant = evaluate.constant_baseline(targets[0].config, train, rows)
    result = compare.build_result(targets, measured, general, split, args.seed, constant, root)
    folder = compare.write(result, measured, targets[0], root)
    if judge is not None:
        with console.progress("judging") as advance:
            compare.add_judge_scores(result, judge, measured, args.judge_limit, args.seed, advance)
        compare.write(result, measured, targets[0], root)
    show(result)
    console.say(f"\nreport: {display_path(folder / 'index.html', root)}")
    return result


def show(result: dict[str, Any]) -> None:
    """The verdicts and a table for each tuned model."""
    from sft.report.compare_page import directed
    from sft.report.html import number

    columns = ["metric", "base", "tuned", "95 % of change", "won/lost", "finding"]
    for compared in result["comparisons"]:
        rows = [
            [directed(name), number(m["base"]), number(m["tuned"]), f"{m['low']:+.2g} to {m['high']:+.2g}",
             f"{m['wins']}/{m['losses']}", m["finding"]]
            for name, m in compared["metrics"].items()
        ]  # fmt: skip
        console.table(f"{compared['name']} against its base ({result['base']})", columns, rows)
        console.say(f"{compared['verdict']['headline']}: {compared['verdict']['words']}")
        if general := compared.get("general"):
            speak = console.warn if general["level"] == "forgotten" else console.say
            speak(f"{general['headline']}: {general['words']}")
        for key in ("constant_baseline", "stopping"):
            if finding := compared.get(key):
                (console.say if finding["good"] else console.warn)(finding["headline"])
        if judged := compared.get("judge"):
            changes = ", ".join(f"{name} {entry['difference']:+.2f}" for name, entry in judged["aspects"].items())
            scores = f"{changes} ({judged['rows']} rows)" if judged["rows"] else judged["problem"]
            console.say(f"judge {judged['model']}: {scores}")


if __name__ == "__main__":
    console.run(parser(), main)
