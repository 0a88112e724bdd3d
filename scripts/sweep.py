"""Trains every combination of a few values, one run after another, and compares them by the validation metric.

    python scripts/sweep.py "train.learning_rate=1e-4,3e-4 tuning.lora.r=8,16"
    python scripts/sweep.py "train.learning_rate=1e-4,3e-4,1e-3,3e-3" --halving      the worse half stops early
    python scripts/sweep.py "train.seed=1,2,3" --config configs/demo_cpu.yaml --set train.epochs=2

Each run is a run like any other (outputs/<run>-...). The same command again goes on: a finished run is not run again, a
stopped one resumes. Writes outputs/<run>-sweep/sweep.json and sweep.png, and HParams into outputs/tb/<run>-sweep.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import console, files
from sft.errors import ConfigError, RunError, Stopped

if TYPE_CHECKING:
    from sft.config.load import Loaded
    from sft.config.schema import Config

NAME = 60  # most characters of a run's name before its hash
ETA = 2  # successive halving keeps one of this many


@dataclass
class Trial:
    """One combination. sets: its values by key. results: share of the steps (`1`: all) -> step and value."""

    name: str
    sets: dict[str, str]
    config: Config
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str | None = None

    @property
    def settings(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.sets.items())

    def to_json(self) -> dict[str, Any]:
        return {"run": self.name, "values": self.sets, "results": self.results, "error": self.error}


def parser() -> argparse.ArgumentParser:
    result = console.parser(__doc__)
    result.add_argument(
        "values", metavar="KEY=VALUE,VALUE", nargs="+", help="the values of each key: 'a.b=1,2 c.d=x,y'"
    )
    result.add_argument(
        "--halving",
        action="store_true",
        help=f"successive halving: after a part of the steps only the best 1 in {ETA} goes on, with the same schedule",
    )
    return result


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Every combination checked, then trained in rungs (one without --halving), then compared."""
    from sft import runs

    root = console.project_root()
    loaded = console.load_config(args)
    base = Path(loaded.config.train.output_dir).name
    metric = metric_of(loaded.config)
    trials = make_trials(args, loaded, root)
    folder = root / "outputs" / f"{base}-sweep"
    files.make_folder(folder)
    known = {entry["run"]: entry["results"] for entry in files.read_json(folder / "sweep.json").get("trials", [])}
    for trial in trials:
        trial.results = known.get(trial.name, {})
    rungs = shares(len(trials)) if args.halving else [1.0]
    console.say(
        f"{len(trials)} runs, compared by validation {metric[0]}" + (f", halving at {rungs[:-1]}" * args.halving)
    )

    alive = list(trials)
    for share in rungs:
        for number, trial in enumerate(alive, 1):
            if f"{share:g}" not in trial.results:
                console.say(f"\n== {number} of {len(alive)}, {share:.0%} of the steps: {trial.settings}")
                train(trial, share, args, root, metric[0])
                write(folder, args, metric, trials)
        done = [trial for trial in alive if f"{share:g}" in trial.results]
        alive = sorted(done, key=lambda trial: rank(trial.results[f"{share:g}"], metric))
        alive = alive[: math.ceil(len(alive) / ETA)] if share < 1 else alive
    if not alive:
        what = f"none of {len(trials)} runs has ended: {trials[0].error}"
        raise RunError(what, where=trials[0].name, fix="correct the cause, then type the same command again")
    best = runs.named(alive[0].name, root)
    runs.point_last(best, root)
    result = write(folder, args, metric, trials)
    show(trials, metric)
    draw(folder / "sweep.png", trials, metric, root)
    write_hparams(root / "outputs" / "tb" / folder.name, trials, metric)
    console.say(f"best: {alive[0].settings} (run {best.name}; outputs/last and adapters/last are this run)")
    console.say(f"picture: {folder.name}/sweep.png; HParams: make tensorboard; next: make eval-test RUN={best.name}")
    return {"best": alive[0].to_json(), **result}


# --- what to run


def parse_values(texts: Sequence[str]) -> dict[str, list[str]]:
    """The values of each key; commas inside brackets part none. Raises ConfigError."""
    values: dict[str, list[str]] = {}
    for item in (item for text in texts for item in re.split(r"\s+(?=[a-z_]+\.[\w.]+\s*=)", text.strip())):
        key, equals, text = (part.strip() for part in item.partition("="))
        parts = [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", text)]
        if not equals or not parts or not all(parts) or "." not in key:
            fix = 'write it as "train.learning_rate=1e-4,3e-4 tuning.lora.r=8,16"'
            raise ConfigError(f"`{item}` is not of the form key=value,value", where="the sweep's values", fix=fix)
        if key in values or len(set(parts)) < len(parts):
            what = f"`{key}` is named twice" if key in values else f"a value of `{key}` is named twice"
            raise ConfigError(what, where="the sweep's values", fix="name each value once")
        values[key] = parts
    return values


def metric_of(config: Config) -> tuple[str, bool]:
    """The metric that chooses a checkpoint, and whether more of it is better. Raises ConfigError without one."""
    from sft.config.auto import RULES, Facts

    train = config.train
    if train.eval_strategy == "no":
        what = "nothing is evaluated while training, so runs cannot be compared"
        raise ConfigError(what, where="train.eval_strategy", fix="--set train.eval_strategy=epoch")
    greater = train.greater_is_better
    greater = RULES["greater_is_better"](config, Facts("cpu"))[0] if greater == "auto" else greater
    return train.metric_for_best_model.removeprefix("eval_").removeprefix("eval/"), bool(greater)


def make_trials(args: argparse.Namespace, loaded: Loaded, root: Path) -> list[Trial]:
    """Every combination with its checked config; its name has a hash of all settings and of the rows."""
    from sft.config.load import load
    from sft.data import shards, store

    values = parse_values(args.values)
    if taken := [key for key in values if key == "train.output_dir" or any(s.startswith(f"{key}=") for s in args.set)]:
        what = f"`{taken[0]}` cannot be swept: --set names it too, or it is the runs' own"
        raise ConfigError(what, where="the sweep's values", fix="leave it out of one of them")
    stage = store.resolve_stage(loaded.config.data, root)
    if stage.val is None:
        raise ConfigError("there are no validation rows to compare runs by", where="data.val_path", fix="make process")
    rows = [shards.digest(path) for path in (stage.train, stage.val)]
    trials = []
    for combination in itertools.product(*values.values()):
        sets = dict(zip(values, combination, strict=True))
        config = load(args.config, [*args.set, *(f"{key}={value}" for key, value in sets.items())], root=root).config
        content = config.model_dump(exclude={"experiment": True, "logging": True, "train": {"output_dir"}})
        digest = hashlib.sha256(json.dumps([content, rows], default=str).encode()).hexdigest()[:6]
        parts = [f"{key.rpartition('.')[2]}_{value}" for key, value in sets.items()]
        name = re.sub(r"[^\w.-]+", "_", "-".join([Path(config.train.output_dir).name, *parts]))[:NAME]
        trials.append(Trial(f"{name}-{digest}", sets, config))
    return trials


def shares(count: int) -> list[float]:
    """The rungs of successive halving, as shares of all steps, the last one all of them."""
    halvings = math.ceil(math.log(count, ETA))
    return [ETA**-left for left in range(halvings, -1, -1)]


def rank(result: dict[str, Any], metric: tuple[str, bool]) -> float:
    """Lower is better; a value that is not finite is the worst."""
    value: float | None = result.get("value")
    if value is None or not math.isfinite(value):
        return math.inf
    return -value if metric[1] else value


# --- one run


def train(trial: Trial, share: float, args: argparse.Namespace, root: Path, metric: str) -> None:
    """Trains to `share` of the steps in a process of its own, and notes the metric. Raises Stopped.

    All steps: the metric of the checkpoint that the run results in; else that of the evaluation at the stop.
    """
    finished = root / "outputs" / trial.name / "finished.json"
    trial.error, result = None, files.read_json(finished)
    if not result:
        sets = [*args.set, *(f"{key}={value}" for key, value in trial.sets.items())]
        flags = [part for each in [*sets, f"train.output_dir=outputs/{trial.name}"] for part in ("--set", each)]
        flags += ["--until", str(share)] if share < 1 else []
        script = str(Path(__file__).with_name("train.py"))
        command = [sys.executable, script, "--config", str(args.config), *flags, "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

        def stop(number: int, _: object) -> None:
            if number == signal.SIGTERM:  # Ctrl-C reaches the run by itself: it writes its checkpoint
                process.terminate()

        handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            text = process.communicate()[0]
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if process.returncode in (130, 143, -signal.SIGINT, -signal.SIGTERM):
            what = f"The sweep stopped in {trial.name}."
            raise Stopped(what, exit_code=abs(process.returncode) % 128 + 128, fix="the same command")
        result = json.loads(text.strip().splitlines()[-1]) if text.strip() else {}
        if process.returncode:
            trial.error = str(result.get("error", f"exit code {process.returncode}"))
            console.warn(f"{trial.name} failed: {trial.error}")
            return
    value = result["eval"].get(metric)
    for passed in ["1"] if finished.is_file() else []:  # it may have ended early, before this share of the steps
        trial.results[passed] = {"step": result["steps"], "value": value}
    trial.results[f"{share:g}"] = {"step": result["steps"], "value": value}


# --- the comparison


def write(folder: Path, args: argparse.Namespace, metric: tuple[str, bool], trials: Sequence[Trial]) -> dict[str, Any]:
    result = {"config": str(args.config), "set": args.set, "metric": metric[0], "greater_is_better": metric[1]}
    result |= {"halving": args.halving, "trials": [trial.to_json() for trial in trials]}
    files.write_json(folder / "sweep.json", result)
    return result


def last(trial: Trial) -> dict[str, Any]:
    """The result after the largest share of the steps; {} without any."""
    return trial.results[max(trial.results, key=float)] if trial.results else {}


def order(trials: Sequence[Trial], metric: tuple[str, bool]) -> list[Trial]:
    """Those that went farthest first, the best of them first; failed ones last."""
    return sorted(trials, key=lambda trial: (-max(map(float, trial.results), default=0), rank(last(trial), metric)))


def show(trials: Sequence[Trial], metric: tuple[str, bool]) -> None:
    rows = []
    for trial in order(trials, metric):
        result = last(trial)
        value = "failed" if trial.error else f"{result['value']:.4f}" if result.get("value") is not None else "-"
        rows.append([trial.settings, value, result.get("step", ""), trial.name])
    better = "higher" if metric[1] else "lower"
    console.table(f"validation {metric[0]}: {better} is better", ("values", metric[0], "steps", "run"), rows)


def draw(target: Path, trials: Sequence[Trial], metric: tuple[str, bool], root: Path) -> None:
    """The metric of every evaluation against the step, a line a run, as PNG."""
    from matplotlib.figure import Figure

    from sft.runs import read_log

    figure = Figure(figsize=(9, 5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for trial in order(trials, metric):
        entries = read_log(root / "outputs" / trial.name / "log.jsonl")
        points = [(entry["step"], entry[f"eval/{metric[0]}"]) for entry in entries if f"eval/{metric[0]}" in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=trial.settings)
    axes.set_xlabel("step")
    axes.set_ylabel(f"validation {metric[0]}")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with files.atomic_file(target) as staged:
        figure.savefig(staged, format="png")


def write_hparams(folder: Path, trials: Sequence[Trial], metric: tuple[str, bool]) -> None:
    """The swept values against the metric, for TensorBoard's HParams tab: a session a run, anew each time."""
    from torch.utils.tensorboard import SummaryWriter

    from sft.config.load import scalar

    shutil.rmtree(folder, ignore_errors=True)
    for trial in trials:
        if (result := last(trial)) and result["value"] is not None:
            values = {
                key: value if isinstance(value := scalar(text), int | float) else text
                for key, text in trial.sets.items()
            }
            with SummaryWriter(str(folder / trial.name)) as writer:
                writer.add_hparams(values, {f"sweep/{metric[0]}": result["value"]}, run_name=".")


if __name__ == "__main__":
    console.run(parser(), main)
