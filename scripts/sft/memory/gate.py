"""Refuses a run that cannot fit before any weight is loaded, and says what would make it fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.config.schema import Config
from sft.errors import EnvironmentProblem, SftError
from sft.memory import plan
from sft.memory.devices import CONTEXT, Device
from sft.memory.estimate import GIB, changed
from sft.model.files import ModelFiles
from sft.model.hardware import Hardware

FAR = 0.5  # of the free memory: a bound below it needs no trace
log = logging.getLogger("sft.memory")


def check(
    config: Config, files: ModelFiles, hardware: Hardware, root: Path, *, longest: int, force: bool = False
) -> None:
    """Raises EnvironmentProblem where not even the smallest micro-batch fits what is free on the device.

    config: as asked, with its `auto`s. longest: tokens of the longest row. force: the refusal is a warning. A model
    that cannot be traced is let through, and that is said.
    """
    free = hardware.free_bytes / GIB + (
        CONTEXT["cuda"] if hardware.device == "cuda" else 0.0
    )  # our own context is there
    if bound(files.config, config, files.parameters, longest) < FAR * free:
        return
    shorter = changed(config.model, max_seq_len=min(config.model.max_seq_len, max(1, longest)))
    device = Device(hardware.device, hardware.name, min(free, hardware.total_bytes / GIB))
    try:
        made = plan.make(changed(config, model=shorter), files.config, device, root=root)
    except SftError as error:
        log.warning("the plan of this run cannot be made, so it starts without: %s", error)
        return
    if made.fits:
        return
    said = (
        f"{config.model.name} does not fit {device.name}: {made.worst} needs {made.estimate.peak:.2f} GiB, and"
        f" {device.gib:.2f} are free"
    )
    if force:
        log.warning("%s; --force: it is tried all the same", said)
        return
    raise EnvironmentProblem(said, where=f"{config.tuning.mode}, rows of {longest} tokens", mend=_mend(made))


def bound(description: Mapping[str, Any], config: Config, parameters: int, longest: int) -> float:
    """GiB that a step cannot exceed, of sizes in config.json: generous, and infinite where one of them is not there.

    Weights, gradients and optimizer in fp32; for each token of a micro-batch 32 hidden and 12 feed-forward numbers and
    its attention scores in every layer, all kept, and four of each logit; the cache of all answers.
    """

    def size(*names: str) -> float:
        return next(
            (float(description[name]) for name in names if isinstance(description.get(name), int)), float("inf")
        )

    hidden = size("hidden_size", "n_embd", "d_model")
    inner = [description.get(name) or 0 for name in ("intermediate_size", "ffn_dim", "d_ff", "n_inner")]
    wide = max(4 * hidden, *map(float, inner))
    sides = 2 if description.get("is_encoder_decoder") else 1
    layers = sides * size("num_hidden_layers", "n_layer", "num_layers")
    heads = size("num_attention_heads", "n_head", "num_heads")
    asked = config.train.micro_batch_tokens
    tokens = sides * max(longest, asked if isinstance(asked, int) else min(4096, 16 * longest))
    a_token = layers * (32 * hidden + 12 * wide + 2 * heads * longest) + 4 * size("vocab_size")
    answers = config.eval.batch_size * (config.generation.max_new_tokens + longest) * layers * 4 * hidden
    return (16.0 * parameters + 4.0 * (tokens * a_token + answers)) / GIB


def _mend(made: plan.Plan) -> str:
    lines = [f"--set {r.setting} saves {r.saves_gib:.2f} GiB ({r.costs})" for r in made.remedies if r.saves_gib]
    models = [f"--set {r.setting}" for r in made.remedies if not r.saves_gib]
    if made.together is not None and made.together.fits:
        settings = " ".join(f"--set {setting}" for setting in made.together.settings)
        lines.insert(0, f"it fits with {settings}")
    if made.device.kind == "cuda" and made.card:
        lines.append(f"the smallest card that would do: {made.card}")
    return "\n         ".join(
        [*lines, *models, "--force tries it all the same (make plan shows where the memory goes)"]
    )
