"""How many tokens a prompt may have: the model's context less the answer; a longer prompt loses its oldest."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sft.chat.encode import Encoder
from sft.config.schema import GenerationSection
from sft.data import rows
from sft.errors import EnvironmentProblem
from sft.generation import decode
from sft.generation.decode import Ask, chances, choose
from sft.generation.stop import IncrementalText, StopCriteria, StopWatcher, cut, held_back
from sft.step import unwrap
from sft.step.step import out_of_memory

log = logging.getLogger("sft.generation")
Kind = Literal["causal", "seq2seq"]
Message = dict[str, Any]


def context(model: nn.Module, kind: Kind) -> int | None:
    """Most tokens of prompt and answer together; None where nothing limits them (T5's positions are relative)."""
    config: Any = unwrap(model).config
    return None if kind == "seq2seq" else getattr(config.get_text_config(), "max_position_embeddings", None)


def prompt_room(model: nn.Module, settings: GenerationSection, kind: Kind) -> int | None:
    """Most tokens that a prompt may have: the answer gets what it asks for, or half the context; None is no limit."""
    limit = context(model, kind)
    return None if limit is None else max(limit - settings.max_new_tokens, limit // 2, 1)


def answer_room(model: nn.Module, settings: GenerationSection, kind: Kind, prompt: int) -> int:
    """Most tokens that the answer to a prompt of so many tokens may have."""
    limit = context(model, kind)
    return settings.max_new_tokens if limit is None else max(1, min(settings.max_new_tokens, limit - prompt))


def truncate_prompt(encoder: Encoder, row: rows.Row | list[Message], room: int | None) -> tuple[list[int], int]:
    """The ids of a row's or a conversation's prompt, and how many of its oldest turns were left out for the room.

    The system text and the newest turn always stay; if that alone is too long, the engine cuts its oldest tokens.
    """
    ids, lost = encoder.prompt(row), 0
    if isinstance(row, dict) and rows.is_rendered(row):
        return ids, 0
    messages = row if isinstance(row, list) else rows.messages(row)
    tools = None if isinstance(row, list) else rows.tools(row)
    while room is not None and len(ids) > room and (shorter := _without_oldest_turn(messages)) is not None:
        messages, lost = shorter, lost + 1
        ids = encoder.prompt({"messages": messages, "tools": tools} if tools else messages)
    return ids, lost


def _without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """The conversation without its oldest question and what followed it; None when only one question is left."""
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if len(questions) < 2:
        return None
    return [*messages[: questions[0]], *messages[questions[1] :]]


def say_lost(lost: Sequence[int], what: str) -> None:
    """Says how many prompts were too long and how many `what` (turns, tokens) they lost, where any did."""
    if short := [count for count in lost if count]:
        log.warning("%d prompts are too long for the model: they lost their oldest %d %s", len(short), sum(short), what)


def fit(model: nn.Module, prompt: Sequence[int], settings: GenerationSection, kind: Kind) -> tuple[list[int], int]:
    """The prompt's newest tokens that there is room for, and how many were cut."""
    room = prompt_room(model, settings, kind)
    if room is None or len(prompt) <= room:
        return list(prompt), 0
    return list(prompt[-room:]), len(prompt) - room


def library_generate(
    model: nn.Module,
    asks: Sequence[Ask],
    settings: GenerationSection,
    watcher: StopWatcher,
    *,
    pad: int,
    kind: Kind,
    device: torch.device,
    on_tokens: Callable[[list[int]], bool] = lambda tokens: True,
) -> None:
    """One batch through the model; each ask's `made` then holds its answer, its end included.

    on_tokens: told the tokens of each step; false ends the batch.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    base: Any = unwrap(model)
    ids, mask = _padded([ask.prompt or [pad] for ask in asks], pad, kind, device)
    over = [False] * len(asks)

    def choose_next(_: Tensor, scores: Tensor) -> Tensor:
        tokens = choose(scores, asks, settings, watcher.ids)
        for row, (ask, token) in enumerate(zip(asks, tokens, strict=True)):
            if not over[row]:
                ask.add(token)
                over[row] = len(ask.made) >= ask.most or watcher.ended(ask.made)
        if not on_tokens(tokens):
            over[:] = [True] * len(over)
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    def is_over(*_: Any, **__: Any) -> Tensor:
        return torch.tensor(over, device=device)

    base.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            max_new_tokens=max(ask.most for ask in asks),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad,
            decoder_start_token_id=base.generation_config.decoder_start_token_id,
        ),
        logits_processor=LogitsProcessorList([choose_next]),
        stopping_criteria=StoppingCriteriaList([is_over]),
    )


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
    stops: StopCriteria,
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

    size, watcher = max(1, batch_size), StopWatcher(tokenizer, ends)
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
    ends: StopCriteria,
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
    watcher: StopWatcher,
    kind: Kind,
    size: int,
    done: Callable[[Ask], None],
    on_tokens: Callable[[list[int]], bool] = lambda tokens: True,
) -> None:
    """Answers `asks`, at most `size` side by side: by our loop where it is proven, else by transformers' generate.

    done: told of each ask as it ends. on_tokens: told the tokens of each step; false ends what is under way.
    """
    device = device_of(model)
    if kind == "causal" and decode.serves(model):
        decode.Decoder(model, asks, settings, watcher, rows=size, device=device, done=done, on_tokens=on_tokens).run()
        return
    log.debug(
        "%s is answered by transformers' generate: our own loop is not proven on it", type(unwrap(model)).__name__
    )
    order = sorted(asks, key=lambda ask: (-len(ask.prompt), ask.index))
    for at in range(0, len(order), size):
        batch = order[at : at + size]
        library_generate(
            model, batch, settings, watcher, pad=pad_id(tokenizer, watcher), kind=kind, device=device,
            on_tokens=on_tokens,
        )  # fmt: skip
        for ask in batch:
            done(ask)


def all_ends(stops: StopCriteria, settings: GenerationSection) -> AnyEnds:
    """What ends an answer: the template's end tokens and strings, and `generation.stop`."""
    strings = dict.fromkeys([*stops.strings, *settings.stop])
    return AnyEnds(frozenset(stops.ids), tuple(string for string in strings if string))


def finish(tokenizer: Any, made: Sequence[int], ends: StopCriteria, truncated: int) -> Answer:
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
            fix="--set generation.max_new_tokens=64, a shorter prompt, or a smaller model",
        )
    log.warning("memory ran out at %d answers side by side: going on with %d", size, size // 2)
    return size // 2


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pad_id(tokenizer: Any, ends: StopCriteria) -> int:
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


_Tokens = SimpleQueue[int | BaseException | None]


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt: Sequence[int],
    settings: GenerationSection,
    stops: StopCriteria,
    *,
    kind: Kind = "causal",
) -> Generator[str, None, Answer]:
    """Yields the answer's text as it is made, and returns the whole `Answer`, both by the loop of `engine.generate`.

    Closing the generator, or an exception thrown into it (Ctrl-C), ends the model's work at its next token.
    """
    ends = all_ends(stops, settings)
    queue: _Tokens = SimpleQueue()
    cancelled = Event()
    asks, truncated = asked(model, tokenizer, [prompt], settings, ends, kind)

    def heard(tokens: list[int]) -> bool:
        queue.put(tokens[0])
        return not cancelled.is_set()

    def work() -> None:
        try:
            watcher = StopWatcher(tokenizer, ends)
            answer(model, tokenizer, asks, settings, watcher, kind, 1, lambda ask: None, heard)
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    worker = Thread(target=work, daemon=True)
    with undisturbed(model):
        worker.start()
        try:
            made = yield from _pieces(queue, tokenizer, ends)
        finally:
            cancelled.set()
            worker.join()
    return finish(tokenizer, made, ends, truncated[0])


def _pieces(queue: _Tokens, tokenizer: Any, ends: StopCriteria) -> Generator[str, None, list[int]]:
    """Yields the text of the tokens in the queue as soon as it is certain; returns the tokens, the end included."""
    tokens: list[int] = []
    text, watcher, shown, ended = IncrementalText(tokenizer), StopWatcher(tokenizer, ends), 0, False
    while (token := queue.get()) is not None:
        if isinstance(token, BaseException):
            raise token
        tokens.append(token)
        ended = ended or watcher.ended(tokens)
        if ended:
            continue  # what is left is known with the whole answer
        text.add(token)
        certain = len(text.text) - held_back(text.text, ends.strings)
        if certain > shown:
            yield text.text[shown:certain]
            shown = certain
    rest = cut(tokenizer, tokens, ends).text[shown:]
    if rest:
        yield rest
    return tokens
