"""The demo model's training loop: Muon for the matrices, AdamW for the rest, on chats drawn as they are needed.

A seed fixes every byte: the chats, their order, the first weights. A checkpoint beside the model lets a stopped build
go on where it was.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from demo_model.build import Recipe, render
from demo_model.corpus import Message, chats
from sft.files import atomic_file, write_text

CHUNK_ROWS, ROWS, MICRO_ROWS = 2048, 64, 16
STEPS_A_CHUNK = CHUNK_ROWS // ROWS
EVERY = 100  # steps between two checkpoints, and between two looks at the held-out chats
CHECKPOINT = "checkpoint.pt"
HELD_OUT_SEED, HELD_OUT_ROWS = 10**9, 256
# The letters' own text is mostly random (invented names), so it counts little; the model is to learn the answers.
PROMPT_WEIGHT = 0.1

Batch = tuple[torch.Tensor, torch.Tensor]  # token ids and loss weights, both (rows, tokens); padded on the right


@dataclass(frozen=True)
class Progress:
    """Figures of one step: tokens seen so far, weighted loss in nats a token, share of held-out chats of which every
    answer token would have been chosen (None if nobody looked), seconds of training so far."""

    step: int
    tokens: int
    loss: float
    answers_right: float | None
    seconds: float


def chunk_seed(recipe: Recipe, chunk: int) -> int:
    """Each chunk of chats has its own seed, so that a resumed build can draw the next one at once."""
    return recipe.seed * 1_000_003 + chunk


def encode(tokenizer: Qwen2Tokenizer, chat: list[Message]) -> tuple[list[int], list[float]]:
    """Token ids of one rendered chat and the weight of each as a target."""
    ids: list[int] = []
    weights: list[float] = []
    for text, answer in render(chat):
        piece = tokenizer(text, add_special_tokens=False).input_ids
        ids += piece
        weights += [1.0 if answer else PROMPT_WEIGHT] * len(piece)
    return ids, weights


def chunk_chats(recipe: Recipe, chunk: int) -> Iterator[list[Message]]:
    """The chats of one chunk."""
    settling = chunk * STEPS_A_CHUNK >= recipe.settling_from
    return itertools.islice(chats(chunk_seed(recipe, chunk), settling), CHUNK_ROWS)


def batches(tokenizer: Qwen2Tokenizer, drawn: Iterable[list[Message]], seed: int) -> list[Batch]:
    """Chats in batches of similar length, in a seeded order."""
    encoded = [encode(tokenizer, chat) for chat in drawn]
    encoded.sort(key=lambda row: len(row[0]))
    groups = [encoded[start : start + MICRO_ROWS] for start in range(0, len(encoded), MICRO_ROWS)]
    random.Random(seed).shuffle(groups)
    return [(_padded([ids for ids, _ in group]), _padded([weights for _, weights in group])) for group in groups]


def _padded(rows: list[list[int]] | list[list[float]]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def steps(tokenizer: Qwen2Tokenizer, recipe: Recipe, first: int) -> Iterator[list[Batch]]:
    """The micro-batches of each step from `first` on."""
    micro = ROWS // MICRO_ROWS
    for step in range(first, recipe.steps):
        place = step % STEPS_A_CHUNK
        if place == 0 or step == first:
            number = step // STEPS_A_CHUNK
            chunk = batches(tokenizer, chunk_chats(recipe, number), chunk_seed(recipe, number))
        yield chunk[place * micro : (place + 1) * micro]


def optimizers(model: Qwen2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (Jordan et al. 2024), AdamW for embedding, norms and biases."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.adamw_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_share(step: int, recipe: Recipe) -> float:
    """Share of the full rate: up over 4 % of the steps, level, down to nothing over half of them; then, to settle,
    down once more from a half."""
    first = recipe.settling_from
    if step >= first:
        return 0.5 * (recipe.steps - step) / (recipe.steps - first)
    return min(1.0, (step + 1) / max(1.0, 0.04 * first), (first - step) / (0.5 * first))


def losses(model: Qwen2ForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed weighted loss of a batch, and for each row whether every answer token is the most likely one."""
    ids, weights = (part.to(model.device) for part in batch)
    # Padding is on the right and attention is causal, so no row sees it and no mask is needed.
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    targets, weights = ids[:, 1:], weights[:, 1:]
    each = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
    right = ((logits.argmax(-1) == targets) | (weights < 1.0)).all(-1)
    return (each * weights).sum(), right


def one_step(model: Qwen2ForCausalLM, optims: list[torch.optim.Optimizer], window: list[Batch]) -> float:
    """One optimizer step over the step's micro-batches; returns its weighted mean loss in nats."""
    total = sum(float(weights[:, 1:].sum()) for _, weights in window)
    summed = 0.0
    for batch in window:
        loss = losses(model, batch)[0] / total
        loss.backward()  # type: ignore[no-untyped-call]
        summed += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optim in optims:
        optim.step()
        optim.zero_grad()
    return summed


@torch.inference_mode()
def answers_right(model: Qwen2ForCausalLM, held_out: list[Batch]) -> float:
    """Share of held-out chats of which every answer token would have been chosen."""
    right = torch.cat([losses(model, batch)[1] for batch in held_out])
    return float(right.float().mean())


def pretrain(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    recipe: Recipe,
    folder: Path,
    report: Callable[[Progress], None],
) -> Progress:
    """Trains the model in place, from the folder's checkpoint if it has this recipe; `report` is called each step.

    The folder gets `checkpoint.pt` and `build_log.jsonl`, a line for each evaluation on the held-out chats.
    """
    optims = optimizers(model, recipe)
    log = _resume(model, optims, recipe, folder / CHECKPOINT)
    last = log[-1] if log else Progress(0, 0, float("nan"), None, 0.0)
    began = time.monotonic() - last.seconds
    held_out = batches(tokenizer, itertools.islice(chats(HELD_OUT_SEED), HELD_OUT_ROWS), HELD_OUT_SEED)
    for step, window in enumerate(steps(tokenizer, recipe, last.step), start=last.step):
        if step == recipe.settling_from:
            optims = optimizers(model, recipe)
        share = rate_share(step, recipe)
        for optim, rate in zip(optims, (recipe.muon_rate, recipe.adamw_rate), strict=True):
            optim.param_groups[0]["lr"] = rate * share
        loss = one_step(model, optims, window)
        tokens = last.tokens + sum(int((weights > 0).sum()) for _, weights in window)
        look = (step + 1) % EVERY == 0 or step + 1 == recipe.steps
        right = answers_right(model, held_out) if look else None
        last = Progress(step + 1, tokens, loss, right, round(time.monotonic() - began, 1))
        report(last)
        if look:
            log.append(last)
            _keep(model, optims, recipe, folder / CHECKPOINT, log)
            write_text(folder / "build_log.jsonl", "".join(json.dumps(asdict(line)) + "\n" for line in log))
    return last


def _keep(
    model: Qwen2ForCausalLM, optims: list[torch.optim.Optimizer], recipe: Recipe, path: Path, log: list[Progress]
) -> None:
    state = {
        "recipe": asdict(recipe),
        "log": [asdict(line) for line in log],
        "model": model.state_dict(),
        "optims": [optim.state_dict() for optim in optims],
    }
    with atomic_file(path) as staged:
        torch.save(state, staged)


def _resume(model: Qwen2ForCausalLM, optims: list[torch.optim.Optimizer], recipe: Recipe, path: Path) -> list[Progress]:
    """Loads the checkpoint's state; returns its log, empty if there is no checkpoint of this recipe."""
    if not path.exists():
        return []
    state = torch.load(path, map_location=model.device, weights_only=True)
    if state["recipe"] != asdict(recipe):
        return []
    model.load_state_dict(state["model"])
    for optim, saved in zip(optims, state["optims"], strict=True):
        optim.load_state_dict(saved)
    return [Progress(**line) for line in state["log"]]


def prepare(threads: int | None) -> torch.device:
    """Chooses the device and makes torch deterministic."""
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
