"""The sections of `gpu.py`: each takes the device and its time box, and gives what it measured."""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_bench import GIB, Bench, window

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 0.6
CARDS = (("7B", 1024, 8), ("14B", 512, 12), ("32B", 2048, 24))


def cards(bench: Bench) -> dict[str, Any]:
    from benchmarks import shapes

    found = []
    for size, length, card in [("tiny", 64, card) for *_, card in CARDS] if bench.tiny else CARDS:
        if not bench.left():
            found.append({"model": size, "skipped": "no time left"})
            continue
        bench.cap(card - CONTEXT)
        result: dict[str, Any] = {"model": size, "length": length, "card_gib": card, "cap_gib": card - CONTEXT}
        made = optimizer = None
        try:
            made = shapes.build(shapes.qwen(size), shapes.settings("qlora", length), bench.device)
            optimizer = bench.optimizer(made)
            took = [bench.step(made, optimizer, window([length] * 4), length, replay=False) for _ in range(3)]
            result |= {"fits": True, "tokens_per_second": round(4 * length / took[-1][0], 1), "norm": took[-1][1]}
        except bench.torch.OutOfMemoryError as error:
            result |= {"fits": False, "said": str(error)[:200]}
        found.append({**result, **bench.peaks()})
        del made, optimizer
    bench.cap(None)
    return {"cards": found}


def speed(bench: Bench) -> dict[str, Any]:
    from benchmarks import material, shapes
    from sft.model import kernels
    from sft.step import flops, unwrap

    peak = material.matmul_peak(bench.device, bench.torch.bfloat16, size=8192 if bench.cuda else 512)
    length, size = (64, "tiny") if bench.tiny else (2048, "7B")
    lengths, found = [length] * 8, []
    made = shapes.build(shapes.qwen(size), shapes.settings("qlora", length), bench.device, checkpointing=True)
    optimizer, batch = bench.optimizer(made), window(lengths)
    for checkpointing, way in ((True, "plain"), (False, "plain"), (False, "liger"), (False, "compiled")):
        if not bench.left():
            break
        if not checkpointing:
            unwrap(made).gradient_checkpointing_disable()
        one = {"model": size, "length": length, "checkpointing": checkpointing, "kernels": way}
        if reason := kernels.why_not(unwrap(made), way, device=bench.device):
            found.append({**one, "skipped": reason})
            continue
        bench.clear()
        began = bench.now()
        try:
            kernels.take(made, way)
            took = [bench.step(made, optimizer, batch, 2 * length, replay=False)]
            first = bench.now() - began
            took += [bench.step(made, optimizer, batch, 2 * length, replay=False) for _ in range(2)]
        except Exception as error:  # out of memory, or a compiler that fails
            made.zero_grad(set_to_none=True)
            found.append({**one, "failed": f"{type(error).__name__}: {error}"[:200]})
            continue
        a_token = flops.a_token(flops.shape_of(made), lengths, 1.0, frozen=True, checkpointing=checkpointing)
        rate = sum(lengths) / min(seconds for seconds, _ in took[1:])
        used = rate * a_token / peak
        wrong = "over 100 % of the peak" if used > 1 else "zero gradient" if not took[-1][1] else None
        found.append(
            {
                **one,
                "first_step_s": round(first, 1),
                "tokens_per_second": round(rate, 1),
                "share_of_matmul_peak": round(used, 4),
                "gflop_a_token": round(a_token / 1e9, 3),
                "thrown_out": wrong,
                **bench.peaks(),
            }
        )
    return {"matmul_peak_tflops": round(peak / 1e12, 2), "micro_batch_tokens": 2 * length, "runs": found}


def peers(bench: Bench) -> dict[str, Any]:
    from benchmarks import material, shapes
    from benchmarks.sides import Settings, everyone

    size, longest, count = ("tiny", 64, 16) if bench.tiny else ("1.5B", 1024, 128)
    sizes = {"longest": longest, "vocabulary": 2000}
    there = material.ALPACA.exists() and not bench.tiny
    rows = material.alpaca(material.ALPACA, material.TOKENIZER, **sizes) if there else material.made(2000, **sizes)
    rows = material.with_share(rows, 0.5, count)
    tokens = sum(len(row["input_ids"]) for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        setup = Settings(
            longest=longest, device=bench.device, bf16=True, checkpointing=True, folder=Path(folder), tokens=4096
        )

        def model(attn: str) -> Any:
            chosen = None if attn != "sdpa" else attn
            return shapes.build(shapes.qwen(size), shapes.settings("qlora", longest), bench.device, attn=chosen)

        names = ["ours", "hf grouped", "trl default", "trl packing"]
        took: dict[str, list[Any]] = {name: [] for name in names}
        failed: dict[str, str] = {}
        sides = everyone(model, setup, names)
        for turn in range(4):  # the first warms up
            for side in sides:
                if side.name in failed or not bench.left():
                    continue
                try:
                    done = side.round(rows)
                except Exception as error:
                    failed[side.name] = f"{type(error).__name__}: {error}"[:200]
                    continue
                if turn:
                    took[side.name].append(done)
        del sides
        unsloth = _unsloth(bench, rows, size, Path(folder)) if bench.left() and bench.cuda else {"skipped": "no GPU"}
    result = {
        name: {
            "tokens_per_second": round(statistics.median(tokens / one.seconds for one in many), 1),
            "memory_mib": round(statistics.median(one.memory_mib for one in many), 1),
            "loss_after": round(statistics.median(one.loss for one in many), 5),
            "rounds": len(many),
            "thrown_out": "zero gradient" if min(min(one.norms) for one in many) == 0 else None,
        }
        for name, many in took.items()
        if many
    }
    ours = result.get("ours", {}).get("tokens_per_second")
    ratios = {name: round(ours / one["tokens_per_second"], 3) for name, one in result.items()} if ours else {}
    return {
        "model": size,
        "rows": len(rows),
        "tokens": tokens,
        "labelled": round(material.share(rows), 3),
        "sides": result,
        "ours_over": ratios,
        "could_not_run": failed,
        "unsloth": unsloth,
    }


def _unsloth(bench: Bench, rows: Any, size: str, folder: Path) -> dict[str, Any]:
    """Unsloth patches what it imports, so it runs in a process of its own, on weights of the same shapes."""
    if importlib.util.find_spec("unsloth") is None:
        return {"skipped": "not installed"}
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from benchmarks import shapes

    with bench.torch.device("cuda"):
        plain = Qwen2ForCausalLM(Qwen2Config(**shapes.qwen(size), torch_dtype="bfloat16")).to(bench.torch.bfloat16)
    plain.save_pretrained(folder / "weights")
    AutoTokenizer.from_pretrained(ROOT / "models" / "demo").save_pretrained(folder / "weights")
    del plain
    bench.clear()
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "unsloth_side.py"), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": "took longer than 150 s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"failed": done.stderr[-400:]}


def trials(bench: Bench) -> dict[str, Any]:
    from benchmarks import shapes

    size, longest, card = ("tiny", 64, 8) if bench.tiny else ("3B", 2048, 8)
    bench.cap(card - CONTEXT)
    made = shapes.build(shapes.qwen(size), shapes.settings("qlora", longest), bench.device)
    draw, lowered, done = random.Random(1), list[int](), 0
    steps = [[min(longest, max(8, round(longest * draw.random() ** 2))) for _ in range(8)] for _ in range(50)]
    rehearsed = _rehearsed(bench, made, max(steps, key=max))
    optimizer, budget = bench.optimizer(made), rehearsed.tokens
    for lengths in steps:
        if not bench.left():
            break
        bench.step(made, optimizer, window(lengths), budget, on_budget=lowered.append)
        budget, done = min([budget, *lowered]), done + 1
    found = {"model": size, "card_gib": card, "trials": done, "out_of_memory": len(lowered), "budget": budget}
    found |= {"rehearsed": rehearsed.to_json(), **bench.peaks()}
    del made, optimizer
    bench.cap(None)
    return found


class _NoGauge:
    """In the place of a card's memory on the CPU."""

    total = 1 << 50

    def start(self) -> None:
        return

    def peaks(self) -> tuple[int, int]:
        return 0, 0


def _rehearsed(bench: Bench, model: Any, lengths: list[int]) -> Any:
    """The rehearsal that a run has before its first step, on made rows of these lengths."""
    from sft.memory.probe import CudaGauge
    from sft.step import attention
    from sft.training.recipe import Recipe
    from sft.training.rehearsal import Scene, rehearse

    recipe = Recipe(
        kind="causal",
        device=bench.device,
        tokens=4096,
        rows=None,
        apart=attention.keeps_rows_apart(model),
        logits="chunked",
        tile=512,
        label_smoothing=0.0,
        autocast=bench.torch.bfloat16,
    )
    rows = [{"id": str(n), "input_ids": [5] * length, "labels": [5] * length} for n, length in enumerate(lengths)]
    gauge = CudaGauge(bench.torch.device("cuda", 0)) if bench.cuda else _NoGauge()
    return rehearse(Scene(model, recipe, rows, lengths, rows, len(rows), gauge, limit=30.0))


def planner(bench: Bench) -> dict[str, Any]:
    from benchmarks import shapes
    from sft.memory import plan
    from sft.memory.devices import Device

    sizes = [("tiny", 64)] if bench.tiny else [(s, n) for s in ("0.5B", "1.5B", "3B", "7B") for n in (512, 1024, 2048)]
    cases = [(f"qwen2 {size}", shapes.qwen(size), mode, n) for size, n in sizes for mode in ("qlora", "lora")]
    cases += [(name, desc, "qlora", n) for name, desc in _others(bench.tiny).items() for n in (512, 2048)]
    random.Random(0).shuffle(cases)  # where time runs out, what is left out is no one family
    device, found = Device("cuda" if bench.cuda else "cpu", bench.device, bench.total / GIB or 64.0), []
    for name, description, mode, length in cases:
        if not bench.left():
            break
        config = shapes.settings(mode, length, batch_size=1, effective_batch=1, micro_batch_tokens=length)
        one: dict[str, Any] = {"model": name, "mode": mode, "length": length}
        made = optimizer = None
        try:
            planned = plan.make(config, description, device).estimate.allocated
            made = shapes.build(description, config, bench.device)
            optimizer = bench.optimizer(made)
            bench.step(made, optimizer, window([length]), length, replay=False)
            bench.clear()
            bench.step(made, optimizer, window([length]), length, replay=False)
            peaks = bench.peaks()
            one |= {"planned_gib": round(planned, 3), **peaks}
            if measured := peaks["allocated_gib"]:
                one["error"] = round(planned / measured - 1, 4)
        except Exception as error:
            one["failed"] = f"{type(error).__name__}: {error}"[:200]
        found.append(one)
        del made, optimizer
        bench.clear()
    errors = sorted(abs(one["error"]) for one in found if "error" in one)
    median = statistics.median(errors) if errors else None
    return {"configs": len(found), "median_error": median, "worst_error": errors[-1] if errors else None, "of": found}


def _others(tiny: bool) -> dict[str, dict[str, Any]]:
    """Other families at real widths; few layers, which are alike."""
    if tiny:
        return {}
    grouped = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 16}
    keys = {**grouped, "num_key_value_heads": 4}
    return {
        "llama": {"model_type": "llama", "vocab_size": 128256, **keys},
        "mistral": {"model_type": "mistral", "vocab_size": 32768, "sliding_window": None, **keys},
        "qwen3": {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, **keys},
        "phi3": {"model_type": "phi3", "vocab_size": 32064, "pad_token_id": 0, **keys},
        "olmo2": {"model_type": "olmo2", "vocab_size": 100352, **keys},
        "gemma2": {"model_type": "gemma2", "vocab_size": 256000, "head_dim": 128, **keys},
    }


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "cards": cards,
    "speed": speed,
    "peers": peers,
    "trials": trials,
    "planner": planner,
}
