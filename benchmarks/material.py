"""What the benchmarks share: rows of real or made lengths, what machine this is, how results are kept."""

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
    """Rows of an Alpaca file in ChatML, `most` of them drawn with one seed: the answer is labelled; cut at `longest`.

    vocabulary: token numbers are folded into it (a small model's). Rows without an answer are left out.
    """
    from tokenizers import Tokenizer

    tok, found = Tokenizer.from_file(str(tokenizer)), list[Row]()
    read = json.loads(path.read_text(encoding="utf-8"))
    drawn = random.Random(0).sample(read, min(most, len(read)))
    for index, row in enumerate(drawn):
        asked = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
        prompt = tok.encode(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n").ids
        answer = tok.encode(f"{row['output']}<|im_end|>").ids
        ids = [token % vocabulary if vocabulary else token for token in prompt + answer][:longest]
        if len(ids) > len(prompt):
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            found.append({"id": f"row-{index}", "input_ids": ids, "labels": labels})
    return found


def made(count: int, *, longest: int, vocabulary: int, seed: int = 0) -> list[Row]:
    """Rows of made tokens whose lengths spread as Alpaca's do: log-normal, median 70 tokens, sigma 0.75."""
    draw, found = random.Random(seed), list[Row]()
    for index in range(count):
        length = max(8, min(longest, round(math.exp(draw.gauss(math.log(70), 0.75)))))
        prompt = max(2, min(length - 2, round(length * draw.betavariate(2, 2))))
        ids = [draw.randrange(3, vocabulary) for _ in range(length)]
        found.append({"id": f"row-{index}", "input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def share(rows: list[Row]) -> float:
    """Labelled tokens over all tokens."""
    return sum(label != -100 for row in rows for label in row["labels"]) / sum(len(row["input_ids"]) for row in rows)


def with_share(rows: list[Row], wanted: float, count: int, *, seed: int = 0) -> list[Row]:
    """`count` rows drawn at random, then exchanged one by one for others until `wanted` of their tokens is labelled."""
    draw, rows = random.Random(seed), list(rows)
    draw.shuffle(rows)
    chosen, rest = rows[:count], rows[count:]
    for _ in range(20_000 if rest else 0):
        off = abs(share(chosen) - wanted)
        if off < 0.005:
            break
        ours, theirs = draw.randrange(len(chosen)), draw.randrange(len(rest))
        chosen[ours], rest[theirs] = rest[theirs], chosen[ours]
        if abs(share(chosen) - wanted) >= off:
            chosen[ours], rest[theirs] = rest[theirs], chosen[ours]
    return chosen


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where and with what a result was measured."""
    import torch

    from sft import runs

    found = {
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
        found["gpu"] = {"name": card.name, "gib": round(card.total_memory / 2**30, 2), "cuda": torch.version.cuda}
    return found


def matmul_peak(device: str, dtype: Any, *, size: int = 2048, seconds: float = 1.0) -> float:
    """FLOP/s of a square matrix product, the best of all that fit into `seconds`."""
    import torch

    one, best = torch.randn(size, size, device=device, dtype=dtype), 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        began = time.perf_counter()
        one @ one
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def keep(name: str, result: dict[str, Any], lines: list[str], out: Path | None = None) -> Path:
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
