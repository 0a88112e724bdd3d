"""The one engine that answers: batches of like length, a KV cache, every end token and stop string, greedy or seeded.

A model's own generation_config never speaks here; what the config's `generation` section says is all there is. The
model comes back as it was: its mode, its settings and the process's random state, so that a run which evaluates in
between goes on as if it had not.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sft.config.schema import GenerationSection
from sft.errors import EnvironmentProblem
from sft.generation.stopping import Ends, RepetitionPenalty, StopStrings, cut
from sft.step import unwrap
from sft.step.microbatch import out_of_memory

log = logging.getLogger("sft.generation")
Kind = Literal["causal", "seq2seq"]


@dataclass(frozen=True)
class Answer:
    """One answer. ids, text: without the end token, the stop string and anything after. stopped: it ended by itself.

    tokens: tokens made, the end token included. truncated: the prompt's oldest tokens that found no room.
    """

    ids: list[int]
    text: str
    stopped: bool
    tokens: int
    truncated: int = 0


@dataclass(frozen=True)
class AnyEnds:
    """The ends of a template together with those of the settings."""

    ids: frozenset[int]
    strings: tuple[str, ...]


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSection,
    stops: Ends,
    *,
    batch_size: int,
    kind: Kind = "causal",
    max_len: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """An answer to each prompt (token ids), in their order.

    Longest first in batches of `batch_size`, halved for good when memory runs out. max_len: most tokens of a prompt; a
    longer one, or one that leaves the answer too little of the model's context, loses its oldest tokens.
    Greedy answers are those of one prompt at a time (but for rounding); drawn ones depend on the seed and the batches.
    Raises EnvironmentProblem when not even one answer fits into memory.
    """
    ends = all_ends(stops, settings)
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    answers: dict[int, Answer] = {}
    size = max(1, batch_size)
    with undisturbed(model):
        while len(answers) < len(order):
            indices = order[len(answers) : len(answers) + size]
            fitted = [fit(model, prompts[index], settings, kind, max_len) for index in indices]
            made = _try(model, tokenizer, [ids for ids, _ in fitted], settings, ends, kind)
            if made is None:
                size = _smaller(len(indices))
                continue
            for index, ids, (_, truncated) in zip(indices, made, fitted, strict=True):
                answers[index] = finish(tokenizer, ids, ends, truncated)
            if on_progress is not None:
                on_progress(len(answers), len(order))
    return [answers[index] for index in range(len(prompts))]


def all_ends(stops: Ends, settings: GenerationSection) -> AnyEnds:
    """What ends an answer: the template's end tokens and strings, and `generation.stop`."""
    strings = dict.fromkeys([*stops.strings, *settings.stop])
    return AnyEnds(frozenset(stops.ids), tuple(string for string in strings if string))


def finish(tokenizer: Any, made: Sequence[int], ends: Ends, truncated: int) -> Answer:
    """The answer in the tokens that the model made."""
    found = cut(tokenizer, made, ends)
    return Answer(found.ids, found.text, found.stopped, found.made, truncated)


def context(model: nn.Module, kind: Kind) -> int | None:
    """Most tokens of prompt and answer together; None where nothing limits them (T5's positions are relative)."""
    config: Any = unwrap(model).config
    return None if kind == "seq2seq" else getattr(config.get_text_config(), "max_position_embeddings", None)


def prompt_room(model: nn.Module, settings: GenerationSection, kind: Kind, max_len: int | None = None) -> int | None:
    """Most tokens that a prompt may have: the answer gets what it asks for, or half the context; None is no limit."""
    limit = context(model, kind)
    rooms = [] if limit is None else [max(limit - settings.max_new_tokens, limit // 2, 1)]
    return min([*rooms, *([max_len] if max_len else [])], default=None)


def fit(
    model: nn.Module, prompt: Sequence[int], settings: GenerationSection, kind: Kind, max_len: int | None
) -> tuple[list[int], int]:
    """The prompt's newest tokens that there is room for, and how many were cut."""
    room = prompt_room(model, settings, kind, max_len)
    if room is None or len(prompt) <= room:
        return list(prompt), 0
    return list(prompt[-room:]), len(prompt) - room


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and a clean generation_config for the time of the block; then everything as it was."""
    base: Any = unwrap(model)
    modes = [(module, module.training) for module in model.modules()]
    kept = base.generation_config
    model.eval()
    base.generation_config = _clean(base)
    try:
        yield
    finally:
        base.generation_config = kept
        for module, mode in modes:
            module.training = mode


def _clean(base: Any) -> Any:
    from transformers import GenerationConfig

    start = getattr(base.generation_config, "decoder_start_token_id", None)
    start = start if start is not None else getattr(base.config, "decoder_start_token_id", None)
    return GenerationConfig(decoder_start_token_id=start, bos_token_id=getattr(base.config, "bos_token_id", None))


def _try(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    settings: GenerationSection,
    ends: AnyEnds,
    kind: Kind,
) -> list[list[int]] | None:
    """The tokens made for each prompt, or None when memory ran out."""
    try:
        return run(model, tokenizer, prompts, settings, ends, kind=kind)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _smaller(size: int) -> int:
    if size == 1:
        raise EnvironmentProblem(
            "there is not enough memory for a single answer",
            mend="--set generation.max_new_tokens=64, a shorter prompt, or a smaller model",
        )
    log.warning("memory ran out at %d answers side by side: going on with %d", size, size // 2)
    return size // 2


def run(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    settings: GenerationSection,
    ends: AnyEnds,
    *,
    kind: Kind,
    streamer: Any = None,
    cancelled: Event | None = None,
) -> list[list[int]]:
    """One batch through the model: the raw tokens that follow each prompt, ends and padding included."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    base: Any = unwrap(model)
    pad = _pad_id(tokenizer, ends)
    ids, mask = _padded([prompt or [pad] for prompt in prompts], pad, kind, _device(base))
    start = 1 if kind == "seq2seq" else ids.shape[1]
    processors = []
    if settings.repetition_penalty != 1.0:
        padding = mask[:, :0].bool() if kind == "seq2seq" else mask == 0
        processors.append(RepetitionPenalty(settings.repetition_penalty, padding, ends.ids))
    limit = context(model, kind)
    most = settings.max_new_tokens if limit is None else max(1, min(settings.max_new_tokens, limit - ids.shape[1]))
    with _seeded(settings, ids.device), torch.no_grad():
        made = base.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=_settings(settings, most, pad, ends, base),
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([StopStrings(tokenizer, ends, start, cancelled)]),
            streamer=streamer,
        )
    found: list[list[int]] = made[:, start:].tolist()
    return found


def _settings(settings: GenerationSection, most: int, pad: int, ends: AnyEnds, base: Any) -> Any:
    from transformers import GenerationConfig

    drawn = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    return GenerationConfig(
        max_new_tokens=most,
        do_sample=settings.do_sample,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=sorted(ends.ids) or None,
        decoder_start_token_id=base.generation_config.decoder_start_token_id,
        **(drawn if settings.do_sample else {}),
    )


def _pad_id(tokenizer: Any, ends: AnyEnds) -> int:
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, *sorted(ends.ids)):
        if candidate is not None:
            return int(candidate)
    return 0


def _device(base: Any) -> torch.device:
    embedding = base.get_input_embeddings()
    device: torch.device = embedding.weight.device if embedding is not None else next(base.parameters()).device
    return device


def _padded(prompts: list[list[int]], pad: int, kind: Kind, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, P]: padded on the left, so that every answer starts in the same column (encoders: right)."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        where = slice(0, len(prompt)) if kind == "seq2seq" else slice(longest - len(prompt), longest)
        ids[row, where] = torch.tensor(prompt)
        mask[row, where] = 1
    return ids.to(device), mask.to(device)


@contextmanager
def _seeded(settings: GenerationSection, device: torch.device) -> Iterator[None]:
    """Draws from `settings.seed`; the process's own random state is put back afterwards."""
    if not settings.do_sample:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        yield
