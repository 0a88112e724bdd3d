"""Runs tasks of lm-evaluation-harness on the tuned model and its base, where the harness is installed.

    python scripts/lm_eval.py --tasks hellaswag,arc_easy --limit 200       the newest run and its base
    python scripts/lm_eval.py --tasks ifeval --chat -- --num_fewshot 0

The models are opened as `eval` opens them (the same 4-bit base, adapter and tokenizer) and handed to the harness.
Results go to outputs/<run>/lm_eval/{tuned,base}; the tasks' data come from the hub.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from sft import console

MINIMUM = "0.4.9"
Scores = dict[str, float]


def parser() -> argparse.ArgumentParser:
    arguments = console.parser(__doc__)
    add = arguments.add_argument
    add("--tasks", required=True, metavar="A,B", help="names of the harness's tasks, or YAML files")
    add("--adapters", type=Path, metavar="DIR", help="an adapter (default: the newest run's)")
    add("--limit", type=int, metavar="N", help="the first N questions of each task")
    add("--chat", action="store_true", help="apply the chat template to the questions")
    add("--tuned-only", action="store_true", help="do not evaluate the base")
    add("options", nargs="*", metavar="-- OPTION", help="arguments of lm_eval.simple_evaluate: --num_fewshot 0")
    return arguments


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Find the model, open each side, run the harness on it, put the results beside each other."""
    from sft.errors import ConfigError

    check_installed()
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not tasks:
        raise ConfigError("no tasks are named", fix="make lm-eval TASKS=hellaswag,arc_easy")
    from sft.generation import load

    root, is_default = console.project_root(), args.config == console.default_config()
    target = load.resolve_model(Path(args.config), args.set, adapters=args.adapters, is_default=is_default, root=root)
    harness = import_harness()
    settings = {"limit": args.limit, "apply_chat_template": args.chat, **parse_options(args.options, harness)}
    folder = root / "outputs" / target.name / "lm_eval"
    scores: dict[str, Scores] = {}
    for side, model in load.open_sides(target, ["tuned"] if args.tuned_only else ["tuned", "base"], root):
        console.say(f"{side}: {', '.join(tasks)}")
        scores[side] = evaluate(harness, model, tasks, settings, folder / side)
        del model  # before the next side is opened
    console.table(f"{target.name}, {args.tasks}", *table(scores))
    console.say(f"\nwritten to {folder}")
    return {"run": target.name, "tasks": tasks, **scores}


def check_installed() -> None:
    """Raises EnvironmentProblem, with the command that installs it, if the harness is missing or too old."""
    from packaging.version import Version

    from sft.errors import EnvironmentProblem

    try:
        version = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        version = ""
    if not version or Version(version) < Version(MINIMUM):
        what = f"lm-evaluation-harness {version} is too old" if version else "lm-evaluation-harness is not installed"
        raise EnvironmentProblem(what, fix=f"{sys.executable} -m pip install 'lm_eval[hf]>={MINIMUM}'")


def import_harness() -> Any:
    """The installed package `lm_eval`, which this script's own name and folder hide while it is imported."""
    here, paths = Path(__file__).resolve().parent, sys.path[:]
    sys.modules.pop("lm_eval", None)
    sys.path[:] = [path for path in paths if Path(path or ".").resolve() != here]
    try:
        harness = importlib.import_module("lm_eval")
        importlib.import_module("lm_eval.models.huggingface")
    finally:
        sys.path[:] = paths
    return harness


def parse_options(options: list[str], harness: Any) -> dict[str, Any]:
    """`["--num_fewshot", "0"]` as keyword arguments of `simple_evaluate`. Raises ConfigError for an unknown one."""
    import yaml

    from sft.errors import ConfigError, nearest

    known = inspect.signature(harness.simple_evaluate).parameters
    values: dict[str, Any] = {}
    pairs = iter(options)
    for flag in pairs:
        name, _, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or name not in known:
            close = nearest(name, known)
            fix = f"did you mean --{close}?" if close else f"one of: {', '.join(known)}"
            raise ConfigError(f"the harness has no option {flag}", where="after --", fix=fix)
        values[name] = yaml.safe_load(value or next(pairs, "true"))
    return values


def evaluate(harness: Any, model: Any, tasks: list[str], settings: dict[str, Any], folder: Path) -> Scores:
    """Runs the tasks on an open model, writes results_<time>.json. Raises EnvironmentProblem if the harness fails."""
    from sft import files
    from sft.errors import EnvironmentProblem

    settings = {"batch_size": 8, **settings}
    wrapped = harness.models.huggingface.HFLM(
        pretrained=model.model, tokenizer=model.tokenizer, backend=model.kind, batch_size=settings["batch_size"]
    )
    try:
        results = harness.simple_evaluate(model=wrapped, tasks=tasks, **settings)
    except Exception as error:  # anything that a task, its data or the harness raises
        fix = "`lm_eval ls tasks` lists its tasks; their data come from the hub"
        raise EnvironmentProblem(f"the harness failed: {type(error).__name__}: {error}", fix=fix) from error
    files.write_json(folder / f"results_{time.strftime('%Y-%m-%dT%H-%M-%S')}.json", {"results": results["results"]})
    return read_scores(results["results"])


def read_scores(results: dict[str, dict[str, Any]]) -> Scores:
    """`{"task metric": value}` of the harness's results, standard errors and sizes left out."""
    return {
        f"{task} {name.removesuffix(',none')}": float(value)
        for task, metrics in results.items()
        for name, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in name and name not in {"sample_len", "sample_count"}
    }


def table(scores: dict[str, Scores]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of both sides, without a verdict: the harness does not say whether higher is better."""
    sides = [side for side in ("base", "tuned") if side in scores]
    rows = []
    for name in dict.fromkeys(name for side in sides for name in scores[side]):
        values = [scores[side][name] for side in sides if name in scores[side]]
        change = f"{values[1] - values[0]:+.4f}" if len(values) == 2 else ""
        rows.append([name, *(f"{scores[side][name]:.4f}" if name in scores[side] else "" for side in sides), change])
    return ["task and metric", *sides, "change"], rows


if __name__ == "__main__":
    console.run(parser(), main)
