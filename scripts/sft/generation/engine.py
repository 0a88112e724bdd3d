"""A model that answers: many prompts in batches, or one conversation piece by piece.

Proven families are decoded by our own loop (`decode`), all others by transformers' `generate`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sft.chat.encode import Encoder
from sft.config.schema import GenerationSection
from sft.data import rows
from sft.errors import DataError, EnvironmentProblem
from sft.generation import decode
from sft.generation.decode import Decoder, DecodingSequence, choose_tokens, seeds
from sft.generation.stop import Answer, IncrementalText, StopCriteria
from sft.model.adapters import has_prefix, unwrap, without_adapter
from sft.model.files import Kind
from sft.model.shard import is_sharded
from sft.step.step import out_of_memory, release_memory

log = logging.getLogger("sft.generation")
Message = dict[str, Any]
Progress = Callable[[float, int], None]  # answers done, a started one as a fraction; of how many
PROGRESS_EVERY = 16  # steps
MIN_ANSWER = 16  # tokens, the least that a longer prompt is traded for


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to answer, with the encoder that it was trained with. name: for messages."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    kind: Kind
    name: str = ""

    @property
    def base(self) -> Any:
        """The transformers model inside of wrappers and adapters."""
        return unwrap(self.model)

    @property
    def device(self) -> str:
        """Where inputs belong."""
        embedding = self.base.get_input_embeddings()
        weight = embedding.weight if embedding is not None else next(self.base.parameters())
        mesh = getattr(weight, "device_mesh", None)  # of sharded weights, which may wait elsewhere
        return str(weight.device if mesh is None else mesh.device_type)

    @property
    def adapted(self) -> bool:
        """Whether it has an adapter, which can be switched off."""
        return hasattr(self.model, "disable_adapter")

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Switches the adapter off within the block."""
        with without_adapter(self.model) if self.adapted else nullcontext():
            yield

    def context_length(self) -> int | None:
        """Most tokens of prompt and answer together; None if nothing limits them (T5's positions are relative)."""
        config = self.base.config
        return None if self.kind == "seq2seq" else getattr(config.get_text_config(), "max_position_embeddings", None)

    def max_prompt_tokens(self, settings: GenerationSection) -> int | None:
        """Most tokens of a prompt: the context less `max_new_tokens`, but at least half of it; None: no limit."""
        limit = self.context_length()
        return None if limit is None else max(limit - settings.max_new_tokens, limit // 2, 1)

    def prompt(self, row: rows.Row | list[Message], settings: GenerationSection) -> tuple[list[int], int]:
        """The prompt's ids for a row or a conversation, and how many of its oldest turns were removed to fit.

        The system text and the newest turn always stay; if they alone are too long, `generate` cuts the oldest tokens.
        """
        ids, removed = self.encoder.prompt(row), 0
        limit = self.max_prompt_tokens(settings)
        if limit is None or len(ids) <= limit or (isinstance(row, dict) and rows.is_rendered(row)):
            return ids, 0
        messages, tools = rows.prompt_messages(row)
        while len(ids) > limit:
            questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
            if len(questions) < 2:
                break
            messages, removed = [*messages[: questions[0]], *messages[questions[1] :]], removed + 1
            ids = self.encoder.prompt({"messages": messages, "tools": tools})
        return ids, removed

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSection,
        batch_size: int,
        on_progress: Progress | None = None,
    ) -> list[Answer]:
        """An answer to each prompt (token ids), in their order, the same as one prompt at a time but for rounding.

        The longest prompts come first, `batch_size` side by side, halved for good when memory runs out. A prompt that
        leaves the answer too little of the model's context loses its oldest tokens.
        Raises EnvironmentProblem when not even one answer fits into memory.
        """
        stop = StopCriteria(self.tokenizer, self.encoder.stops, settings.stop, loops=settings.stop_loops)
        sequences, truncated = self._sequences(prompts, settings)
        answers: dict[int, Answer] = {}
        rows_together = max(1, batch_size)
        with self._answering():
            while left := [sequence for sequence in sequences if sequence.index not in answers]:
                try:
                    for step, advanced in enumerate(self._steps(left, settings, stop, rows_together)):
                        for sequence in advanced:
                            if sequence.done:
                                answers[sequence.index] = stop.answer(sequence.tokens, truncated[sequence.index])
                        if on_progress is not None and (step % PROGRESS_EVERY == 0 or any(s.done for s in advanced)):
                            on_progress(_answers_done(sequences, answers.values(), settings), len(sequences))
                    continue
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error) or is_sharded(self.model):  # other ranks wait in the same forward pass
                        raise
                rows_together = min(rows_together, len(left)) // 2
                if not rows_together:
                    fix = "--set generation.max_new_tokens=64, a shorter prompt, or a smaller model"
                    raise EnvironmentProblem("there is not enough memory for a single answer", fix=fix)
                log.warning("out of memory: continuing with %d answers in a batch", rows_together)
                for sequence in left:
                    sequence.restart()
                release_memory()
        return [answers[index] for index in range(len(prompts))]

    def stream(
        self, messages: list[Message], settings: GenerationSection, attempt: int = 0
    ) -> Generator[str, None, Answer]:
        """Yields the answer to a conversation piece by piece, as `generate` would give it, and returns the `Answer`.

        attempt: each draws with another seed. Closing the generator, or an exception in its consumer (Ctrl-C), ends the
        model's work at its next token. Families that our own loop does not decode give the whole answer at once.
        Raises DataError if the system text and the newest question are longer than the model reads.
        """
        ids, removed = self.prompt(messages, settings)
        if removed:
            log.warning("the conversation is too long for the model: its oldest %d turns were left out", removed)
        limit = self.max_prompt_tokens(settings)
        if limit is not None and len(ids) > limit:
            what = f"this question is too long: {len(ids):,} tokens with its system text, and the model reads {limit:,}"
            left = (self.context_length() or 0) - len(ids)
            raise DataError(what, fix=f"shorten it{f', or: /set max_new_tokens {left}' if left >= MIN_ANSWER else ''}")
        settings = settings.model_copy(update={"seed": settings.seed + attempt})
        stop = StopCriteria(self.tokenizer, self.encoder.stops, settings.stop, loops=settings.stop_loops)
        (sequence,), _ = self._sequences([ids], settings)
        text, shown = IncrementalText(self.tokenizer), 0
        with self._answering():
            for _ in self._steps([sequence], settings, stop, 1):
                if not sequence.done:
                    text.add(sequence.tokens[-1])
                    certain = len(text.text) - stop.held_back(text.text)
                    if certain > shown:
                        yield text.text[shown:certain]
                        shown = certain
        answer = stop.answer(sequence.tokens)
        if rest := answer.text[shown:]:
            yield rest
        return answer

    def stream_base(
        self, messages: list[Message], settings: GenerationSection, attempt: int = 0
    ) -> Generator[str, None, Answer]:
        """The base's answer in pieces."""
        with self.base_only():
            return (yield from self.stream(messages, settings, attempt))

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Evaluation mode, and a generation_config without the model's own settings; both are restored afterwards."""
        from transformers import GenerationConfig

        base = self.base
        modes, config = [(module, module.training) for module in self.model.modules()], base.generation_config
        start = getattr(config, "decoder_start_token_id", None)
        if start is None:
            start = getattr(base.config, "decoder_start_token_id", None)
        bos = getattr(base.config, "bos_token_id", None)
        self.model.eval()
        base.generation_config = GenerationConfig(decoder_start_token_id=start, bos_token_id=bos)
        try:
            yield
        finally:
            base.generation_config = config
            for module, training in modes:
                module.training = training

    def _sequences(
        self, prompts: Sequence[Sequence[int]], settings: GenerationSection
    ) -> tuple[list[DecodingSequence], list[int]]:
        """The prompts as sequences to decode, and how many of its oldest tokens each lost to the context's limit."""
        limit, context = self.max_prompt_tokens(settings), self.context_length()
        sequences, truncated = [], []
        for index, (prompt, seed) in enumerate(zip(prompts, seeds(prompts, settings.seed), strict=True)):
            ids = list(prompt if limit is None else prompt[-limit:])
            truncated.append(len(prompt) - len(ids))
            max_tokens = settings.max_new_tokens
            if context is not None:
                max_tokens = max(1, min(max_tokens, context - len(ids)))
            penalised = frozenset[int]() if self.kind == "seq2seq" else frozenset(ids)
            sequences.append(DecodingSequence(index, ids or [self.pad_id()], max_tokens, seed, penalised))
        return sequences, truncated

    def _steps(
        self, sequences: list[DecodingSequence], settings: GenerationSection, stop: StopCriteria, rows_together: int
    ) -> Iterator[list[DecodingSequence]]:
        """Decodes all sequences, at most `rows_together` side by side; yields those that advanced, `done` at the end.

        The library's `generate` advances a whole batch to its end.
        """
        if self.kind == "causal" and decode.supports(self.model):
            device = torch.device(self.device)
            yield from Decoder(self.model, sequences, settings, stop, rows=rows_together, device=device).steps()
            return
        order = sorted(sequences, key=lambda sequence: (-len(sequence.prompt), sequence.index))
        for at in range(0, len(order), rows_together):
            self._library_generate(order[at : at + rows_together], settings, stop)
            yield order[at : at + rows_together]

    def _library_generate(
        self, batch: Sequence[DecodingSequence], settings: GenerationSection, stop: StopCriteria
    ) -> None:
        """Decodes the batch with transformers' `generate`; tokens and ends are chosen as in our own loop."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        longest = max(len(sequence.prompt) for sequence in batch)
        ids = torch.full((len(batch), longest), self.pad_id(), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(sequence.prompt for sequence in batch):  # decoders are padded on the left
            columns = slice(0, len(prompt)) if self.kind == "seq2seq" else slice(longest - len(prompt), longest)
            ids[row, columns], mask[row, columns] = torch.tensor(prompt), 1

        def choose(_: Tensor, scores: Tensor) -> Tensor:
            tokens = choose_tokens(scores, batch, settings, stop.ids)
            for sequence, token in zip(batch, tokens, strict=True):
                if not sequence.done:
                    sequence.append(token, stop)
            chosen = torch.tensor(tokens, device=scores.device)[:, None]
            return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

        def ended(ids: Tensor, *_: Any, **__: Any) -> Tensor:
            return torch.tensor([sequence.done for sequence in batch], device=ids.device)

        (self.model if has_prefix(self.model) else self.base).generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=GenerationConfig(
                max_new_tokens=max(sequence.max_tokens for sequence in batch),
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=self.pad_id(),
                decoder_start_token_id=self.base.generation_config.decoder_start_token_id,
            ),
            logits_processor=LogitsProcessorList([choose]),
            stopping_criteria=StoppingCriteriaList([ended]),
        )

    def complete(self, sequence: DecodingSequence, settings: GenerationSection, stop: StopCriteria) -> None:
        """Decodes one sequence to its end with transformers' `generate`: for families that our loop does not decode."""
        with self._answering():
            self._library_generate([sequence], settings, stop)

    def pad_id(self) -> int:
        """A token for padding, which is always masked."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, *sorted(self.encoder.stops.ids))
        return next((int(token) for token in candidates if token is not None), 0)


def _answers_done(
    sequences: Sequence[DecodingSequence], answers: Collection[Answer], settings: GenerationSection
) -> float:
    """How many are answered; one that is begun counts by its length so far, of the mean of those that are done."""
    typical = sum(answer.tokens for answer in answers) / len(answers) if answers else settings.max_new_tokens
    begun = [len(sequence.tokens) for sequence in sequences if not sequence.done]
    return len(answers) + sum(min(count / max(typical, 1), 0.9) for count in begun)


def warn_truncated(removed: Sequence[int], unit: str) -> None:
    """Warns how many prompts were too long and how many of their oldest `unit` (turns, tokens) were removed."""
    if counts := [count for count in removed if count]:
        log.warning(
            "%d prompts are too long for the model: their oldest %d %s were removed", len(counts), sum(counts), unit
        )
