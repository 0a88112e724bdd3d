"""Is the tuned model better than its base, and what has it forgotten? Both answer the same rows, greedily; one report.

python scripts/compare.py                              the newest run on its test rows
python scripts/compare.py --adapters adapters/a adapters/b
python scripts/compare.py --judge-url http://localhost:8000/v1 --judge-model NAME      (key: JUDGE_API_KEY)
Writes outputs/<run>/report/: index.html, compare.json, answers.jsonl and the model card, README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sft import console

EXAMPLES = """
python scripts/compare.py --split test --limit 200
python scripts/compare.py --adapters adapters/first adapters/second --general my_questions.jsonl
python scripts/compare.py --judge-url http://localhost:8000/v1 --judge-model judge --judge-limit 50
"""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    made = console.parser("Compare base and tuned model on the same rows, and write a report.", EXAMPLES)
    made.add_argument("--adapters", type=Path, nargs="+", default=[], metavar="DIR", help="adapters, or whole models")
    made.add_argument(
        "--split", choices=["val", "test"], help="which rows (default: test where there is one, else val)"
    )
    made.add_argument("--limit", type=int, metavar="N", help="the first N rows; 0 is all (default: eval.limit)")
    made.add_argument("--general", metavar="FILE", help="general questions instead of ours, or `none`")
    made.add_argument("--judge-url", metavar="URL", help="an OpenAI-style address, such as http://localhost:8000/v1")
    made.add_argument("--judge-model", metavar="NAME", help="the judge's name there")
    made.add_argument(
        "--judge-limit", type=int, default=50, metavar="N", help="rows that are judged (default 50; 0: all)"
    )
    made.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    return made


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Choose the sides and the rows, let all answer, compare, ask the judge, write the report."""
    from sft.generation import evaluate
    from sft.report import compare

    root = console.project_root()
    targets = compare.targets(Path(args.config), args.set, args.adapters, args.config == console.default_config(), root)
    compare.check_one_base(targets)
    split, rows, train = compare.rows(targets[0], args.split, args.limit, root)
    asked = [] if args.general == "none" else compare.read(Path(args.general) if args.general else None, root)
    judged_by = compare.judge(args.judge_url, args.judge_model)
    console.say(
        f"{', '.join(compare.names(targets))}: {len(rows)} rows of the {split} split, {len(asked)} general questions"
    )
    with console.progress("answering") as advance:
        measured = compare.sides(targets, rows, asked, root, advance)
    result = compare.result(
        targets, measured, asked, split, args.seed, evaluate.constant(targets[0], train, rows), root
    )
    folder = compare.write(result, measured, targets[0], root)
    if judged_by is not None:
        with console.progress("judging") as advance:
            compare.add_judge(result, judged_by, measured, args.judge_limit, args.seed, advance)
        compare.write(result, measured, targets[0], root)
    show(result)
    console.say(f"\nreport: {folder / 'index.html'}")
    return result


def show(result: dict[str, Any]) -> None:
    """The verdicts and a table for each tuned side."""
    from sft.report.results import number

    columns = ["metric", "base", "tuned", "95 % of the change", "won/tied/lost", "finding"]
    for one in result["comparisons"]:
        rows = [
            [name, number(m["base"]), number(m["tuned"]), f"{m['low']:+.3f} {m['high']:+.3f}",
             f"{m['wins']}/{m['ties']}/{m['losses']}", m["finding"]]
            for name, m in one["metrics"].items()
        ]  # fmt: skip
        console.table(f"{one['name']} against its base ({result['base']})", columns, rows)
        console.say(f"{one['verdict']['headline']}: {one['verdict']['words']}")
        if found := one.get("general"):
            (console.warn if found["level"] == "forgotten" else console.say)(f"{found['headline']}: {found['words']}")
        for key in ("parrot", "stopping"):
            if found := one.get(key):
                (console.say if found["good"] else console.warn)(found["headline"])
        if found := one.get("judge"):
            told = ", ".join(f"{name} {marks['difference']:+.2f}" for name, marks in found["aspects"].items())
            console.say(
                f"judge {found['model']}: {told} ({found['rows']} rows)"
                if found["rows"]
                else f"judge: {found['problem']}"
            )


if __name__ == "__main__":
    console.run(parser(), main)
