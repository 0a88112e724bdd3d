"""Injects every fault of an ordinary machine into a 6-step training run, then resumes it.

    python tests/faults/sweep.py --mode lora                              # every case of one mode
    python tests/faults/sweep.py --mode full --sample 20 --seed 1         # 20 of each sort, drawn at random
    python tests/faults/sweep.py --all --tensorboard --jobs 2 --out benchmarks/results/faults.json  # make test-faults

Sorts: `calls` (the Nth call of `files.disk` fails or kills the run, for every N), `kills` (SIGKILL at random moments),
`damage` (every file of the newest checkpoint, four ways), `signals` (at every micro-step), `merge` (the Nth call of
merging the adapter). The resumed run must end with the SHA-256 of the clean run's weights, its curve and
links, and nothing left half-written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HOME / "scripts"), str(HOME)]

from sft import files  # noqa: E402
from tests.faults.bench import MODES, Bench  # noqa: E402
from tests.faults.faulty_disk import KINDS, FaultyDisk  # noqa: E402

HARMS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: os.truncate(path, 0),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a bit flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
}
Case = tuple[str, Callable[[], dict[str, Any]]]  # a description, and the function that runs the case


def flipped(data: bytes) -> bytes:
    """The data with one bit in the middle flipped."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def at_calls(bench: Bench, expected: dict[str, Any], calls: list[str]) -> Iterator[Case]:
    """Every call of `files.disk` fails, or kills the run."""
    for nth, call in enumerate(calls, 1):
        for kind in KINDS:

            def case(nth: int = nth, kind: str = kind) -> dict[str, Any]:
                bench.clear()
                return bench.broken_then_resumed(lambda: bench.run(FaultyDisk(nth, kind)), expected)

            yield f"{kind} at call {nth}, {call}", case


def at_moments(bench: Bench, expected: dict[str, Any], seconds: float, draw: random.Random) -> Iterator[Case]:
    """SIGKILL at random moments of the run."""
    for _ in range(100):
        after = draw.uniform(0, seconds)

        def case(after: float = after) -> dict[str, Any]:
            def killed() -> int:
                pid = bench.start()
                time.sleep(after)
                os.kill(pid, signal.SIGKILL)
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

            bench.clear()
            return bench.broken_then_resumed(killed, expected)

        yield f"killed after {after:.3f} s", case


def damaged(bench: Bench, expected: dict[str, Any]) -> Iterator[Case]:
    """Every file of the newest checkpoint, damaged; it must be named, and the checkpoint before it used."""
    bench.clear()
    bench.run(None, "--set", "train.save_total_limit=9")
    original = bench.root / "original"
    shutil.copytree(bench.root / "outputs", original / "outputs", symlinks=True)
    shutil.copytree(bench.root / "adapters", original / "adapters", symlinks=True)
    for name in sorted(path.name for path in (original / "outputs/t/checkpoint-6").iterdir()):
        for harm, do in HARMS.items():

            def case(name: str = name, do: Callable[[Path], object] = do) -> dict[str, Any]:
                bench.clear()
                shutil.copytree(original / "outputs", bench.root / "outputs", symlinks=True)
                (bench.root / "outputs/t/finished.json").unlink()
                do(bench.root / "outputs/t/checkpoint-6" / name)
                result = bench.broken_then_resumed(bench.run, expected)
                if f"skipped checkpoint-6: {name}" not in bench.output():
                    result["wrong"].append(f"{name} is not named: {bench.output()[:300]}")
                if "resuming outputs/t at checkpoint-4" not in bench.output():
                    result["wrong"].append(f"checkpoint-4 was not taken: {bench.output()[:300]}")
                return result

            yield f"{name} {harm}", case


def signalled(bench: Bench, expected: dict[str, Any]) -> Iterator[Case]:
    """SIGINT, SIGTERM and SIGHUP at every micro-step: a checkpoint at the step's end, the right exit code."""
    from sft.step import step

    def counting(nth: int, number: int) -> Callable[[], None]:
        """Sends the process a signal in the nth micro-step; 0 only counts them, into steps.txt."""

        def install() -> None:
            real, seen = step.token_losses, []

            def token_losses(*args: Any, **kwargs: Any) -> Any:
                seen.append(1)
                if len(seen) == nth:
                    os.kill(os.getpid(), number)
                if nth == 0:
                    (bench.root / "steps.txt").write_text(str(len(seen)))
                return real(*args, **kwargs)

            step.token_losses = token_losses

        return install

    bench.clear()
    bench.run(first=counting(0, 0))
    for nth in range(1, int((bench.root / "steps.txt").read_text()) + 1):
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)):

            def case(nth: int = nth, number: int = number, code: int = code) -> dict[str, Any]:
                def stopped() -> int:
                    return bench.run(first=counting(nth, number))

                bench.clear()
                result = bench.broken_then_resumed(stopped, expected, codes=(code, 0))
                if result["exit"] == 0 and "finished" not in bench.output():
                    result["wrong"].append("neither stopped nor finished")
                return result

            yield f"{signal.Signals(number).name} at micro-step {nth}", case


def merged(bench: Bench, expected: dict[str, Any]) -> Iterator[Case]:
    """A merge over an older one, failing or killed at every call: either the old or the new model is complete."""
    bench.clear()
    bench.run()
    out = bench.root / "outputs/merged_fp16"

    def state() -> dict[str, str]:
        return {path.name: files.sha256(path) for path in out.glob("*") if path.name != "merge.json"}

    def merge(disk: FaultyDisk | None = None) -> int:
        return bench.run(disk, merge=True)

    merge()
    new = state()
    merge(FaultyDisk(0, ""))
    calls = json.loads((bench.root / "calls.json").read_text())[0]
    for nth, call in enumerate(calls, 1):
        for kind in KINDS:

            def case(nth: int = nth, kind: str = kind) -> dict[str, Any]:
                (out / "config.json").write_text("the old one")
                old = state()
                code, output, merged_state = merge(FaultyDisk(nth, kind)), bench.output(), state()
                wrong = [] if merged_state in (old, new) else ["neither the old model nor the new one"]
                wrong += [f"exit {code}: {output[-600:]}"] if code not in (0, 2, -9) or "Traceback" in output else []
                wrong += [f"exit {again} after: {bench.output()[-600:]}"] if (again := merge()) else []
                wrong += [] if state() == new else ["the next merge gives another model"]
                wrong += [f"left behind: {path.name}" for path in out.parent.glob(".merged*")]
                return {"exit": code, "wrong": wrong}

            yield f"{kind} at call {nth}, {call}", case


def sweep(mode: str, *, sample: int, sorts: list[str], seed: int, tensorboard: bool) -> dict[str, Any]:
    """All cases of one mode, or a seeded sample of each sort, with the results."""
    draw = random.Random(seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), mode, tensorboard=tensorboard)
        expected, calls, seconds = bench.clean()
        case_lists: dict[str, Callable[[], Iterator[Case]]] = {
            "calls": lambda: at_calls(bench, expected, calls),
            "kills": lambda: at_moments(bench, expected, seconds, draw),
            "damage": lambda: damaged(bench, expected),
            "signals": lambda: signalled(bench, expected),
            "merge": lambda: merged(bench, expected),
        }
        failed, exits, count = [], {}, {}
        for sort in [one for one in sorts if one != "merge" or mode == "lora"]:
            cases = list(case_lists[sort]())
            cases = draw.sample(cases, min(sample, len(cases))) if sample else cases
            count[sort] = len(cases)
            for number, (what, case) in enumerate(cases, 1):
                result = case()
                exits[str(result["exit"])] = exits.get(str(result["exit"]), 0) + 1
                failed += [{"case": what, **result}] if result["wrong"] else []
                outcome = "; ".join(result["wrong"]) or "same weights"
                print(f"{mode} {sort} {number}/{len(cases)} {what}: {outcome}", file=sys.stderr, flush=True)
    return {
        "mode": mode,
        "sha256": expected["sha256"],
        "calls": len(calls),
        "cases": count,
        "failed": failed,
        "exits": exits,
        "seconds": round(time.monotonic() - began, 1),
    }


def commit() -> str:
    """The tree under test, as git names it."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, check=False, cwd=HOME, capture_output=True, text=True).stdout.strip()


SORTS = ("calls", "kills", "damage", "signals", "merge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, action="append", help="repeatable (default: lora)")
    parser.add_argument("--all", action="store_true", help="every mode")
    parser.add_argument("--sort", choices=SORTS, action="append", help="repeatable (default: every sort)")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="N cases of each sort (0: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard files too")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="modes run side by side (default: 1)")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON")
    args = parser.parse_args()
    modes, sorts = MODES if args.all else args.mode or ["lora"], args.sort or list(SORTS)
    settings = {"sample": args.sample, "sorts": sorts, "seed": args.seed, "tensorboard": args.tensorboard}
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        sweeps = list(pool.map(partial(sweep, **settings), modes))
    failed = sum(len(each["failed"]) for each in sweeps)
    result = {
        "cases": sum(sum(each["cases"].values()) for each in sweeps),
        "failed": failed,
        **settings,
        "modes": sweeps,
    }
    if args.out:
        about = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "python": sys.version.split()[0]}
        files.write_json(args.out, {**about, **result})
    print(json.dumps(result, indent=1))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
