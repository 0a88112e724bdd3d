"""The order of rows, and the batch the trainer sees: a rank's share of one optimizer step's window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

Feature = Mapping[str, Any]


class Windows(Sampler[list[int]]):
    """Row indices of each window, shuffled anew in each epoch by seed and epoch alone, so that resuming is exact.

    All ranks draw the same order; rank r takes every world-th row of a window from r on. No row is dropped or taken
    twice: the last window is smaller, and a rank's share of it may be empty.
    """

    def __init__(self, rows: int, effective_batch: int, seed: int, *, rank: int = 0, world: int = 1) -> None:
        self.rows, self.effective_batch, self.seed, self.rank, self.world = rows, effective_batch, seed, rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.rows / self.effective_batch)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        for start in range(0, self.rows, self.effective_batch):
            yield order[start : start + self.effective_batch][self.rank :: self.world]


class WindowLoader(DataLoader[Feature]):
    """A DataLoader that hands the epoch on to its windows, as the trainer's loop asks of it."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, Windows)
        self.batch_sampler.set_epoch(epoch)


def collator(collate: Callable[[list[Feature]], dict[str, Any]]) -> Callable[[list[Feature]], dict[str, Any]]:
    """Wraps the step's collator: keeps the rows' ids beside the tensors, and lets an empty share pass."""

    def with_ids(features: list[Feature]) -> dict[str, Any]:
        ids = [str(feature["id"]) for feature in features]
        return {**collate(features), "ids": ids} if features else {"ids": ids}

    return with_ids


def loader(
    rows: Sequence[Feature], windows: Windows, collate: Callable[[list[Feature]], dict[str, Any]], *, pin: bool
) -> WindowLoader:
    """The training loader. Its own generator keeps it from drawing on the RNG that dropout uses."""
    return WindowLoader(
        rows,  # type: ignore[arg-type]
        batch_sampler=windows,  # type: ignore[arg-type]
        collate_fn=collator(collate),
        pin_memory=pin,
        generator=torch.Generator().manual_seed(windows.seed),
    )
