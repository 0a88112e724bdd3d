"""Is the merged model the trained one: logits of adapter and merged model on a few texts, one after the other."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.config.schema import Config, ModelSection, TuningSection
from sft.errors import ModelError
from sft.model import hardware
from sft.model.files import ModelFiles
from sft.ship import tensors as streams

if TYPE_CHECKING:
    import torch

log = logging.getLogger("sft.ship")
TOLERANCE = 1e-3  # of float32 logits
KL_LIMIT = 0.05  # nats a token, of 16-bit logits, whose rounding alone costs about 1e-4
_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Name: Mara Olsen; order 48213; the kettle arrived broken and she wants her money back!",
    "What is the capital of France? It is Paris.",
    "2 + 2 = 4, 17 - 9 = 8, and 3 * 7 =",
)


def compare(
    files: ModelFiles, config: Config, adapter: Path, folder: Path, dtype: str
) -> tuple[float, float, float] | None:
    """Adapter against merged: (largest difference of logits, mean KL, share of equal first choices); None where the
    memory is too small. Raises ModelError where they differ by more than rounding.
    """
    need, free = files.parameters * streams.BYTES[dtype] * 1.15, hardware.memory()[1]
    if need > free:
        log.warning(
            f"the merged model was not compared with the adapter: that needs {need / 2**30:.1f} GiB of memory,"
            f" {free / 2**30:.1f} are free"
        )
        return None
    unmerged = logits(files, config.model, streams.dtype_of(dtype), adapter)
    merged_files = ModelFiles(folder, str(folder), None, files.config, files.kind)
    result = difference(unmerged, logits(merged_files, config.model, streams.dtype_of(dtype), None))
    log.info(f"logits, adapter against merged: largest difference {result[0]:.2g}, KL {result[1]:.2g}")
    if (result[0] > TOLERANCE) if dtype == "fp32" else (result[1] > KL_LIMIT):
        raise ModelError(
            f"the merged model is not the trained one: logits differ by up to {result[0]:.3g}, KL {result[1]:.3g}",
            where=str(adapter),
            mend="nothing was written; if fp16 or bf16 was asked for, try --dtype fp32, else report this",
        )
    return result


def logits(files: ModelFiles, section: ModelSection, dtype: torch.dtype, adapter: Path | None) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] on a few texts, float32, from the model on the CPU with or without the adapter."""
    import torch

    from sft.model import adapters, loading
    from sft.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(files, trust_remote_code=section.trust_remote_code)
    plain = section.model_copy(update={"device_map": "cpu", "attn_implementation": "auto"})
    model: Any = loading.load_base(
        files, plain, TuningSection(mode="lora"), dtype, device="cpu", train=False, quantise=False
    )
    if adapter is not None:
        model = adapters.load(model, adapter)
    found = []
    for text in _TEXTS:
        ids = torch.tensor([tokenizer.encode(text)])
        extra = {"decoder_input_ids": ids} if files.kind == "seq2seq" else {}
        with torch.no_grad():
            found.append(model(input_ids=ids, **extra).logits[0].float())
    del model
    gc.collect()
    return found


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> tuple[float, float, float]:
    """Largest absolute difference, mean KL(one || other) a token in nats, share of equal first choices."""
    import torch

    first, second = torch.cat(one), torch.cat(other)
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    same = (first.argmax(-1) == second.argmax(-1)).float().mean()
    return float((first - second).abs().max()), max(0.0, float(kl)), float(same)
