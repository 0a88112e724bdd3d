"""What a checkpoint costs: seconds from the step's end to the rotated, verified folder, on the demo model.

    python benchmarks/save_cost.py --out benchmarks/results/save-cost-DATE.json

Targets: at most 0.5 s a save; at most 2 % of a run whose steps take a second and that saves every 100 (2 s a save).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME / "scripts"), str(HOME)]

from tests.training import bench

from sft import files

SAVES = 12


def measure(mode: str, folder: Path) -> dict[str, Any]:
    """Seconds of each save but the first (which imports), and the size of a checkpoint."""
    train = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": SAVES + 1}
    settings = bench.config(HOME / "models" / "demo", folder / "outputs" / mode, tuning={"mode": mode}, train=train)
    loop, seconds = bench.make_loop(settings, validation=0), []
    save = loop.save

    def timed() -> None:
        began = time.perf_counter()
        save()
        seconds.append(time.perf_counter() - began)

    loop.save = timed
    loop.fit()
    later = seconds[1:]
    return {
        "mode": mode,
        "mib": round(files.size(loop.checkpoints.run.checkpoints()[-1]) / 2**20, 2),
        "median_s": round(statistics.median(later), 3),
        "worst_s": round(max(later), 3),
        "share_of_100_steps_of_1_s": round(statistics.median(later) / 100, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=HOME / "outputs" if (HOME / "outputs").is_dir() else None) as folder:
        results = [measure(mode, Path(folder)) for mode in ("lora", "qlora", "full")]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "torch": metadata.version("torch"),
        "saves_each": SAVES,
        "modes": results,
    }
    if args.out:
        files.write_json(args.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
