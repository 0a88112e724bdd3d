"""Answers to prompts: `generate` in batches, in the prompts' order, `stream` one answer piece by piece.

Proven families are decoded by our own loop (`decode`), all others by transformers' `generate`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, cast

import torch
from torch import Tensor, nn

from sft.chat.encode import Encoder
from sft.config.schema import Config, GenerationSection
from sft.data import rows
from sft.errors import EnvironmentProblem
from sft.generation import decode
from sft.generation.decode import Decoder, DecodingSequence, choose_tokens, seeds
from sft.generation.stop import Answer, IncrementalText, StopCriteria, Stops
from sft.model.files import Kind
from sft.step import unwrap
from sft.step.step import out_of_memory, release_memory

log = logging.getLogger("sft.generation")
Message = dict[str, Any]


def context_length(model: nn.Module, kind: Kind) -> int | None:
    """Most tokens of prompt and answer together; None if nothing limits them (T5's positions are relative)."""
    config: Any = unwrap(model).config
    return None if kind == "seq2seq" else getattr(config.get_text_config(), "max_position_embeddings", None)


def max_prompt_tokens(model: nn.Module, settings: GenerationSection, kind: Kind) -> int | None:
    """Most tokens of a prompt: the context less `max_new_tokens`, but at least half of it; None: no limit."""
    limit = context_length(model, kind)
    return None if limit is None else max(limit - settings.max_new_tokens, limit // 2, 1)


def truncate_prompt(encoder: Encoder, row: rows.Row | list[Message], limit: int | None) -> tuple[list[int], int]:
    """The ids of a row's or a conversation's prompt in at most `limit` tokens, and how many oldest turns were removed.

    The system text and the newest turn always stay; if they alone are too long, `generate` cuts the oldest tokens.
    """
    ids, removed = encoder.prompt(row), 0
    if isinstance(row, dict) and rows.is_rendered(row):
        return ids, 0
    messages, tools = rows.prompt_messages(row)
    while limit is not None and len(ids) > limit:
        questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if len(questions) < 2:
            break
        messages, removed = [*messages[: questions[0]], *messages[questions[1] :]], removed + 1
        ids = encoder.prompt({"messages": messages, "tools": tools})
    return ids, removed


def warn_truncated(removed: Sequence[int], unit: str) -> None:
    """Warns how many prompts were too long and how many of their oldest `unit` (turns, tokens) were removed."""
    if counts := [count for count in removed if count]:
        log.warning(
            "%d prompts are too long for the model: their oldest %d %s were removed", len(counts), sum(counts), unit
        )


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSection,
    stops: Stops,
    *,
    batch_size: int,
    kind: Kind = "causal",
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """An answer to each prompt (token ids), in their order, the same as one prompt at a time but for rounding.

    The longest prompts come first, `batch_size` side by side, halved for good when memory runs out. A prompt that
    leaves the answer too little of the model's context loses its oldest tokens. on_progress: (answered, all).
    Raises EnvironmentProblem when not even one answer fits into memory.
    """
    engine = _Engine(model, tokenizer, settings, stops, kind)
    sequences, truncated = engine.sequences(prompts)
    answers: dict[int, Answer] = {}
    rows_together = max(1, batch_size)
    with engine.answering():
        while left := [sequence for sequence in sequences if sequence.index not in answers]:
            try:
                for advanced in engine.steps(left, rows_together):
                    for sequence in advanced:
                        if sequence.done:
                            index = sequence.index
                            answers[index] = engine.stop.answer(sequence.tokens, truncated[index])
                            if on_progress is not None:
                                on_progress(len(answers), len(sequences))
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            rows_together = min(rows_together, len(left)) // 2
            if not rows_together:
                raise EnvironmentProblem(
                    "there is not enough memory for a single answer",
                    fix="--set generation.max_new_tokens=64, a shorter prompt, or a smaller model",
                )
            log.warning("out of memory: continuing with %d answers in a batch", rows_together)
            for sequence in left:
                sequence.restart()
            release_memory()
    return [answers[index] for index in range(len(prompts))]


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt: Sequence[int],
    settings: GenerationSection,
    stops: Stops,
    *,
    kind: Kind = "causal",
) -> Generator[str, None, Answer]:
    """Yields the text of the answer that `generate` would give piece by piece, and returns the whole `Answer`.

    Closing the generator, or an exception in its consumer (Ctrl-C), ends the model's work at its next token.
    """
    engine = _Engine(model, tokenizer, settings, stops, kind)
    (sequence,), (truncated,) = engine.sequences([prompt])
    text, shown = IncrementalText(tokenizer), 0
    with engine.answering():
        for token in engine.tokens_before_end(sequence):
            text.add(token)
            certain = len(text.text) - engine.stop.held_back(text.text)
            if certain > shown:
                yield text.text[shown:certain]
                shown = certain
    answer = engine.stop.answer(sequence.tokens, truncated)
    if rest := answer.text[shown:]:
        yield rest
    return answer


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to answer, with the encoder that it was trained with."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    kind: Kind
    device: str
    name: str

    @property
    def adapted(self) -> bool:
        """Whether it has an adapter, which can be switched off."""
        return hasattr(self.model, "disable_adapter")

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Switches the adapter off within the block."""
        with self.model.disable_adapter() if self.adapted else nullcontext():
            yield

    def prompt(self, row: rows.Row | list[Message], settings: GenerationSection) -> tuple[list[int], int]:
        """The prompt's ids for a row or a conversation, and how many of its oldest turns were removed to fit."""
        return truncate_prompt(self.encoder, row, max_prompt_tokens(self.model, settings, self.kind))

    def stream(
        self, messages: list[Message], settings: GenerationSection, attempt: int = 0
    ) -> Generator[str, None, Answer]:
        """The answer to a conversation in pieces; each attempt draws with another seed."""
        ids, removed = self.prompt(messages, settings)
        if removed:
            log.warning("the conversation is too long for the model: its oldest %d turns were left out", removed)
        seeded = settings.model_copy(update={"seed": settings.seed + attempt})
        return stream(self.model, self.tokenizer, ids, seeded, self.encoder.stops, kind=self.kind)

    def stream_base(
        self, messages: list[Message], settings: GenerationSection, attempt: int = 0
    ) -> Generator[str, None, Answer]:
        """The base's answer in pieces."""
        with self.base_only():
            return (yield from self.stream(messages, settings, attempt))

    def generate(
        self, prompts: Sequence[list[int]], config: Config, on_progress: Callable[[int, int], None] | None = None
    ) -> list[Answer]:
        """An answer to each prompt; warns of prompts that lost their oldest tokens."""
        answers = generate(
            self.model, self.tokenizer, prompts, config.generation, self.encoder.stops,
            batch_size=config.eval.batch_size, kind=self.kind, on_progress=on_progress,
        )  # fmt: skip
        warn_truncated([answer.truncated for answer in answers], "tokens")
        return answers


class _Engine:
    """A model with what all of its answers share: settings, stop criteria, padding, device."""

    def __init__(self, model: nn.Module, tokenizer: Any, settings: GenerationSection, stops: Stops, kind: Kind) -> None:
        self.model, self.base, self.settings, self.kind = model, cast(Any, unwrap(model)), settings, kind
        self.stop = StopCriteria(tokenizer, stops, settings.stop)
        self.pad = pad_id(tokenizer, stops)
        embedding = self.base.get_input_embeddings()
        self.device = embedding.weight.device if embedding is not None else next(self.base.parameters()).device
        self.own_loop = kind == "causal" and decode.supports(model)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Evaluation mode, and a generation_config without the model's own settings; both are restored afterwards."""
        from transformers import GenerationConfig

        modes, config = [(module, module.training) for module in self.model.modules()], self.base.generation_config
        start = getattr(config, "decoder_start_token_id", None)
        if start is None:
            start = getattr(self.base.config, "decoder_start_token_id", None)
        bos = getattr(self.base.config, "bos_token_id", None)
        self.model.eval()
        self.base.generation_config = GenerationConfig(decoder_start_token_id=start, bos_token_id=bos)
        try:
            yield
        finally:
            self.base.generation_config = config
            for module, training in modes:
                module.training = training

    def sequences(self, prompts: Sequence[Sequence[int]]) -> tuple[list[DecodingSequence], list[int]]:
        """The prompts as sequences to decode, and how many of its oldest tokens each lost to the context's limit."""
        limit = max_prompt_tokens(self.model, self.settings, self.kind)
        context = context_length(self.model, self.kind)
        sequences, truncated = [], []
        for index, (prompt, seed) in enumerate(zip(prompts, seeds(prompts, self.settings.seed), strict=True)):
            ids = list(prompt if limit is None else prompt[-limit:])
            truncated.append(len(prompt) - len(ids))
            max_tokens = self.settings.max_new_tokens
            if context is not None:
                max_tokens = max(1, min(max_tokens, context - len(ids)))
            penalised = frozenset[int]() if self.kind == "seq2seq" else frozenset(ids)
            sequences.append(DecodingSequence(index, ids or [self.pad], max_tokens, seed, penalised))
        return sequences, truncated

    def steps(self, sequences: list[DecodingSequence], rows_together: int) -> Iterator[list[DecodingSequence]]:
        """Decodes all sequences, at most `rows_together` side by side; yields those that advanced, `done` at the end.

        The library's `generate` advances a whole batch to its end.
        """
        if self.own_loop:
            decoder = Decoder(self.model, sequences, self.settings, self.stop, rows=rows_together, device=self.device)
            yield from decoder.steps()
            return
        log.debug("%s is not in PROVEN: it is answered by transformers' generate", type(self.base).__name__)
        order = sorted(sequences, key=lambda sequence: (-len(sequence.prompt), sequence.index))
        for at in range(0, len(order), rows_together):
            self._library_generate(order[at : at + rows_together])
            yield order[at : at + rows_together]

    def tokens_before_end(self, sequence: DecodingSequence) -> Iterator[int]:
        """Each token of one sequence at once, except the one that ends it."""
        if self.own_loop:
            for _ in self.steps([sequence], 1):
                if not sequence.done:
                    yield sequence.tokens[-1]
            return
        queue: SimpleQueue[int | BaseException | None] = SimpleQueue()  # `generate` calls back, so it gets a thread
        cancelled = Event()

        def keep_on() -> bool:
            if not sequence.done:
                queue.put(sequence.tokens[-1])
            return not cancelled.is_set()

        def work() -> None:
            try:
                self._library_generate([sequence], keep_on)
                queue.put(None)
            except BaseException as error:
                queue.put(error)

        worker = Thread(target=work, daemon=True)
        worker.start()
        try:
            while (token := queue.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            cancelled.set()
            worker.join()

    def _library_generate(self, batch: Sequence[DecodingSequence], keep_on: Callable[[], bool] = lambda: True) -> None:
        """Decodes the batch with transformers' `generate`, until `keep_on`, called after each step, is false."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        longest = max(len(sequence.prompt) for sequence in batch)
        ids = torch.full((len(batch), longest), self.pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(sequence.prompt for sequence in batch):  # decoders are padded on the left
            columns = slice(0, len(prompt)) if self.kind == "seq2seq" else slice(longest - len(prompt), longest)
            ids[row, columns], mask[row, columns] = torch.tensor(prompt), 1
        ended = torch.zeros(len(batch), dtype=torch.bool, device=self.device)

        def choose(_: Tensor, scores: Tensor) -> Tensor:
            tokens = choose_tokens(scores, batch, self.settings, self.stop.ids)
            for row, (sequence, token) in enumerate(zip(batch, tokens, strict=True)):
                if not sequence.done:
                    sequence.append(token, self.stop)
                if sequence.done:
                    ended[row] = True
            if not keep_on():
                ended[:] = True
            chosen = torch.tensor(tokens, device=scores.device)[:, None]
            return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

        self.base.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=GenerationConfig(
                max_new_tokens=max(sequence.max_tokens for sequence in batch),
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=self.pad,
                decoder_start_token_id=self.base.generation_config.decoder_start_token_id,
            ),
            logits_processor=LogitsProcessorList([choose]),
            stopping_criteria=StoppingCriteriaList([lambda *_, **__: ended]),
        )
        for sequence in batch:
            sequence.done = True


def pad_id(tokenizer: Any, stops: Stops) -> int:
    """A token for padding, which is always masked."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, *sorted(stops.ids))
    return next((int(token) for token in candidates if token is not None), 0)
