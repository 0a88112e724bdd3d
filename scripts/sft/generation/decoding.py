"""The loop that answers many questions side by side: what they all begin with is read once, the cache is never copied,
and where an answer ends the next question takes its place.

It serves the families in `PROVEN`, whose texts are tested equal to transformers' own one-by-one greedy texts; for the
others `library` asks transformers. docs/decisions/0014-a-decode-loop-of-our-own.md has the reasons and the figures.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sft.config.schema import GenerationSection
from sft.generation.choice import Ask, choose
from sft.generation.key_store import KeyStore
from sft.generation.stopping import Watcher
from sft.model import hardware
from sft.step import unwrap

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
        watcher: Watcher,
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
        self.store = KeyStore(base.config.get_text_config().num_hidden_layers, self.rows, columns)
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
