"""Keys and values of the answers under way: one block of memory a layer, made once, in which rows come and go.

Row r of the store is an answer; its text stands flush against column `at`, where every row writes its next token, so
that columns apart are positions apart and windows of attention bind as they should. What stands in front of a row's
first column is masked. Nothing is concatenated, and a finished row's place is taken by the next question.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


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


class KeyStore(Cache):  # type: ignore[misc]
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
