"""The token budget of a micro-batch on a GPU: measured on the longest rows, before the first step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from sft.config.schema import TrainSection
from sft.memory import probe
from sft.training import checkpoints, ranks
from sft.training.preparation import Job
from sft.training.recipe import Recipe

log = logging.getLogger("sft.training")


def is_open(asked: TrainSection) -> bool:
    """Whether the config leaves the micro-batch to be measured."""
    return (asked.batch_size, asked.grad_accum, asked.micro_batch_tokens) == ("auto", "auto", "auto")


def settle(job: Job, model: Any, recipe: Recipe, checkpoint: Path | None) -> tuple[int, str] | None:
    """The budget in tokens and where it comes from, or None where the resolved config stays: on the CPU, or given.

    A run that is taken up keeps the budget of its checkpoint, so that it goes on bit for bit. An encoder-decoder
    starts from the most that is worth having; running out of memory halves it.
    """
    if job.device.device != "cuda" or not is_open(job.asked):
        return None
    if checkpoint is not None:
        kept = checkpoints.read(checkpoint, checkpoints.SESSION)["asked_budget"][0]
        return int(kept), "as in the checkpoint"
    if recipe.kind == "seq2seq":
        return probe.MOST_TOKENS, "not measured for encoder-decoders: halved if memory runs out"
    longest = job.rows.longest
    device = torch.device("cuda", torch.cuda.current_device())
    with recipe.computing():
        measure = probe.measure_on(
            model,
            length=longest,
            device=device,
            apart=recipe.apart,
            logits=recipe.logits,
            tile=recipe.tile,
            label_smoothing=recipe.label_smoothing,
        )
        most = -(-int(job.config.train.effective_batch) // ranks.world())
        total = torch.cuda.get_device_properties(device).total_memory
        found = probe.search(measure, length=longest, most_rows=most, total_bytes=total)
    tokens = -ranks.largest(-found.tokens)  # the least over ranks
    peak = max(tried.peak_bytes for tried in found.tried) / 2**30
    return tokens, f"measured: {found.rows} rows of {longest} tokens, {peak:.2f} GiB at most, of {total / 2**30:.1f}"
