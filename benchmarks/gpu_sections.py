"""The sections of `gpu.py`: each takes the device with its time limit and returns what it measured."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_bench import CONTEXT, Bench, step_batch
from benchmarks.gpu_memory import planner, trials

ROOT = Path(__file__).resolve().parents[1]
CARDS = (("7B", 1024, 8), ("14B", 512, 12), ("32B", 2048, 24))


def cards(bench: Bench) -> dict[str, Any]:
    from benchmarks import shapes
    from sft.step.step import out_of_memory

    results = []
    for size, length, card in [("tiny", 64, card) for *_, card in CARDS] if bench.tiny else CARDS:
        if not bench.has_time():
            results.append({"model": size, "skipped": "no time left"})
            continue
        bench.cap(card - CONTEXT)
        result: dict[str, Any] = {"model": size, "length": length, "card_gib": card, "cap_gib": card - CONTEXT}
        model = optimizer = None
        try:
            model = shapes.build(shapes.qwen(size), shapes.settings("qlora", length), bench.device)
            optimizer = bench.optimizer(model)
            timed = [bench.step(model, optimizer, step_batch([length] * 4), length, replay=False) for _ in range(3)]
            result |= {"fits": True, "tokens_per_second": round(4 * length / timed[-1][0], 1), "norm": timed[-1][1]}
        except Exception as error:
            result |= {"fits": False} if out_of_memory(error) else {"failed": type(error).__name__}
            result["error"] = str(error)[:200]
        results.append({**result, **bench.peaks()})
        bench.save({"cards": results})
        del model, optimizer
    bench.cap(None)
    return {"cards": results}


def speed(bench: Bench) -> dict[str, Any]:
    from benchmarks import flops, material, shapes
    from sft.model.adapters import unwrap
    from sft.model.kernels import apply_kernels

    peak = material.matmul_peak(bench.device, bench.torch.bfloat16, size=8192 if bench.cuda else 512)
    length, size = (64, "tiny") if bench.tiny else (2048, "7B")
    lengths, results = [length] * 8, []
    model = shapes.build(shapes.qwen(size), shapes.settings("qlora", length), bench.device, checkpointing=True)
    optimizer, batch = bench.optimizer(model), step_batch(lengths)
    for checkpointing, kernels in ((True, "plain"), (False, "plain"), (False, "liger"), (False, "compiled")):
        if not bench.has_time():
            break
        if not checkpointing:
            unwrap(model).gradient_checkpointing_disable()
        result = {"model": size, "length": length, "checkpointing": checkpointing, "kernels": kernels}
        bench.clear()
        began = bench.now()
        try:
            apply_kernels(model, kernels, device=bench.device, autocast=bench.torch.bfloat16)  # type: ignore[arg-type]
            timed = [bench.step(model, optimizer, batch, 2 * length, replay=False)]
            first = bench.now() - began
            timed += [bench.step(model, optimizer, batch, 2 * length, replay=False) for _ in range(2)]
        except Exception as error:  # out of memory, or a compiler that fails
            model.zero_grad(set_to_none=True)
            results.append({**result, "failed": f"{type(error).__name__}: {error}"[:200]})
            continue
        a_token = flops.a_token(flops.shape_of(model), lengths, 1.0, frozen=True, checkpointing=checkpointing)
        rate = sum(lengths) / min(seconds for seconds, *_ in timed[1:])
        used = rate * a_token / peak
        rejected = "over 100 % of the peak" if used > 1 else "zero gradient" if not timed[-1][1] else None
        results.append(
            {
                **result,
                "first_step_s": round(first, 1),
                "tokens_per_second": round(rate, 1),
                "share_of_matmul_peak": round(used, 4),
                "gflop_a_token": round(a_token / 1e9, 3),
                "thrown_out": rejected,
                **bench.peaks(),
            }
        )
        bench.save({"runs": results})
    return {"matmul_peak_tflops": round(peak / 1e12, 2), "micro_batch_tokens": 2 * length, "runs": results}


def peers(bench: Bench) -> dict[str, Any]:
    from benchmarks import material, shapes
    from benchmarks.sides import Settings, make_sides

    size, longest, count = ("tiny", 64, 16) if bench.tiny else ("1.5B", 1024, 128)
    sizes = {"longest": longest, "vocabulary": 2000}
    on_disk = material.ALPACA.exists() and not bench.tiny
    if on_disk:
        rows = material.alpaca(material.ALPACA, material.TOKENIZER, **sizes)
    else:
        rows = material.generated_rows(2000, **sizes)
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
        timed: dict[str, list[Any]] = {name: [] for name in names}
        failed: dict[str, str] = {}
        sides = make_sides(model, setup, names)
        for turn in range(4):  # the first warms up
            for side in sides:
                if side.name in failed or not bench.has_time():
                    continue
                try:
                    outcome = side.round(rows)
                except Exception as error:
                    failed[side.name] = f"{type(error).__name__}: {error}"[:200]
                    continue
                if turn:
                    timed[side.name].append(outcome)
        del sides
        unsloth = (
            _unsloth(bench, rows, size, Path(folder)) if bench.has_time() and bench.cuda else {"skipped": "no GPU"}
        )
    result = {
        name: {
            "tokens_per_second": round(statistics.median(tokens / result.seconds for result in rounds), 1),
            "memory_mib": round(statistics.median(result.memory_mib for result in rounds), 1),
            "loss_after": round(statistics.median(result.loss for result in rounds), 5),
            "rounds": len(rounds),
            "thrown_out": "zero gradient" if min(min(result.norms) for result in rounds) == 0 else None,
        }
        for name, rounds in timed.items()
        if rounds
    }
    ours = result.get("ours", {}).get("tokens_per_second")
    ratios = {name: round(ours / result["tokens_per_second"], 3) for name, result in result.items()} if ours else {}
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
    """Unsloth patches the libraries it imports, so it runs in its own process, on weights of the same shapes."""
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
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=bench.seconds(), check=False)
    except subprocess.TimeoutExpired:
        return {"failed": "ran out of time"}
    lines = [line for line in outcome.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"failed": outcome.stderr[-400:]}


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "cards": cards,
    "speed": speed,
    "peers": peers,
    "trials": trials,
    "planner": planner,
}
