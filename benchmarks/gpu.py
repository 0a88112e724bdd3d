"""Everything that is measured on a GPU, in one command: `python benchmarks/gpu.py` (under 9.5 minutes).

    python benchmarks/gpu.py                                # every section; results are written after each
    python benchmarks/gpu.py --sections cards speed --add   # these again; other results stay
    python benchmarks/gpu.py --device cpu --tiny            # a trial run of the same code on tiny shapes

cards    7B at 1024 on 8 GiB, 14B at 512 on 12, 32B at 2048 on 24: QLoRA steps under a cap of the card's GiB less 0.6
speed    7B QLoRA, rows of 2048, 4096 tokens a micro-batch: real tokens/s, share of the measured matmul peak;
         plain layers, Liger's where installed, compiled ones (with the time of the first step)
peers    ours, transformers grouped, TRL default and packing (and Unsloth, where it can be imported), interleaved
trials   50 steps of mixed lengths under a cap: how often memory runs out
planner  at least 24 configs: planned bytes of a step (plus cuBLAS's measured workspaces) against allocated bytes

Random weights at real shapes, NF4 with double quantisation, LoRA r 16 on all linear layers, AdamW, bf16.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

MINUTES = {"cards": 2.0, "speed": 1.5, "peers": 2.5, "trials": 1.0, "planner": 2.2}


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(MINUTES), default=list(MINUTES))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a trial run that measures nothing")
    parser.add_argument("--minutes", type=float, help="of each section, instead of its default")
    parser.add_argument("--total", type=float, default=9.0, help="minutes of all sections")
    parser.add_argument("--out", type=Path, help="folder of results; default: benchmarks/results")
    parser.add_argument("--add", action="store_true", help="keep the results of other sections")
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --device cpu --tiny is a trial run without one")
    from benchmarks import gpu_memory, material
    from benchmarks.gpu_bench import Bench
    from benchmarks.gpu_sections import SECTIONS

    args.out = args.out or (Path(tempfile.mkdtemp()) if args.tiny else material.RESULTS)
    bench = Bench(args.device, tiny=args.tiny)
    results_file = args.out / "gpu.json"
    sections = (
        json.loads(results_file.read_text(encoding="utf-8"))["sections"] if args.add and results_file.exists() else {}
    )
    results: dict[str, Any] = {"machine": material.machine(args.device), "tiny": args.tiny, "sections": sections}

    def save(name: str, section_began: float, result: dict[str, Any]) -> None:
        sections[name] = {**result, "seconds": round(time.monotonic() - section_began, 1)}
        material.save_results("gpu", results, _lines(results), args.out)

    workers = max(1, min(6, (os.cpu_count() or 1) // 2))
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        bench.plans = gpu_memory.plans(bench, pool) if "planner" in args.sections else []
        for name in args.sections:
            section_began, left = time.monotonic(), args.total - (time.monotonic() - began) / 60
            bench.start(min(args.minutes or MINUTES[name], left))
            bench.save = functools.partial(save, name, section_began)
            device_lost = False
            try:
                result = SECTIONS[name](bench) if bench.has_time() else {"failed": "no time left"}
            except Exception as error:
                traceback.print_exc()
                result = {**sections.get(name, {}), "failed": f"{type(error).__name__}: {error}"[:400]}
                device_lost = "CUDA error" in str(error)
            bench.save(result)
            print(f"{name}: {json.dumps(result)[:1500]}", flush=True)
            remaining = args.sections[args.sections.index(name) + 1 :]
            if device_lost and remaining:
                pool.shutdown(wait=False, cancel_futures=True)
                _restart(args, remaining, args.total - (time.monotonic() - began) / 60)
            bench.cap(None)
        pool.shutdown(wait=False, cancel_futures=True)
    print(results_file)


def _restart(args: argparse.Namespace, remaining: list[str], minutes: float) -> None:
    """Runs the other sections in a new process: after a CUDA error this one cannot use the device."""
    command = [sys.executable, __file__, "--add", "--device", args.device, "--out", str(args.out)]
    command += ["--total", str(minutes), *(["--tiny"] if args.tiny else []), "--sections", *remaining]
    os.execv(sys.executable, command)


def _lines(results: dict[str, Any]) -> list[str]:
    from benchmarks.material import table

    machine = results["machine"]
    card = machine.get("gpu", {"name": "no GPU", "gib": 0})
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# On a GPU, {machine['date']}",
        "",
        f"{card['name']}, {card['gib']} GiB; {versions}",
        f"`{machine['command']}`",
    ]
    for name, section in results["sections"].items():
        lines += ["", f"## {name} ({section['seconds']} s)", ""]
        simple = {key: value for key, value in section.items() if not isinstance(value, list | dict)}
        lines += [f"- {key}: {value}" for key, value in simple.items()]
        for value in section.values():
            rows = value if isinstance(value, list) else []
            if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
                rows = [{"side": side, **row} for side, row in value.items()]
            if rows:
                head = list(dict.fromkeys(key for row in rows for key in row))
                lines += ["", *table(head, [[row.get(key, "") for key in head] for row in rows])]
    return lines


if __name__ == "__main__":
    main()
