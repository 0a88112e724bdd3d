"""Choosing the micro-batch: the code that measures on a GPU, run on the CPU with a simulated memory.

The simulated card counts the tokens that are computed at once and runs out of memory, as an allocator does, beyond its
size; with checkpointing a token takes a quarter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft.config.schema import TrainSection
from sft.errors import EnvironmentProblem
from sft.training.autobatch import (
    DoesNotFitError,
    Measurement,
    MemoryProbe,
    Result,
    choose,
    is_checkpointing,
    longest_batch,
    search,
)
from tests.training import bench


class Card:
    """A gauge of a card of `total` bytes; a token takes 4 (1 with checkpointing, or without gradients)."""

    def __init__(self, model: Any, total: int) -> None:
        self.total, self.most, self.model, self.failures = total, 0, model, 0
        base = model.get_base_model()
        base.get_input_embeddings().register_forward_hook(lambda _, args, __: self.allocate(args[0].numel()))

    def allocate(self, tokens: int) -> None:
        cheap = is_checkpointing(self.model) or not torch.is_grad_enabled()
        size = tokens * (1 if cheap else 4)
        if size > self.total:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        self.most = max(self.most, size)

    def start(self) -> None:
        self.most = 0

    def peaks(self) -> tuple[int, int]:
        return self.most, self.most


Make = Callable[..., tuple[MemoryProbe, Card, Any]]


@pytest.fixture
def make_probe(tiny_qwen2: Path, tmp_path: Path) -> Make:
    def make(total: int, *, checkpointing: bool = True, **more: Any) -> tuple[MemoryProbe, Card, Any]:
        train = {"gradient_checkpointing": checkpointing, "effective_batch": 8}
        loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", train=train), rows=20)
        card = Card(loop.model, total)
        lengths = [len(row["input_ids"]) for row in loop.rows]
        probe = MemoryProbe(loop.model, loop.step, loop.rows, lengths, loop.validation, card, most_rows=8)
        return replace(probe, **more), card, loop

    return make


def test_it_runs_training_evaluation_answers_and_a_save_and_changes_nothing(make_probe: Make) -> None:
    calls: list[str] = []
    trial, _, loop = make_probe(10**6, answer=lambda: calls.append("answer"), save=lambda: calls.append("save"))
    before, state = bench.trained(loop), torch.get_rng_state()
    result = trial.run()
    assert list(result.peaks) == ["training", "evaluation", "generation", "save"]
    assert calls == ["answer", "save"]
    assert result.tokens % max(trial.lengths) == 0 and result.tokens_per_second > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in bench.trained(loop).items())
    assert all(p.grad is None for p in loop.model.parameters()) and loop.model.training
    cached = Result(**json.loads(json.dumps(asdict(result))))
    assert str(cached) == str(result) and cached.tokens == result.tokens


def test_checkpointing_is_off_where_memory_suffices_without_it(make_probe: Make) -> None:
    roomy, _, loop = make_probe(10**6)
    assert roomy.run().checkpointing is False
    assert not is_checkpointing(loop.model)
    longest = max(roomy.lengths)
    tight, card, loop = make_probe(3 * longest)
    result = tight.run()
    assert result.checkpointing is True and is_checkpointing(loop.model)
    assert card.failures > 0
    assert longest <= result.tokens <= 3 * longest
    configured, _, _ = make_probe(10**6, checkpointing_is_free=False)
    assert configured.run().checkpointing is True


def test_one_row_that_does_not_fit_is_an_error_before_the_first_step(make_probe: Make) -> None:
    with pytest.raises(DoesNotFitError, match=r"one row of .* does not fit") as caught:
        make_probe(5)[0].run()
    assert "max_seq_len" in str(caught.value)
    with pytest.raises(DoesNotFitError, match="a micro-batch of 50 tokens does not fit"):
        make_probe(5, fixed_tokens=50)[0].run()


def test_a_configured_micro_batch_is_measured_as_it_is(make_probe: Make) -> None:
    result = make_probe(10**6, fixed_tokens=50, checkpointing=False)[0].run()
    assert (result.tokens, result.checkpointing) == (50, False)
    assert 0 < result.peaks["training"][0] * 2**30 <= 4 * 50


def test_evaluation_that_runs_out_of_memory_is_lowered_and_stays_so(make_probe: Make) -> None:
    trial, card, _ = make_probe(10**6)
    allocate = card.allocate

    def narrow(tokens: int) -> None:
        if not torch.is_grad_enabled() and tokens > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        allocate(tokens)

    card.allocate = narrow  # type: ignore[method-assign]
    rows = [*trial.validation, *bench.features(12, seed=3)]
    result = replace(trial, validation=rows, fixed_tokens=120).run()
    assert result.eval_tokens is not None and result.eval_tokens <= 80


@pytest.mark.parametrize("explicit", [{}, {"micro_batch_tokens": 64, "gradient_checkpointing": True}])
def test_a_resumed_run_uses_its_checkpoints_micro_batch_unless_the_config_has_one(
    tiny_qwen2: Path, tmp_path: Path, explicit: dict[str, Any]
) -> None:
    loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs/a", train=explicit))
    session = {"asked_budget": [160, None, True], "checkpointing": False}
    (tmp_path / "session.json").write_text(json.dumps(session), encoding="utf-8")
    config = bench.config(tiny_qwen2, tmp_path, train=explicit)
    job: Any = SimpleNamespace(
        config=config, unresolved=TrainSection(**explicit), device=SimpleNamespace(device="cuda")
    )
    step, settings = choose(job, loop.model, loop.step, tmp_path, tmp_path, tmp_path, None)
    assert step.micro_batch_tokens == settings["micro_batch_tokens"] == explicit.get("micro_batch_tokens", 160)
    assert is_checkpointing(loop.model) == settings["gradient_checkpointing"] == bool(explicit)


def test_the_longest_rows_make_the_batch() -> None:
    rows = [{"id": str(index)} for index in range(5)]
    batch = longest_batch(rows, [5, 9, 2, 9, 4], 24)
    assert [row["id"] for row in batch] == ["1", "3", "0"]
    assert longest_batch(rows, [5, 9, 2, 9, 4], 3) == [{"id": "1"}]


def card(total: int, *, a_row: int = 1, overhead: float = 1.0) -> Callable[[int], Measurement]:
    """A card of `total` bytes; `overhead` seconds a micro-batch besides one a row. `tried`: the rows measured."""

    def measure(rows: int) -> Measurement:
        if rows * a_row > total:
            raise torch.OutOfMemoryError("CUDA out of memory")
        measure.tried.append(rows)  # type: ignore[attr-defined]
        return Measurement(rows, rows * a_row, overhead + rows)

    measure.tried = []  # type: ignore[attr-defined]
    return measure


def test_it_grows_until_speed_stops_growing() -> None:
    measure = card(10_000)
    best, memory_ended_growth = search(measure, length=10, most_rows=1000, total_bytes=10_000)
    assert (best.rows, memory_ended_growth) == (16, False)  # 32 would gain 3 %
    assert measure.tried == [1, 2, 4, 8, 16, 32]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("length", "most_rows", "rows"), [(512, 1000, 8), (512, 3, 3), (9000, 16, 1)])
def test_it_stays_within_4096_tokens_and_the_step(length: int, most_rows: int, rows: int) -> None:
    measure = card(10_000, overhead=1e6)
    assert search(measure, length=length, most_rows=most_rows, total_bytes=10_000)[0].rows == rows


@pytest.mark.parametrize("total", [10, 13, 16, 29, 40])
def test_it_comes_near_to_the_most_rows_that_leave_the_margin(total: int) -> None:
    best, _ = search(card(total, overhead=1e6), length=1, most_rows=10_000, total_bytes=total)
    assert 0.95 * 0.9 * total - 1 < best.rows <= 0.9 * total


def test_one_row_that_fits_without_the_margin_is_used_and_one_that_does_not_is_an_error() -> None:
    assert search(card(100, a_row=95), length=512, most_rows=16, total_bytes=100)[0].rows == 1
    with pytest.raises(EnvironmentProblem, match="one row of 512 tokens does not fit"):
        search(card(100, a_row=101), length=512, most_rows=16, total_bytes=100)


@pytest.mark.parametrize("total", [9, 19])
def test_growth_that_the_margin_ends_is_ended_by_memory(total: int) -> None:
    """Two rows of 9 bytes fit into 19, but leave no margin: with checkpointing more may fit."""
    best, memory_ended_growth = search(card(total, a_row=9, overhead=1e6), length=1, most_rows=8, total_bytes=total)
    assert (best.rows, memory_ended_growth) == (1, True)


def test_other_errors_are_raised() -> None:
    def broken(rows: int) -> Measurement:
        raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="device-side"):
        search(broken, length=1, most_rows=1, total_bytes=1)


def test_it_stops_growing_when_its_time_is_up() -> None:
    answers, measure = iter([True, True, False]), card(10_000, overhead=1e6)
    best, _ = search(measure, length=1, most_rows=1000, total_bytes=10_000, time_left=lambda: next(answers))
    assert measure.tried == [1, 2, 4] and best.rows == 4  # type: ignore[attr-defined]
