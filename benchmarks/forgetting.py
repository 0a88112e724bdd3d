"""What a narrow task makes a small model forget in full fine-tuning, and what replay, rehearsal, elastic weight
consolidation and a lower rate do about it. One run each on the support-desk sample, compared with the base.

    python benchmarks/forgetting.py --model HuggingFaceTB/SmolLM2-135M-Instruct --replay data/raw/alpaca.jsonl
    python benchmarks/forgetting.py --model DIR --only nothing ewc --set train.seed=1 --suffix=-s1

Each run trains for 16 steps (minutes on one CPU core) and answers 32 test rows and the general questions of
`make compare`. Runs that have a report are not run again; the table of all of them is printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMON = [
    "tuning.mode=full", "model.max_seq_len=256", "train.max_steps=16", "train.effective_batch=8",
    "train.eval_strategy=no", "train.save_strategy=no", "train.rehearsal.rows=off", "train.learning_rate=3e-4",
    "generation.max_new_tokens=64",
]  # fmt: skip
VARIANTS: dict[str, tuple[str, list[str]]] = {  # what differs from COMMON
    "nothing": ("nothing", []),
    "rate": ("a lower rate, 3e-5", ["train.learning_rate=3e-5"]),
    "replay": ("replay of Alpaca rows, ratio 0.1", ["data.replay.ratio=0.1"]),
    "rehearsal": ("rehearsal, share 0.2", ["train.rehearsal.rows=auto", "train.rehearsal.share=0.2"]),
    "ewc": ("EWC, strength 500", ["train.ewc.strength=500"]),
    "stiff": ("EWC, strength 1e4", ["train.ewc.strength=1e4"]),
}


def run(variant: str, args: argparse.Namespace) -> Path:
    """The run's folder, trained and compared if it has no report yet."""
    name = f"forgetting-{variant}{args.suffix}"
    folder, rows = ROOT / "outputs" / name, f"outputs/forgetting-rows{'-replay' if variant == 'replay' else ''}"
    if (folder / "report" / "compare.json").exists():
        return folder
    sets = [f"model.name={args.model}", *COMMON, f"train.output_dir=outputs/{name}", f"data.processed_dir={rows}"]
    sets += VARIANTS[variant][1] + ([f"data.replay.path={args.replay}"] if variant == "replay" else []) + args.set
    flags = ["--config", "configs/smollm2_cpu.yaml", *(part for item in sets for part in ("--set", item))]
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    if not (ROOT / rows / "train.jsonl").exists():
        command("process_data", *flags)
    command("train", *flags, "--resume", "never")
    command("compare", "--adapters", f"outputs/{name}/model", "--limit", "32")
    shutil.rmtree(folder / "model")  # 0.5 GB each
    return folder


def command(script: str, *args: str) -> None:
    subprocess.run([sys.executable, f"scripts/{script}.py", *args], cwd=ROOT, check=True)


def row(folder: Path, title: str) -> list[str]:
    """A line of the table."""
    compared = json.loads((folder / "report" / "compare.json").read_text())["comparisons"][0]
    run, general = json.loads((folder / "finished.json").read_text()), compared["general"]

    def change(value: dict[str, Any], percent: bool = False) -> str:
        number, interval = ("{:.0%}", "{:+.0%} to {:+.0%}") if percent else ("{:.2f}", "{:+.2f} to {:+.2f}")
        return f"{number.format(value['tuned'])} ({interval.format(value['low'], value['high'])})"

    return [
        title, f"{compared['metrics']['exact_match']['tuned']:.3f}", change(general["row_loss"]),
        change(general["passed"], percent=True), change(general["stopped"], percent=True), general["level"],
        f"{run['tokens']:,}",
    ]  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", required=True, help="a hub id or a folder")
    flags.add_argument("--replay", default="tatsu-lab/alpaca", help="general rows for the variant `replay`")
    flags.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    flags.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    flags.add_argument("--suffix", default="", help="of the runs' names, for other settings")
    args = flags.parse_args()
    lines = [row(run(variant, args), VARIANTS[variant][0]) for variant in args.only]
    head = ["against forgetting", "exact match", "loss of good general answers", "general checks passed",
            "general answers that end", "verdict", "tokens trained"]  # fmt: skip
    for cells in (head, ["---"] * len(head), *lines):
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
