"""The one engine that answers: side by side, with a KV cache, every end token and stop string, greedy or seeded.

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
from typing import Any

import torch
from torch import nn

from sft.config.schema import GenerationSection
from sft.errors import EnvironmentProblem
from sft.generation import decoding, library
from sft.generation.choice import Ask, chances
from sft.generation.room import Kind, answer_room, fit, prompt_room
from sft.generation.stopping import Ends, Watcher, cut
from sft.step import unwrap
from sft.step.microbatch import out_of_memory

__all__ = ["Answer", "Kind", "generate", "prompt_room"]
log = logging.getLogger("sft.generation")


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
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """An answer to each prompt (token ids), in their order.

    Longest first, `batch_size` side by side, halved for good when memory runs out. A prompt that leaves the answer too
    little of the model's context loses its oldest tokens.
    Answers are those of one prompt at a time (but for rounding), drawn ones too.
    Raises EnvironmentProblem when not even one answer fits into memory.
    """
    ends = all_ends(stops, settings)
    asks, truncated = asked(model, tokenizer, prompts, settings, ends, kind)
    answers: dict[int, Answer] = {}

    def done(ask: Ask) -> None:
        answers[ask.index] = finish(tokenizer, ask.made, ends, truncated[ask.index])
        if on_progress is not None:
            on_progress(len(answers), len(asks))

    size, watcher = max(1, batch_size), Watcher(tokenizer, ends)
    with undisturbed(model):
        while left := [ask for ask in asks if ask.index not in answers]:
            try:
                answer(model, tokenizer, left, settings, watcher, kind, size, done)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                size = _smaller(min(size, len(left)))
                for ask in left:
                    ask.start_over()
                _release()
    return [answers[index] for index in range(len(prompts))]


def asked(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSection,
    ends: Ends,
    kind: Kind,
) -> tuple[list[Ask], list[int]]:
    """The prompts as questions under way, and how many of its oldest tokens each one lost."""
    fitted = [fit(model, prompt, settings, kind) for prompt in prompts]
    pad = pad_id(tokenizer, ends)
    asks = [
        Ask(
            index,
            ids or [pad],
            answer_room(model, settings, kind, len(ids)),
            chance,
            frozenset() if kind == "seq2seq" else frozenset(ids),
        )
        for index, ((ids, _), chance) in enumerate(zip(fitted, chances(prompts, settings.seed), strict=True))
    ]
    return asks, [lost for _, lost in fitted]


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: Any,
    asks: list[Ask],
    settings: GenerationSection,
    watcher: Watcher,
    kind: Kind,
    size: int,
    done: Callable[[Ask], None],
    on_tokens: Callable[[list[int]], bool] = lambda tokens: True,
) -> None:
    """Answers `asks`, at most `size` side by side: by our loop where it is proven, else by transformers' generate.

    done: told of each ask as it ends. on_tokens: told the tokens of each step; false ends what is under way.
    """
    device = device_of(model)
    if kind == "causal" and decoding.serves(model):
        decoding.Decoder(model, asks, settings, watcher, rows=size, device=device, done=done, on_tokens=on_tokens).run()
        return
    log.debug(
        "%s is answered by transformers' generate: our own loop is not proven on it", type(unwrap(model)).__name__
    )
    order = sorted(asks, key=lambda ask: (-len(ask.prompt), ask.index))
    for at in range(0, len(order), size):
        batch = order[at : at + size]
        library.generate(
            model, batch, settings, watcher, pad=pad_id(tokenizer, watcher), kind=kind, device=device,
            on_tokens=on_tokens,
        )  # fmt: skip
        for ask in batch:
            done(ask)


def all_ends(stops: Ends, settings: GenerationSection) -> AnyEnds:
    """What ends an answer: the template's end tokens and strings, and `generation.stop`."""
    strings = dict.fromkeys([*stops.strings, *settings.stop])
    return AnyEnds(frozenset(stops.ids), tuple(string for string in strings if string))


def finish(tokenizer: Any, made: Sequence[int], ends: Ends, truncated: int) -> Answer:
    """The answer in the tokens that the model made."""
    found = cut(tokenizer, made, ends)
    return Answer(found.ids, found.text, found.stopped, found.made, truncated)


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


def _smaller(size: int) -> int:
    if size == 1:
        raise EnvironmentProblem(
            "there is not enough memory for a single answer",
            mend="--set generation.max_new_tokens=64, a shorter prompt, or a smaller model",
        )
    log.warning("memory ran out at %d answers side by side: going on with %d", size, size // 2)
    return size // 2


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pad_id(tokenizer: Any, ends: Ends) -> int:
    """A token to fill up with; it is masked wherever it stands."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, *sorted(ends.ids)):
        if candidate is not None:
            return int(candidate)
    return 0


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its token ids."""
    base: Any = unwrap(model)
    embedding = base.get_input_embeddings()
    device: torch.device = embedding.weight.device if embedding is not None else next(base.parameters()).device
    return device
