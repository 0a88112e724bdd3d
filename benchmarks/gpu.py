"""All that is to be measured on a GPU, in one command: `python benchmarks/gpu.py` (under 9.5 minutes).

    python benchmarks/gpu.py                                # every section, results written after each
    python benchmarks/gpu.py --sections cards speed --add   # these anew, what else was measured stays
    python benchmarks/gpu.py --device cpu --tiny            # the same code on tiny shapes, to see that it runs

cards    7B at 1024 on 8 GiB, 14B at 512 on 12, 32B at 2048 on 24: QLoRA steps under a cap of the card's GiB less 0.6
speed    7B QLoRA, rows of 2048, 4096 tokens a micro-batch: real tokens/s, share of the measured matmul peak;
         layers plain, by Liger where installed, compiled (with what its first step takes)
peers    ours, transformers grouped, TRL default and packing (and Unsloth, where it can be imported), interleaved
trials   50 windows of mixed lengths under a cap: how often memory runs out
planner  at least 24 configs: planned bytes of a step (and cuBLAS's workspaces, measured) against those allocated

Random weights at true shapes, NF4 with double quantisation, LoRA r 16 on all linear layers, AdamW, bf16.
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
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    parser.add_argument("--minutes", type=float, help="of each section, in the place of its own box")
    parser.add_argument("--total", type=float, default=9.0, help="minutes of all sections")
    parser.add_argument("--out", type=Path, help="folder of results; default: benchmarks/results")
    parser.add_argument("--add", action="store_true", help="keep the other sections that the results have already")
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; --device cpu --tiny shows that the code runs")
    from benchmarks import gpu_memory, material
    from benchmarks.gpu_bench import Bench
    from benchmarks.gpu_sections import SECTIONS

    args.out = args.out or (Path(tempfile.mkdtemp()) if args.tiny else material.RESULTS)
    bench = Bench(args.device, tiny=args.tiny)
    kept = args.out / "gpu.json"
    sections = json.loads(kept.read_text(encoding="utf-8"))["sections"] if args.add and kept.exists() else {}
    found: dict[str, Any] = {"machine": material.machine(args.device), "tiny": args.tiny, "sections": sections}

    def keep(name: str, since: float, result: dict[str, Any]) -> None:
        sections[name] = {**result, "seconds": round(time.monotonic() - since, 1)}
        material.keep("gpu", found, _lines(found), args.out)

    workers = max(1, min(6, (os.cpu_count() or 1) // 2))
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        bench.plans = gpu_memory.plans(bench, pool) if "planner" in args.sections else []
        for name in args.sections:
            since, left = time.monotonic(), args.total - (time.monotonic() - began) / 60
            bench.start(min(args.minutes or MINUTES[name], left))
            bench.keep = functools.partial(keep, name, since)
            broken = False
            try:
                result = SECTIONS[name](bench) if bench.left() else {"failed": "no time left"}
            except Exception as error:
                traceback.print_exc()
                result = {**sections.get(name, {}), "failed": f"{type(error).__name__}: {error}"[:400]}
                broken = "CUDA error" in str(error)
            bench.keep(result)
            print(f"{name}: {json.dumps(result)[:1500]}", flush=True)
            rest = args.sections[args.sections.index(name) + 1 :]
            if broken and rest:
                pool.shutdown(wait=False, cancel_futures=True)
                _again(args, rest, args.total - (time.monotonic() - began) / 60)
            bench.cap(None)
        pool.shutdown(wait=False, cancel_futures=True)
    print(kept)


def _again(args: argparse.Namespace, rest: list[str], minutes: float) -> None:
    """The other sections in a new process: after a CUDA error this one can do nothing on the device any more."""
    command = [sys.executable, __file__, "--add", "--device", args.device, "--out", str(args.out)]
    command += ["--total", str(minutes), *(["--tiny"] if args.tiny else []), "--sections", *rest]
    os.execv(sys.executable, command)


def _lines(found: dict[str, Any]) -> list[str]:
    from benchmarks.material import table

    where = found["machine"]
    card = where.get("gpu", {"name": "no GPU", "gib": 0})
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"# On a GPU, {where['date']}",
        "",
        f"{card['name']}, {card['gib']} GiB; {versions}",
        f"`{where['command']}`",
    ]
    for name, section in found["sections"].items():
        lines += ["", f"## {name} ({section['seconds']} s)", ""]
        simple = {key: value for key, value in section.items() if not isinstance(value, list | dict)}
        lines += [f"- {key}: {value}" for key, value in simple.items()]
        for value in section.values():
            rows = value if isinstance(value, list) else []
            if isinstance(value, dict) and value and all(isinstance(one, dict) for one in value.values()):
                rows = [{"side": side, **one} for side, one in value.items()]
            if rows:
                head = list(dict.fromkeys(key for row in rows for key in row))
                lines += ["", *table(head, [[row.get(key, "") for key in head] for row in rows])]
    return lines


if __name__ == "__main__":
    main()
