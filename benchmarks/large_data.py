"""Memory and time of training on tokens that are larger than memory: made Arrow files, a few steps of the demo model.

    python benchmarks/large_data.py --gib 10 --dir /tmp     needs that much disk; the files are deleted at the end

Starts `scripts/train.py` twice (the second start finds the rows checked) and prints of each the seconds, the peak of
all resident memory (pages of the mapped files included) and the peak without these pages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parents[1]
TOKENS, ROWS = 256, 1_000  # of a row, of a record batch
VOCABULARY = 2_000  # ids that the demo model has


def write(folder: Path, gib: float, files: int) -> int:
    """Files as `datasets.save_to_disk` writes them, a question of random length and its answer; returns the rows."""
    folder.mkdir(parents=True)
    draw, written = np.random.default_rng(0), 0
    batches = max(1, round(gib * 2**30 / (8 * TOKENS * ROWS) / files))
    schema = pa.schema({name: pa.list_(pa.int32()) for name in ("input_ids", "labels")})
    offsets = pa.array(np.arange(0, (ROWS + 1) * TOKENS, TOKENS, dtype=np.int32))
    for number in range(files):
        name = f"data-{number:05d}-of-{files:05d}.arrow"
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
            for _ in range(batches):
                ids = draw.integers(10, VOCABULARY, (ROWS, TOKENS), dtype=np.int32)
                labels = np.where(np.arange(TOKENS) < draw.integers(8, TOKENS - 8, (ROWS, 1)), -100, ids).astype(
                    np.int32
                )
                columns = [pa.ListArray.from_arrays(offsets, pa.array(part.reshape(-1))) for part in (ids, labels)]
                out.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
                written += ROWS
    return written


def train(root: Path, rows: Path, name: str, steps: int) -> dict[str, float]:
    """One run of the command; seconds and GiB."""
    sets = [f"data.train_path={rows}", f"train.output_dir=outputs/{name}", f"train.max_steps={steps}"]
    sets += ["train.eval_strategy=no", "train.rehearsal.rows=auto"]
    command = [
        sys.executable,
        str(ROOT / "scripts/train.py"),
        "--config",
        str(ROOT / "configs/demo_cpu.yaml"),
        "--json",
    ]
    command += [part for one in sets for part in ("--set", one)]
    began, anonymous = time.monotonic(), 0
    with open(root / f"{name}.json", "w") as out:
        process = subprocess.Popen(command, stdout=out, env={**os.environ, "SFT_ROOT": str(root)})
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                anonymous = max(anonymous, int(status.partition("RssAnon:")[2].split()[0]))
            except (OSError, IndexError):
                pass
            time.sleep(0.1)
    if ended[1]:
        raise SystemExit(f"training failed: {ended[1]}")
    seconds = time.monotonic() - began
    return {
        "seconds": round(seconds, 1),
        "training_seconds": json.loads((root / f"{name}.json").read_text())["seconds"],
        "peak_gib": round(ended[2].ru_maxrss / 2**20, 2),
        "peak_without_mapped_gib": round(anonymous / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=10.0)
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dir", default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        root = Path(folder)
        for name in ("configs", "models", "chat_templates", "data/samples"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).symlink_to(ROOT / name)
        began = time.monotonic()
        rows = write(root / "rows/train", args.gib, args.files)
        size = sum(file.stat().st_size for file in (root / "rows/train").iterdir()) / 2**30
        print(
            f"{size:.2f} GiB, {rows:,} rows of {TOKENS} tokens, written in {time.monotonic() - began:.0f} s", flush=True
        )
        for name in ("first", "second"):
            print(name, json.dumps(train(root, root / "rows", name, args.steps)), flush=True)


if __name__ == "__main__":
    main()
