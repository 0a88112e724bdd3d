"""Which token comes next: the likeliest, or one drawn from a chance that belongs to the question alone."""

from __future__ import annotations

import logging
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from sft.config.schema import GenerationSection
from sft.generation.stop import StopWatcher
from sft.model import hardware
from sft.step import unwrap


@dataclass
class Ask:
    """A question under way. prompt, made: token ids. most: tokens it may make. start: its first column in a store.

    chance: what its draws are seeded with. shown: tokens of the prompt that the repetition penalty counts.
    """

    index: int
    prompt: list[int]
    most: int
    chance: bytes
    shown: frozenset[int]
    made: list[int] = field(default_factory=list)
    start: int = 0

    def __post_init__(self) -> None:
        self.start_over()

    def start_over(self) -> None:
        """Forgets the answer so far."""
        self.made, self.seen, self.draws = [], set(self.shown), random.Random(self.chance)

    def add(self, token: int) -> None:
        """Takes the token into the answer."""
        self.made.append(token)
        self.seen.add(token)


def chances(prompts: Sequence[Sequence[int]], seed: int) -> list[bytes]:
    """What each prompt's draws are seeded with: the seed, its own tokens, and how often it was asked before.

    So a drawn answer depends neither on the batch nor on the order of the questions.
    """
    found: list[bytes] = []
    before = Counter[bytes]()
    for prompt in prompts:
        key = blake2b(b"".join(token.to_bytes(4, "little") for token in prompt)).digest()
        found.append(b"%d %d " % (seed, before[key]) + key)
        before[key] += 1
    return found


def choose(logits: Tensor, asks: Sequence[Ask], settings: GenerationSection, spared: frozenset[int]) -> list[int]:
    """The next token of each ask. logits: [B, V]. spared: tokens that the repetition penalty passes over."""
    scores = logits.float()
    if settings.repetition_penalty != 1.0:
        scores = _penalised(scores, asks, settings.repetition_penalty, spared)
    if not settings.do_sample:
        found: list[int] = scores.argmax(dim=-1).tolist()
        return found
    return _drawn(scores, [ask.draws.random() for ask in asks], settings)


def _penalised(scores: Tensor, asks: Sequence[Ask], penalty: float, spared: frozenset[int]) -> Tensor:
    """The penalty of Keskar et al. 2019 (CTRL), as transformers applies it, but for two things: padding does not count
    as text (so a batch answers as one by one), and end tokens are never made less likely (so answers still stop)."""
    pairs = [(row, token) for row, ask in enumerate(asks) for token in ask.seen - spared]
    if not pairs:
        return scores
    rows, tokens = torch.tensor(pairs, device=scores.device).unbind(1)
    old = scores[rows, tokens]
    return scores.index_put((rows, tokens), torch.where(old < 0, old * penalty, old / penalty))


def _drawn(scores: Tensor, draws: Sequence[float], settings: GenerationSection) -> list[int]:
    """Temperature, top-k and top-p as transformers applies them, then the inverse of the distribution at each draw."""
    from transformers.generation import logits_process as warping

    warpers: list[warping.LogitsProcessor] = [warping.TemperatureLogitsWarper(settings.temperature)]
    if settings.top_k:
        warpers.append(warping.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        warpers.append(warping.TopPLogitsWarper(settings.top_p))
    for warper in warpers:
        scores = warper(None, scores)
    summed = scores.softmax(dim=-1).double().cumsum(dim=-1)
    points = torch.tensor(draws, dtype=torch.double, device=scores.device)[:, None] * summed[:, -1:]
    found: list[int] = torch.searchsorted(summed, points, right=True)[:, 0].clamp(max=scores.shape[1] - 1).tolist()
    return found


class Place:
    """Where the next forward reads and writes: rows `first` to `last`, columns `low` to `at` seen, queries from `at`.

    text: bool [rows, queries], false where a query is padding and what stands there already has to stay; None: all.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.first, self.last, self.low, self.at = 0, rows, 0, 0
        self.text: Tensor | None = None

    def use(self, first: int, last: int, low: int) -> None:
        """Turns to these rows and to the columns from `low` on."""
        self.first, self.last, self.low = first, last, low


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self.prefix: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(self.place.rows, states.shape[1], self.place.columns, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, store: Tensor, states: Tensor) -> Tensor:
        place, end = self.place, self.place.at + states.shape[2]
        rows = store[place.first : place.last]
        there = rows[:, :, place.at : end]
        there.copy_(states if place.text is None else torch.where(place.text[:, None, :, None], states, there))
        return rows[:, :, place.low : end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.place.at - self.place.low

    def get_max_length(self) -> int:
        return self.place.columns


class KVCache(Cache):  # type: ignore[misc]
    """A transformers cache of `layers` layers, each [rows, heads, columns, width], that reads and writes at `place`."""

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        self.place = Place(rows, columns)
        super().__init__(layers=[_Layer(self.place) for _ in range(layers)])

    def keep_prefix(self, length: int) -> None:
        """Remembers the first `length` columns of row 0: what every question begins with."""
        for layer in self.layers:
            layer.prefix = (layer.keys[0, :, :length].clone(), layer.values[0, :, :length].clone())

    def put_prefix(self, first: int, starts: list[int], length: int) -> None:
        """Writes the remembered columns into the rows from `first` on, each from its own start column."""
        device = self.layers[0].keys.device
        rows = torch.arange(first, first + len(starts), device=device)[:, None]
        columns = torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
        for layer in self.layers:
            keys, values = layer.prefix
            layer.keys[rows, :, columns] = keys.transpose(0, 1)
            layer.values[rows, :, columns] = values.transpose(0, 1)

    def move_row(self, source: int, target: int, columns: slice) -> None:
        """Copies a row's columns over another row's."""
        for layer in self.layers:
            for store in (layer.keys, layer.values):
                store[target, :, columns] = store[source, :, columns]

    def shift(self, by: int) -> None:
        """Moves every column up to `at` to the left; the first `by` are lost."""
        at = self.place.at
        for layer in self.layers:
            for store in (layer.keys, layer.values):
                store[:, :, : at - by] = store[:, :, by:at].clone()
        self.place.at -= by


log = logging.getLogger("sft.generation")
PROVEN = frozenset(
    "qwen2 qwen3 llama mistral gemma gemma2 gemma3_text gpt2 phi3 smollm3 granite olmo2 starcoder2".split()
)
READ_TOKENS = 4096  # most prompt tokens of one forward
SLACK = 64  # columns beyond the longest answer, so that the store is shifted seldom
WORTH_SHARING = 8  # tokens that prompts must begin with alike


def serves(model: nn.Module) -> bool:
    """Whether this very model may be decoded by our loop: a proven family in transformers' own code, unpatched."""
    base: Any = unwrap(model)
    return base.config.model_type in PROVEN and type(base).forward.__module__.startswith("transformers.models.")


class Decoder:
    """Answers `asks`, at most `rows` of them side by side, the longest first; `done` is told of each as it ends."""

    def __init__(
        self,
        model: nn.Module,
        asks: Sequence[Ask],
        settings: GenerationSection,
        watcher: StopWatcher,
        *,
        rows: int,
        device: torch.device,
        done: Callable[[Ask], None],
        on_tokens: Callable[[list[int]], bool] = lambda tokens: True,
    ) -> None:
        base: Any = unwrap(model)
        self.base = base
        self.settings, self.watcher, self.device, self.done = settings, watcher, device, done
        self.on_tokens = on_tokens
        self.waiting = deque(sorted(asks, key=lambda ask: (-len(ask.prompt), ask.index)))
        self.active: list[Ask] = []
        self.shared = shared_prefix([ask.prompt for ask in asks])
        columns = len(self.waiting[0].prompt) + max(ask.most for ask in asks) + SLACK
        self.rows = min(rows, len(asks), affordable(base, columns, device))
        self.store = KVCache(base.config.get_text_config().num_hidden_layers, self.rows, columns)
        self.columns = torch.arange(columns, device=device)
        self.starts = torch.zeros(self.rows, 1, dtype=torch.long, device=device)

    def run(self) -> None:
        """Answers everything. Raises what the model raises; what was answered before has been told to `done`."""
        if self.shared:
            self.store.place.use(0, 1, 0)
            self._forward([self.waiting[0].prompt[: self.shared]], 0)
            self.store.keep_prefix(self.shared)
        while self.waiting or self.active:
            free = self.rows - len(self.active)
            if self.waiting and (free >= self.rows / 4 or not self.active):
                self._admit(free)
            else:
                self._step()

    def _admit(self, free: int) -> None:
        """Reads the prompts of waiting questions into free rows, and chooses the first token of each answer."""
        place, first = self.store.place, len(self.active)
        if not self.active:
            place.at = len(self.waiting[0].prompt)
        width = len(self.waiting[0].prompt) - self.shared
        new = [self.waiting.popleft()]
        while self.waiting and len(new) < free and width * (len(new) + 1) <= READ_TOKENS:
            new.append(self.waiting.popleft())
        for ask in new:
            ask.start = place.at - len(ask.prompt)
        self.starts[first : first + len(new), 0] = torch.tensor([ask.start for ask in new], device=self.device)
        if self.shared:
            self.store.put_prefix(first, [ask.start for ask in new], self.shared)
        place.at -= width
        place.use(first, first + len(new), place.at - self.shared)
        logits = self._forward([ask.prompt[self.shared :] for ask in new], self.shared)
        self.active += new
        self._take(new, logits)

    def _step(self) -> None:
        """One more token for every answer under way."""
        place = self.store.place
        low = min(ask.start for ask in self.active)
        if place.at == place.columns:
            self._shift(low)
            low = 0
        place.use(0, len(self.active), low)
        self._take(self.active, self._forward([ask.made[-1:] for ask in self.active], 0))

    def _shift(self, by: int) -> None:
        self.store.shift(by)
        self.starts -= by
        for ask in self.active:
            ask.start -= by

    def _forward(self, ids: list[list[int]], shared: int) -> Tensor:
        """Logits [B, V] after the last of `ids`, which are padded on the left and written from `place.at` on."""
        place, width = self.store.place, max(len(row) for row in ids)
        starts = self.starts[place.first : place.last]
        here = self.columns[place.at : place.at + width]
        ragged = any(len(row) < width for row in ids)
        place.text = here >= starts + shared if ragged else None
        logits: Tensor = self.base(
            input_ids=torch.tensor([[0] * (width - len(row)) + row for row in ids], device=self.device),
            attention_mask=self.columns[place.low : place.at + width] >= starts,
            position_ids=(here - starts).clamp(min=0),
            past_key_values=self.store,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        place.at += width
        return logits

    def _take(self, asks: list[Ask], logits: Tensor) -> None:
        """Gives each ask its next token; those that it ends leave, and the last rows move into their places."""
        tokens = choose(logits, asks, self.settings, self.watcher.ids)
        for ask, token in zip(asks, tokens, strict=True):
            ask.add(token)
        wanted = self.on_tokens(tokens)
        ended = {id(ask) for ask in asks if len(ask.made) >= ask.most or self.watcher.ended(ask.made) or not wanted}
        for row in range(len(self.active) - 1, -1, -1):
            if id(self.active[row]) not in ended:
                continue
            self.done(self.active[row])
            last = self.active.pop()
            if row < len(self.active):
                self.active[row] = last
                self.starts[row] = self.starts[len(self.active)]
                self.store.move_row(len(self.active), row, slice(last.start, self.store.place.at))


def affordable(base: Any, columns: int, device: torch.device) -> int:
    """On the CPU, where no error tells that memory runs out: rows whose keys and values take half of what is free."""
    if device.type != "cpu":
        return sys.maxsize
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * width * columns * base.dtype.itemsize
    fitting: int = max(1, hardware.memory()[1] // 2 // row)
    log.debug("%d answers side by side would fit into half of the free memory", fitting)
    return fitting


def shared_prefix(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with alike, at least one of each left over; 0 where it is not worth it."""
    first, last = min(prompts), max(prompts)
    alike = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    found = min(alike, min(len(prompt) for prompt in prompts) - 1)
    return found if len(prompts) > 1 and found >= WORTH_SHARING else 0
