"""All that is to be measured on a GPU, in one command: `python benchmarks/gpu.py` (under 9.5 minutes).

    python benchmarks/gpu.py                                # every section, results written after each
    python benchmarks/gpu.py --sections cards speed
    python benchmarks/gpu.py --device cpu --tiny            # the same code on tiny shapes, to see that it runs

cards    7B at 1024 on 8 GiB, 14B at 512 on 12, 32B at 2048 on 24: QLoRA steps under a cap of the card's GiB less 0.6
speed    7B QLoRA, rows of 2048, 4096 tokens a micro-batch: real tokens/s, share of the measured matmul peak;
         layers plain, by Liger where installed, compiled (with what its first step takes)
peers    ours, transformers grouped, TRL default and packing (and Unsloth, where it can be imported), interleaved
trials   50 windows of mixed lengths under a cap: how often memory runs out
planner  at least 24 configs: planned against measured bytes of a step, median and worst error

Random weights at true shapes, NF4 with double quantisation, LoRA r 16 on all linear layers, AdamW, bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

MINUTES = {"cards": 2.0, "speed": 1.5, "peers": 2.5, "trials": 1.0, "planner": 2.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(MINUTES), default=list(MINUTES))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    parser.add_argument("--minutes", type=float, help="of each section, in the place of its own box")
    parser.add_argument("--out", type=Path, help="folder of results; default: benchmarks/results")
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; --device cpu --tiny shows that the code runs")
    from benchmarks import material
    from benchmarks.gpu_bench import Bench
    from benchmarks.gpu_sections import SECTIONS

    if args.tiny and args.out is None:
        args.out = Path(tempfile.mkdtemp())
    bench = Bench(args.device, tiny=args.tiny)
    found: dict[str, Any] = {"machine": material.machine(args.device), "tiny": args.tiny, "sections": {}}
    for name in args.sections:
        began = time.monotonic()
        bench.start(args.minutes or MINUTES[name])
        try:
            result = SECTIONS[name](bench)
        except Exception as error:
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {error}"[:400]}
        result["seconds"] = round(time.monotonic() - began, 1)
        found["sections"][name] = result
        path = material.keep("gpu", found, _lines(found), args.out)
        print(f"{name}: {json.dumps(result)[:1500]}", flush=True)
        bench.cap(None)
    print(path)


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
