"""The sections of `gpu.py` about memory: steps of mixed lengths under a cap; the planner against measured memory."""

from __future__ import annotations

import random
import statistics
from concurrent.futures import Executor, Future
from typing import Any

from benchmarks.gpu_bench import CONTEXT, GIB, Bench, step_batch

Case = tuple[str, dict[str, Any], str, int]  # name, config.json, mode, length


def trials(bench: Bench) -> dict[str, Any]:
    from benchmarks import shapes

    size, longest, card = ("tiny", 64, 8) if bench.tiny else ("3B", 2048, 8)
    bench.cap(card - CONTEXT)
    model = shapes.build(shapes.qwen(size), shapes.settings("qlora", longest), bench.device)
    rng, lowered, count = random.Random(1), list[int](), 0
    steps = [[min(longest, max(8, round(longest * rng.random() ** 2))) for _ in range(8)] for _ in range(50)]
    probe = _probe(bench, model, max(steps, key=max))
    optimizer, budget = bench.optimizer(model), probe.tokens
    for lengths in steps:
        if not bench.has_time():
            break
        *_, fitted = bench.step(model, optimizer, step_batch(lengths), budget)
        lowered += [fitted] if fitted < budget else []
        budget, count = fitted, count + 1
    results = {"model": size, "card_gib": card, "trials": count, "out_of_memory": len(lowered), "budget": budget}
    results |= {"probe": probe._asdict(), **bench.peaks()}
    del model, optimizer
    bench.cap(None)
    return results


class _NoGauge:
    """Stands in for the memory gauge of a GPU on a CPU."""

    total = 1 << 50

    def start(self) -> None:
        return

    def peak(self) -> int:
        return 0


def _probe(bench: Bench, model: Any, lengths: list[int]) -> Any:
    """The measurements that a run makes before its first step, on random rows of these lengths."""
    from sft.step import attention
    from sft.step.step import StepConfig
    from sft.training.autobatch import CudaGauge, MemoryProbe

    packed = attention.keeps_rows_apart(model)
    config = StepConfig(device=bench.device, packed=packed, autocast=bench.torch.bfloat16)
    rows = [{"id": str(n), "input_ids": [5] * length, "labels": [5] * length} for n, length in enumerate(lengths)]
    gauge = CudaGauge(bench.torch.device("cuda", 0)) if bench.cuda else _NoGauge()
    return MemoryProbe(model, config, rows, lengths, gauge, most_rows=len(rows), time_limit=30.0).run()


def planner(bench: Bench) -> dict[str, Any]:
    from benchmarks import shapes

    results, workspaces = list[dict[str, Any]](), bench.workspaces()
    for case, future in bench.plans:
        if not bench.has_time():
            break
        name, description, mode, length = case
        config = _settings(case)
        result: dict[str, Any] = {"model": name, "mode": mode, "length": length}
        model = optimizer = None
        try:
            planned = future.result(timeout=bench.seconds()) + workspaces
            model = shapes.build(description, config, bench.device)
            optimizer = bench.optimizer(model)
            bench.step(model, optimizer, step_batch([length]), length, replay=False)
            bench.clear()
            bench.step(model, optimizer, step_batch([length]), length, replay=False)
            peaks = bench.peaks()
            result |= {"planned_gib": round(planned, 3), **peaks}
            if measured := peaks["allocated_gib"]:
                result["error"] = round(planned / measured - 1, 4)
        except Exception as error:
            result["failed"] = f"{type(error).__name__}: {error}"[:200]
        results.append(result)
        bench.save({"of": results})
        del model, optimizer
        bench.clear()
    errors = sorted(abs(result["error"]) for result in results if "error" in result)
    summary = {"median_error": statistics.median(errors), "worst_error": errors[-1]} if errors else {}
    return {"configs": len(errors), "cublas_gib": round(workspaces, 3), **summary, "of": results}


def plans(bench: Bench, pool: Executor) -> list[tuple[Case, Future[float]]]:
    """Plans in the background on the CPU, in the order in which `planner` uses them, while the GPU is measured."""
    from benchmarks.shapes import qwen

    sizes = [("tiny", 64)] if bench.tiny else [(s, n) for s in ("0.5B", "1.5B", "3B", "7B") for n in (512, 1024, 2048)]
    cases = [(f"qwen2 {size}", qwen(size), mode, n) for size, n in sizes for mode in ("qlora", "lora")]
    cases += [(name, desc, "qlora", n) for name, desc in _others(bench.tiny).items() for n in (512, 2048)]
    random.Random(0).shuffle(cases)  # so that no single family is left out when time runs out
    kind, card = ("cuda" if bench.cuda else "cpu"), (bench.device, bench.total / GIB or 64.0)
    return [(case, pool.submit(_planned, case, kind, card)) for case in cases]


def _planned(case: Case, kind: Any, card: tuple[str, float]) -> float:
    """GiB of tensors in a training step, as planned."""
    from sft.memory import plan
    from sft.memory.devices import Device

    return plan.make_plan(_settings(case), case[1], Device(kind, *card)).training.allocated


def _settings(case: Case) -> Any:
    from benchmarks import shapes

    _, _, mode, length = case
    return shapes.settings(mode, length, batch_size=1, effective_batch=1, micro_batch_tokens=length)


def _others(tiny: bool) -> dict[str, dict[str, Any]]:
    """Other families at real widths, with few layers."""
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
