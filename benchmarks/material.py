"""Shared by the benchmarks: rows of real or generated lengths, facts about the machine, saving of results."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared" / "data"
ALPACA = SHARED / "instruct" / "alpaca_52k.json"
TOKENIZER = SHARED / "tokenizers" / "qwen2.5" / "tokenizer.json"
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "unsloth", "liger_kernel")
Row = dict[str, Any]


def alpaca(path: Path, tokenizer: Path, *, longest: int, vocabulary: int | None = None, most: int = 4000) -> list[Row]:
    """At most `most` rows of an Alpaca file in ChatML, drawn with a seed, truncated at `longest`; answers labelled.

    vocabulary: token numbers are folded into it (a small model's). Rows without an answer are left out.
    """
    from tokenizers import Tokenizer

    tok, rows = Tokenizer.from_file(str(tokenizer)), list[Row]()
    records = json.loads(path.read_text(encoding="utf-8"))
    sample = random.Random(0).sample(records, min(most, len(records)))
    for index, row in enumerate(sample):
        question = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
        prompt = tok.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").ids
        answer = tok.encode(f"{row['output']}<|im_end|>").ids
        ids = [token % vocabulary if vocabulary else token for token in prompt + answer][:longest]
        if len(ids) > len(prompt):
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            rows.append({"id": f"row-{index}", "input_ids": ids, "labels": labels})
    return rows


def generated_rows(count: int, *, longest: int, vocabulary: int, seed: int = 0) -> list[Row]:
    """Rows of random tokens whose lengths are distributed as Alpaca's: log-normal, median 70 tokens, sigma 0.75."""
    rng, rows = random.Random(seed), list[Row]()
    for index in range(count):
        length = max(8, min(longest, round(math.exp(rng.gauss(math.log(70), 0.75)))))
        prompt = max(2, min(length - 2, round(length * rng.betavariate(2, 2))))
        ids = [rng.randrange(3, vocabulary) for _ in range(length)]
        rows.append({"id": f"row-{index}", "input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def share(rows: list[Row]) -> float:
    """Labelled tokens over all tokens."""
    return sum(label != -100 for row in rows for label in row["labels"]) / sum(len(row["input_ids"]) for row in rows)


def with_share(rows: list[Row], target: float, count: int, *, seed: int = 0) -> list[Row]:
    """`count` rows drawn at random, then swapped one by one until `target` of their tokens is labelled."""
    rng, rows = random.Random(seed), list(rows)
    rng.shuffle(rows)
    chosen, rest = rows[:count], rows[count:]
    for _ in range(20_000 if rest else 0):
        off = abs(share(chosen) - target)
        if off < 0.005:
            break
        mine, theirs = rng.randrange(len(chosen)), rng.randrange(len(rest))
        chosen[mine], rest[theirs] = rest[theirs], chosen[mine]
        if abs(share(chosen) - target) >= off:
            chosen[mine], rest[theirs] = rest[theirs], chosen[mine]
    return chosen


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine, the versions and the command that a result was measured with."""
    import torch

    from sft import runs

    result = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "versions": runs.versions(LIBRARIES),
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        result["gpu"] = {"name": card.name, "gib": round(card.total_memory / 2**30, 2), "cuda": torch.version.cuda}
    return result


def matmul_peak(device: str, dtype: Any, *, size: int = 2048, seconds: float = 1.0) -> float:
    """FLOP/s of a square matrix product: the best of those that run within `seconds`."""
    import torch

    matrix, best = torch.randn(size, size, device=device, dtype=dtype), 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        began = time.perf_counter()
        matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def save_results(name: str, result: dict[str, Any], lines: list[str], out: Path | None = None) -> Path:
    """Writes NAME.json and NAME.md; returns the JSON's path."""
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()
