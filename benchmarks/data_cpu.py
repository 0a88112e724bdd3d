"""What `process_data` costs: wall and CPU seconds and peak memory, on a generated file or one of your own.

    python benchmarks/data_cpu.py                                   # 2,000,000 generated rows, about 1 GB
    python benchmarks/data_cpu.py --data alpaca_52k.json --set data.near_duplicates=report

The generated rows are Alpaca rows of 40 to 140 random English-like words, seeded; 1 % are exact duplicates and 1 % have
an empty answer. The command runs as a user would run it; its ledger must add up to the rows generated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_rows(path: Path, rows: int) -> None:
    """Writes `rows` rows as JSON lines, about 500 bytes each."""
    rng = random.Random(20261121)
    letters, vowels = "bcdfghklmnprstvw", "aeiou"
    words = ["".join(rng.choice(letters) + rng.choice(vowels) for _ in range(rng.randint(1, 4))) for _ in range(20_000)]
    text = " ".join(rng.choices(words, k=1_000_000))
    last = ""
    with path.open("w", encoding="utf-8") as out:
        for number in range(rows):
            start, size = rng.randrange(len(text) - 1_000), rng.randint(200, 700)
            row = {
                "instruction": f"{text[start : start + size // 4]} {number}",
                "input": text[start + size // 4 : start + size // 2] if number % 2 else "",
                "output": "" if number % 100 == 7 else text[start + size // 2 : start + size],
            }
            line = last if number % 100 == 9 else json.dumps(row) + "\n"
            out.write(line)
            last = line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows to generate")
    parser.add_argument("--data", type=Path, help="a file of your own instead")
    parser.add_argument("--set", action="append", default=[], help="settings for process_data")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or Path(folder) / "rows.jsonl"
        if args.data is None:
            write_rows(data, args.rows)
        command = [sys.executable, str(ROOT / "scripts/process_data.py"), "--raw_path", str(data.resolve()), "--json"]
        sets = [f"data.processed_dir={folder}/out", *args.set]
        command += [part for pair in sets for part in ("--set", pair)]
        began = time.monotonic()
        with open(Path(folder) / "ledger", "wb") as out:
            child = subprocess.Popen(command, stdout=out)
            _, status, used = os.wait4(child.pid, 0)
        wall = time.monotonic() - began
        if status:
            raise SystemExit(f"process_data ended with status {status}")
        ledger = json.loads((Path(folder) / "ledger").read_text())
        if ledger["rows_read"] != ledger["rows_written"] + ledger["rows_named"] or (
            not args.data and ledger["rows_read"] != args.rows
        ):
            raise SystemExit("the ledger does not add up")
        size = data.stat().st_size / 1e6
    cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20
    print(f"{ledger['rows_read']:,} rows, {size:,.0f} MB: {wall:.1f} s, {cpu:.1f} s of CPU, peak {peak:.2f} GiB")
    print(f"named: {ledger['named']}, splits: {ledger['splits']}, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
