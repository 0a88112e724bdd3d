"""The loss head: our tiled cross-entropy beside torch's `linear_cross_entropy` and full logits.

    python benchmarks/head.py [--rounds 5] [--positions 2048] [--hidden 896] [--vocabulary 32768] [--trained]

Time of forward and backward in interleaved rounds (median, and each round's ratio to ours), highest resident memory of
a process of its own above what it held before, largest relative error of loss and gradient against fp64, and the bytes
that a trace of fake tensors (as the planner's) sees at its highest. On the CPU; --trained also trains the head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "scripts")]

SIDES = ("ours", "torch none", "torch sum", "full")
TILE = 512


def losses(side: str, hidden: Any, weight: Any, targets: Any) -> Any:
    """The summed cross-entropy of `hidden @ weight.T`, computed by the variant `side`."""
    import torch
    from torch.nn import LinearCrossEntropyOptions, functional

    from sft.step.loss import IDENTITY, _TiledCrossEntropy

    if side == "ours":
        return _TiledCrossEntropy.apply(hidden, weight, None, targets, IDENTITY, TILE, 0.0, True).sum()
    if side == "full":
        return functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")
    if side == "exact":
        logits = functional.linear(hidden.double(), weight.double())
        return functional.cross_entropy(logits, targets, reduction="sum")
    options, reduction = LinearCrossEntropyOptions(), side.split()[1]
    return torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=options).sum()


def inputs(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Hidden states [N, h], the head's weight [V, h] and targets [N], in fp32."""
    import torch

    torch.manual_seed(0)
    hidden = torch.randn(args.positions, args.hidden).requires_grad_()
    weight = (torch.randn(args.vocabulary, args.hidden) / args.hidden**0.5).requires_grad_(args.trained)
    return hidden, weight, torch.randint(args.vocabulary, (args.positions,))


def run(side: str, hidden: Any, weight: Any, targets: Any) -> tuple[float, Any, Any]:
    """(seconds, loss, gradient of hidden) of one forward and backward."""
    hidden.grad = weight.grad = None
    began = time.perf_counter()
    loss = losses(side, hidden, weight, targets)
    loss.backward()
    return time.perf_counter() - began, loss.detach(), hidden.grad


def resident(field: str) -> float:
    """MiB of a field of /proc/self/status: VmRSS, or VmHWM for the highest so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def memory(side: str, args: argparse.Namespace) -> dict[str, float]:
    """Highest resident MiB of this process above its size with the inputs allocated, and what a trace sees."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.weak import WeakIdKeyDictionary

    tensors = inputs(args)
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident size
    before = resident("VmRSS")
    run(side, *tensors)
    used = resident("VmHWM") - before

    storages: Any = WeakIdKeyDictionary()
    highest = [0]

    class Trace(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    storages[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
            highest[0] = max(highest[0], sum(storages.values()))
            return out

    with FakeTensorMode():
        fake = inputs(args)
        try:
            with Trace():
                run(side, *fake)
        except Exception as error:
            return {"resident_mib": round(used, 1), "traced_mib": float("nan"), "trace": str(error)[:100]}  # type: ignore[dict-item]
    return {"resident_mib": round(used, 1), "traced_mib": round(highest[0] / 2**20, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--trained", action="store_true", help="the head is trained too")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(memory(args.memory_of, args)))
        return
    tensors = inputs(args)
    _, loss, gradient = run("exact", *tensors)
    results: dict[str, dict[str, Any]] = {side: {"seconds": []} for side in SIDES}
    for index in range(args.rounds + 1):  # the first round only warms up
        for side in SIDES:
            seconds, side_loss, side_gradient = run(side, *tensors)
            if index:
                results[side]["seconds"].append(seconds)
            results[side]["loss_error"] = float(abs(side_loss.double() - loss) / loss)
            results[side]["gradient_error"] = float((side_gradient - gradient).norm() / gradient.norm())
    ours = results["ours"]["seconds"]
    for side in SIDES:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--memory-of", side], capture_output=True, text=True, check=True
        )
        own = results[side]["seconds"]
        ratios = [round(mine / theirs, 3) for mine, theirs in zip(own, ours, strict=True)]
        results[side] |= {"seconds": round(statistics.median(own), 3), "times_ours": sorted(ratios)}
        results[side] |= json.loads(done.stdout)
    print(json.dumps({"settings": vars(args), "sides": results}, indent=1))


if __name__ == "__main__":
    main()
