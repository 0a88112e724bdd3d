"""The guided set-up behind workflows/quick_start.sh: looks, asks, prepares, trains, evaluates, shows.

python scripts/quick_start.py             guided on a terminal
python scripts/quick_start.py --yes       takes every default
python scripts/quick_start.py --demo      the small demo model
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sft import console
from sft.errors import SftError

NEXT = """
What to do next:
  make infer                  talk to it
  make tensorboard            look at the curves
  make compare                what got better, what was forgotten, every answer on one page
  make merge && make merge-test   one folder of weights, checked (make export: for llama.cpp or Ollama)
  put your own examples into data/raw/raw.jsonl in place of the sample, and run this again
  docs/CONFIG.md has every setting; configs/local.yaml keeps yours"""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    made = console.parser(
        "From a file of examples to a model you can talk to.", "python scripts/quick_start.py --yes", config=False
    )
    made.add_argument("--yes", action="store_true", help="take every default, ask nothing")
    made.add_argument("--demo", action="store_true", help="use the shipped demo model")
    return made


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Look, choose, process, preview, check, train, evaluate, show."""
    from sft import guide

    root, started = console.project_root(), time.monotonic()
    ask = sys.stdin.isatty() and not args.yes
    choice = choose_model(args.demo, ask)
    console.say(f"model: {choice.name} - {choice.reason}")
    raw, word = guide.raw_data(root)
    console.say(f"data:  {raw.relative_to(root)} ({word})")
    if kept := guide.write_local(root, choice, raw):
        console.say(f"your earlier configs/local.yaml is kept as {kept.name}")
    console.say("these choices stay in configs/local.yaml")
    step("process the data", "process_data")
    step("look at what will be learnt", "preview", "--limit", "1")
    step("check the set-up", "check")
    if ask and input("\ntrain now? [Y/n] ").strip().lower() == "n":
        console.say("make train starts it whenever you like")
        return {"model": choice.name, "trained": False}
    step("train", "train")
    step(
        "compare the base and the tuned model on the test split", "eval", "--split", "test", "--both", "--samples", "3"
    )
    console.say(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes{NEXT}")
    return {"model": choice.name, "trained": True}


def choose_model(demo: bool, ask: bool) -> Any:
    """Looks at the GPU and the hub, and picks or asks."""
    from sft import guide
    from sft.memory import estimate
    from sft.model import hub
    from sft.model.hardware import probe

    if demo:
        return guide.Choice(guide.DEMO, "the shipped demo model, as asked: proves the pipeline, knows nothing")
    card = probe()
    gpu = card.name if card.device == "cuda" else None
    gib = card.total_bytes / 2**30 if gpu else 0.0
    reachable = gpu is not None and hub.reachable(timeout=2.0)
    offers = guide.choices(gpu, gib, reachable, estimate.that_fit(gib) if gpu else [])
    if not ask or len(offers) == 1:
        return offers[0]
    for number, offer in enumerate(offers, 1):
        console.say(f"  {number}. {offer.name} - {offer.reason}")
    while True:
        said = input(f"which model? [1-{len(offers)}, Enter for 1, or a hub name] ").strip()
        if not said:
            return offers[0]
        if said.isdigit() and 1 <= int(said) <= len(offers):
            return offers[int(said) - 1]
        if "/" in said:
            return guide.Choice(said, "your choice")


def step(title: str, script: str, *flags: str) -> None:
    """Runs one command of the kit and stops with its exit code where it fails."""
    path = Path(__file__).with_name(f"{script}.py")
    console.say(f"\n== {title}: python scripts/{script}.py {' '.join(flags)}".rstrip())
    code = subprocess.run([sys.executable, str(path), *flags], check=False).returncode
    if code:
        error = SftError(f"the quick start stopped at: {title}", fix="fix what it says above, then start it again")
        error.exit_code = code if code > 0 else 1
        raise error


if __name__ == "__main__":
    console.run(parser(), main)
