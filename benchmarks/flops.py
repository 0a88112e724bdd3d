"""Operations of one training step, counted while it runs, against the formula of the mode that ran.

    python benchmarks/flops.py [--json]

The model is `step_cpu.py`'s, with a small vocabulary under --tiny; rows are Alpaca's where the file exists, else
generated with the same lengths. Counts do not depend on the machine.
Every mode: frozen base with LoRA, full; with and without checkpointing; packed and padded.

A product of [m, k] and [k, n] is 2mkn operations. For each computed token (padding included), by mode:

    frozen base, no checkpointing   4N + 6N_lora +  7 S d L + 4 rho V h
    frozen base, checkpointing      6N + 8N_lora +  9 S d L + 4 rho V h
    full, no checkpointing          6N           +  7 S d L + 6 rho V h
    full, checkpointing             8N           +  9 S d L + 6 rho V h

N the weights of the blocks' linear layers, each used once a token: forward 2N, gradient of the input 2N, gradient of
the weight 2N where it is trained, 2N more for the recomputed forward. S the length of a token's own row, so
sum(s^2) / sum(s); d L the width of attention times layers. Causal attention is counted as half a square: 2 S d forward
and 5 S d backward (five products to the forward's two: FlashAttention-2, Dao 2023). rho the labelled share; V h the
head, whose gradient is formed in the forward pass, so that it is never recomputed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

MODES = [
    (frozen, recompute, packed) for frozen in (True, False) for recompute in (False, True) for packed in (True, False)
]


@dataclass(frozen=True)
class Shape:
    """Weights of the blocks' linear layers, of adapters on them, attention's width times layers, the head's weights."""

    linear: int
    lora: int
    attention: int
    head: int


def a_token(shape: Shape, lengths: Sequence[int], labelled: float, *, frozen: bool, checkpointing: bool) -> float:
    """Operations a computed token. lengths: of the rows in the batch; labelled: share of computed tokens."""
    recompute = 2 if checkpointing else 0
    own = sum(length**2 for length in lengths) / sum(lengths)
    blocks = (4 if frozen else 6) + recompute
    lora, attention = (6 + recompute) * shape.lora, (7 + recompute) * own * shape.attention
    return blocks * shape.linear + lora + attention + (4 if frozen else 6) * labelled * shape.head


def shape_of(model: Any) -> Shape:
    """Read off a decoder (with or without peft): every matrix outside of the embeddings and the head is a block's."""
    from torch import nn

    from sft.model.adapters import unwrap

    base: Any = unwrap(model)
    head = base.get_output_embeddings().weight
    edges = {id(head), *(id(m.weight) for m in base.modules() if isinstance(m, nn.Embedding))}
    linear = lora = 0
    for name, weight in model.named_parameters():
        state = getattr(weight, "quant_state", None)
        size = state.shape.numel() if state is not None else weight.numel()
        if "lora_" in name:
            lora += size
        elif id(weight) not in edges and (weight.ndim == 2 or state is not None):
            linear += size
    config = base.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = width * config.num_attention_heads * config.num_hidden_layers
    return Shape(linear, lora, attention, head.numel())


def counted(step: Callable[[], object]) -> tuple[float, float]:
    """(all operations, those of attention among them) of what `step` runs, as torch.utils.flop_counter has them.

    The counter counts attention as a whole square, whatever is masked; a causal kernel does half of it, so half of that
    count is taken. It does not know the CPU's kernel, which is counted by the same two functions as the GPU's.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def every_head(query: Any, *shared: Any) -> list[Any]:  # torch 2.11 counts no heads that share their keys
        return [(row[0], query[1], *row[2:]) for row in shared]

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, *every_head(query, key, value)))  # type: ignore[no-untyped-call]

    def backward(upstream: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        count = sdpa_backward_flop_count(upstream, query, *every_head(query, key, value))  # type: ignore[no-untyped-call]
        return int(count)

    ops = torch.ops.aten
    cpu = {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for name, count in counts.items() if "attention" in str(name)) / 2
    return counter.get_total_flops() - attention, attention


def measure(
    rows: list[dict[str, Any]], shapes: dict[str, Any], *, tokens: int, modes: list[tuple[bool, bool, bool]] = MODES
) -> list[dict[str, Any]]:
    """One step of these rows in each mode (frozen base, checkpointing, packed): operations a computed token."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from sft.step import attention
    from sft.step.batch import Collator, split_micro_batches
    from sft.step.step import StepConfig, forward_backward

    attention.register()
    batch, results = Collator("causal")([dict(row) for row in rows]), []
    for frozen, recompute, packed in modes:
        torch.manual_seed(0)
        model: Any = Qwen2ForCausalLM(Qwen2Config(**shapes, attn_implementation=attention.NAME if packed else "sdpa"))
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if frozen:
            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        model.train()
        micros = [micro for micro in split_micro_batches(batch, tokens=tokens, packed=packed) if micro.labelled]
        operations, of_attention = counted(
            partial(forward_backward, model, batch, StepConfig(micro_batch_tokens=tokens, packed=packed))
        )
        computed = sum(micro.computed for micro in micros)
        lengths = batch["lengths"].tolist() if packed else [m.targets.shape[1] for m in micros for _ in m.rows]
        labelled = sum(micro.labelled for micro in micros) / computed
        expected = a_token(shape_of(model), lengths, labelled, frozen=frozen, checkpointing=recompute)
        results.append(
            {
                "mode": f"{'LoRA' if frozen else 'full'}, {'checkpointing' if recompute else 'no checkpointing'}",
                "rows": "packed" if packed else "padded",
                "computed_tokens": computed,
                "counted_mflop_a_token": round(operations / computed / 1e6, 3),
                "formula_mflop_a_token": round(expected / 1e6, 3),
                "ratio": round(operations / computed / expected, 4),
                "attention_share": round(of_attention / operations, 4),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch")
    parser.add_argument("--tiny", action="store_true", help="a vocabulary of 2k and 8 rows, to try it out")
    args = parser.parse_args()
    from benchmarks import material, step_cpu

    shapes = {**step_cpu.SHAPES, **({"vocab_size": 2000} if args.tiny else {})}
    sizes = {"longest": 512, "vocabulary": shapes["vocab_size"]}
    on_disk = material.ALPACA.exists()
    rows = (
        material.alpaca(material.ALPACA, material.TOKENIZER, **sizes)
        if on_disk
        else material.generated_rows(64, **sizes)
    )
    results = measure(rows[: 8 if args.tiny else 16], shapes, tokens=args.tokens)
    if args.json:
        print(json.dumps({"rows_from": "Alpaca" if on_disk else "generated", "modes": results}, indent=1))
        return
    keys = list(results[0])
    print(
        "\n".join(material.table([key.replace("_", " ") for key in keys], [[row[k] for k in keys] for row in results]))
    )
    print(f"\nhighest ratio {max(row['ratio'] for row in results):.3f} (rows: {'Alpaca' if on_disk else 'generated'})")


if __name__ == "__main__":
    main()
