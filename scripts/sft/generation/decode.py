"""The decode loop: sequences side by side over one preallocated KV cache, a finished one replaced by the next.

The cache is written in place. All rows end at the same column, so that a step writes one column for all of them; a row
begins at its own column, which is the prompt's length to the left. docs/decisions/0014-a-decode-loop-of-our-own.md
"""

from __future__ import annotations

import logging
import random
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from sft.config.schema import GenerationSection
from sft.generation.stop import StopCriteria
from sft.model import hardware
from sft.model.adapters import has_prefix, unwrap

log = logging.getLogger("sft.generation")
PROVEN = frozenset(
    "bitnet cohere cohere2 ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 gpt2 gpt_neox granite granitemoe helium"
    " llama ministral mistral mixtral nemotron olmo olmo2 olmo3 olmoe opt phi phi3 qwen2 qwen3 qwen3_moe seed_oss"
    " smollm3 stablelm starcoder2".split()
)
PREFILL_TOKENS = 4096  # most prompt tokens in one forward
SPARE_COLUMNS = 64  # beyond the longest sequence, so that the cache is shifted seldom
MIN_SHARED_PREFIX = 8  # tokens below which a common beginning is not worth storing


@dataclass(eq=False)
class DecodingSequence:
    """A prompt and its answer so far, as token ids.

    max_tokens: of the answer. seed: of its draws. penalised: prompt tokens that the repetition penalty counts.
    start: the sequence's first column in the cache.
    """

    index: int
    prompt: list[int]
    max_tokens: int
    seed: bytes
    penalised: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    start: int = 0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Drops the answer so far; the same draws follow."""
        self.tokens, self.done = [], False
        self.seen, self.draws = set(self.penalised), random.Random(self.seed)

    def append(self, token: int, stop: StopCriteria) -> None:
        """Adds a generated token; `done` is set where it ends the answer."""
        self.tokens.append(token)
        self.seen.add(token)
        self.done = len(self.tokens) >= self.max_tokens or stop.ended(self.tokens)


def seeds(prompts: Sequence[Sequence[int]], seed: int) -> list[bytes]:
    """A seed for each prompt's draws: `seed`, the prompt's tokens, and how often the same prompt came before.

    So a sampled answer depends neither on the batch nor on the order of the prompts.
    """
    result: list[bytes] = []
    repeats = Counter[bytes]()
    for prompt in prompts:
        key = blake2b(b"".join(token.to_bytes(4, "little") for token in prompt)).digest()
        result.append(b"%d %d " % (seed, repeats[key]) + key)
        repeats[key] += 1
    return result


def choose_tokens(
    logits: Tensor, sequences: Sequence[DecodingSequence], settings: GenerationSection, end_ids: frozenset[int]
) -> list[int]:
    """The next token of each sequence, the likeliest or drawn. logits: [B, V]."""
    scores = logits.float()
    if settings.repetition_penalty != 1.0:
        scores = _penalise(scores, sequences, settings.repetition_penalty, end_ids)
    if settings.do_sample:
        return _sample(scores, [sequence.draws.random() for sequence in sequences], settings)
    tokens: list[int] = scores.argmax(dim=-1).tolist()
    return tokens


def _penalise(scores: Tensor, sequences: Sequence[DecodingSequence], penalty: float, end_ids: frozenset[int]) -> Tensor:
    """The repetition penalty of Keskar et al. 2019 (CTRL) as in transformers, with two differences: padding is not
    counted (a batch answers as one row does), and end tokens never become less likely (answers still stop)."""
    pairs = [(row, token) for row, sequence in enumerate(sequences) for token in sequence.seen - end_ids]
    if not pairs:
        return scores
    rows, tokens = torch.tensor(pairs, device=scores.device).unbind(1)
    old = scores[rows, tokens]
    return scores.index_put((rows, tokens), torch.where(old < 0, old * penalty, old / penalty))


def _sample(scores: Tensor, draws: Sequence[float], settings: GenerationSection) -> list[int]:
    """Temperature, top-k and top-p as in transformers, then inverse transform sampling with the draws in [0, 1)."""
    from transformers.generation import logits_process as processors

    warpers: list[processors.LogitsProcessor] = [processors.TemperatureLogitsWarper(settings.temperature)]
    if settings.top_k:
        warpers.append(processors.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        warpers.append(processors.TopPLogitsWarper(settings.top_p))
    for warper in warpers:
        scores = warper(None, scores)
    cumulative = scores.softmax(dim=-1).double().cumsum(dim=-1)
    points = torch.tensor(draws, dtype=torch.double, device=scores.device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, points, right=True)[:, 0].clamp(max=scores.shape[1] - 1)
    result: list[int] = tokens.tolist()
    return result


class KVCache(Cache):  # type: ignore[misc]
    """A transformers cache, each layer [rows, heads, columns, width], that is read and written within a window.

    The next forward reads rows `first` to `last` and columns from `low`, and writes from column `at` on.
    is_text: bool [rows, queries], false if a query is padding and the cached value must stay; None: all are text.
    """

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.first, self.last, self.low, self.at = 0, rows, 0, 0
        self.is_text: Tensor | None = None
        super().__init__(layers=[_KVLayer(self) for _ in range(layers)])

    def select(self, first: int, last: int, low: int) -> None:
        """Sets the window's rows and its first column."""
        self.first, self.last, self.low = first, last, low

    def store_prefix(self, length: int) -> None:
        """Copies the first `length` columns of row 0: what every prompt begins with."""
        for layer in self.layers:
            layer.prefix = (layer.keys[0, :, :length].clone(), layer.values[0, :, :length].clone())

    def write_prefix(self, first: int, starts: list[int], length: int) -> None:
        """Writes the stored columns into the rows from `first` on, each at its own start column."""
        device = self.layers[0].keys.device
        rows = torch.arange(first, first + len(starts), device=device)[:, None]
        columns = torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
        for layer in self.layers:
            keys, values = layer.prefix
            layer.keys[rows, :, columns] = keys.transpose(0, 1)
            layer.values[rows, :, columns] = values.transpose(0, 1)

    def move_row(self, source: int, target: int, start: int) -> None:
        """Copies a row's columns from `start` to `at` over another row's."""
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                states[target, :, start : self.at] = states[source, :, start : self.at]

    def shift(self, by: int) -> None:
        """Moves the columns up to `at` to the left, the first `by` are lost; if `by` is negative, to the right."""
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                states[:, :, max(-by, 0) : self.at - by] = states[:, :, max(by, 0) : self.at].clone()
        self.at -= by

    def grow(self, rows: int, columns: int) -> None:
        """Gives the cache more rows and columns; what it holds stays where it is."""
        for layer in self.layers:
            if layer.is_initialized:
                old = layer.keys, layer.values
                layer.keys, layer.values = (
                    states.new_zeros(rows, states.shape[1], columns, states.shape[3]) for states in old
                )
                for new, states in zip((layer.keys, layer.values), old, strict=True):
                    new[: self.rows, :, : self.at] = states[:, :, : self.at]
        self.rows, self.columns = rows, columns


class _KVLayer(CacheLayerMixin):  # type: ignore[misc]
    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.cache = cache
        self.prefix: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(self.cache.rows, states.shape[1], self.cache.columns, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, store: Tensor, states: Tensor) -> Tensor:
        cache, end = self.cache, self.cache.at + states.shape[2]
        rows = store[cache.first : cache.last]
        target = rows[:, :, cache.at : end]
        target.copy_(states if cache.is_text is None else torch.where(cache.is_text[:, None, :, None], states, target))
        return rows[:, :, cache.low : end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.at - self.cache.low

    def get_max_length(self) -> int:
        return self.cache.columns


def supports(model: nn.Module) -> bool:
    """Whether this loop may decode the model: a family tested against transformers' `generate`, its code unpatched."""
    base: Any = unwrap(model)
    return (
        not has_prefix(model)
        and base.config.model_type in PROVEN
        and type(base).forward.__module__.startswith("transformers.models.")
    )


class Decoder:
    """Answers `sequences`, at most `rows` of them side by side, the longest prompt first."""

    def __init__(
        self,
        model: nn.Module,
        sequences: Sequence[DecodingSequence],
        settings: GenerationSection,
        stop: StopCriteria,
        *,
        rows: int,
        device: torch.device,
    ) -> None:
        base: Any = unwrap(model)
        self.base = base
        self.settings, self.stop, self.device = settings, stop, device
        self.waiting = deque(sorted(sequences, key=lambda sequence: (-len(sequence.prompt), sequence.index)))
        self.active: list[DecodingSequence] = []
        self.shared = shared_prefix([sequence.prompt for sequence in sequences])
        columns = max((len(s.prompt) + s.max_tokens for s in sequences), default=0) + SPARE_COLUMNS
        self.rows = min(rows, len(sequences), rows_in_memory(base, columns, device))
        self.cache = KVCache(base.config.get_text_config().num_hidden_layers, self.rows, columns)
        self.columns = torch.arange(columns, device=device)
        self.starts = torch.zeros(self.rows, 1, dtype=torch.long, device=device)

    def steps(self) -> Iterator[list[DecodingSequence]]:
        """Yields the sequences that got a token in each step. What the model raises passes through."""
        if self.shared:
            self.cache.select(0, 1, 0)
            self._forward([self.waiting[0].prompt[: self.shared]], 0)
            self.cache.store_prefix(self.shared)
        while self.waiting or self.active:
            free = self.rows - len(self.active)
            if self.waiting and (free >= self.rows / 4 or not self.active):
                yield self._append(*self._admit(free))
            else:
                yield self._append(*self._step())

    def _append(self, advanced: list[DecodingSequence], logits: Tensor) -> list[DecodingSequence]:
        """Chooses the next token of the sequences that advanced; finished ones leave the batch. logits: [B, V]."""
        for sequence, token in zip(advanced, self._choose(advanced, logits), strict=True):
            sequence.append(token, self.stop)
        self._remove_done()
        return advanced

    def _choose(self, advanced: Sequence[DecodingSequence], logits: Tensor) -> list[int]:
        return choose_tokens(logits, advanced, self.settings, self.stop.ids)

    def _admit(self, free: int) -> tuple[list[DecodingSequence], Tensor]:
        """Reads waiting prompts into at most `free` rows; logits [B, V] of the first tokens of their answers."""
        cache, first = self.cache, len(self.active)
        if not self.active:
            cache.at = len(self.waiting[0].prompt)
        width = len(self.waiting[0].prompt) - self.shared
        new = [self.waiting.popleft()]
        while self.waiting and len(new) < free and width * (len(new) + 1) <= PREFILL_TOKENS:
            new.append(self.waiting.popleft())
        for sequence in new:
            sequence.start = cache.at - len(sequence.prompt)
        starts = [sequence.start for sequence in new]
        self.starts[first : first + len(new), 0] = torch.tensor(starts, device=self.device)
        if self.shared:
            cache.write_prefix(first, starts, self.shared)
        cache.at -= width
        cache.select(first, first + len(new), cache.at - self.shared)
        logits = self._forward([sequence.prompt[self.shared :] for sequence in new], self.shared)
        self.active += new
        return new, logits

    def _step(self) -> tuple[list[DecodingSequence], Tensor]:
        """Logits [B, V] of one more token for every active sequence."""
        low = min(sequence.start for sequence in self.active)
        if self.cache.at == self.cache.columns:
            self._shift(low)
            low = 0
        self.cache.select(0, len(self.active), low)
        return list(self.active), self._forward([sequence.tokens[-1:] for sequence in self.active], 0)

    def _shift(self, by: int) -> None:
        """Moves the cache's columns and the rows' beginnings, as `KVCache.shift`."""
        self.cache.shift(by)
        self.starts -= by
        for sequence in self.active:
            sequence.start -= by

    @torch.no_grad()
    def _forward(self, ids: list[list[int]], shared: int) -> Tensor:
        """Logits [B, V] after the last of `ids`, which are padded on the left and written from `cache.at` on.

        shared: tokens of each row that are in the cache already.
        """
        cache, width = self.cache, max(len(row) for row in ids)
        starts = self.starts[cache.first : cache.last]
        queries = self.columns[cache.at : cache.at + width]
        ragged = any(len(row) < width for row in ids)
        cache.is_text = queries >= starts + shared if ragged else None
        logits: Tensor = self.base(
            input_ids=torch.tensor([[0] * (width - len(row)) + row for row in ids], device=self.device),
            attention_mask=self.columns[cache.low : cache.at + width] >= starts,
            position_ids=(queries - starts).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            # not 1: on a CPU, a slice of the hidden states is multiplied with a copy of a frozen bf16 head for each row
            logits_to_keep=torch.tensor([width - 1], device=self.device),
        ).logits[:, -1]
        cache.at += width
        return logits

    def _remove_done(self) -> None:
        """Frees the rows of finished sequences; the last active rows move into them."""
        for row in range(len(self.active) - 1, -1, -1):
            if not self.active[row].done:
                continue
            last = self.active.pop()
            if row < len(self.active):
                self.active[row] = last
                self.starts[row] = self.starts[len(self.active)]
                self.cache.move_row(len(self.active), row, last.start)


def rows_in_memory(base: Any, columns: int, device: torch.device) -> int:
    """On the CPU, where no out-of-memory error comes: rows whose keys and values take half of the free memory."""
    if device.type != "cpu":
        return sys.maxsize
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row_bytes = 2 * config.num_hidden_layers * heads * width * columns * base.dtype.itemsize
    rows: int = max(1, hardware.memory()[1] // 2 // row_bytes)
    log.debug("the KV caches of %d rows fit into half of the free memory", rows)
    return rows


def shared_prefix(prompts: Sequence[list[int]]) -> int:
    """How many first tokens all prompts have in common, at least one of each left over; 0 if they are too few."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)
    equal = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    length = min(equal, min(len(prompt) for prompt in prompts) - 1)
    return length if length >= MIN_SHARED_PREFIX else 0
