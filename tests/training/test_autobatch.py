"""Choosing the micro-batch: the code that measures on a GPU, run on the CPU with a simulated memory.

The simulated card counts the tokens that are computed at once and runs out of memory, as an allocator does, beyond its
size; with checkpointing a token takes a quarter.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft.config.schema import TrainSection
from sft.errors import EnvironmentProblem
from sft.training import autobatch
from sft.training.autobatch import Measurement, MemoryProbe, choose, longest_batch
from tests.training import bench


class Card:
    """A gauge of a card of `total` bytes; a token takes 4 (1 with checkpointing)."""

    def __init__(self, model: Any, total: int) -> None:
        self.total, self.most, self.base, self.failures = total, 0, model.get_base_model(), 0
        self.base.get_input_embeddings().register_forward_hook(lambda _, args, __: self.allocate(args[0].numel()))

    def allocate(self, tokens: int) -> None:
        size = tokens * (1 if self.base.is_gradient_checkpointing else 4)
        if size > self.total:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        self.most = max(self.most, size)

    def start(self) -> None:
        self.most = 0

    def peak(self) -> int:
        return self.most


Make = Callable[..., tuple[MemoryProbe, Card, Any]]


@pytest.fixture
def make_probe(tiny_qwen2: Path, tmp_path: Path) -> Make:
    def make(total: int, **more: Any) -> tuple[MemoryProbe, Card, Any]:
        train = {"gradient_checkpointing": True, "effective_batch": 8}
        loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", train=train), rows=20)
        card = Card(loop.model, total)
        lengths = [len(row["input_ids"]) for row in loop.rows]
        probe = MemoryProbe(loop.model, loop.step, loop.rows, lengths, card, most_rows=8)
        return replace(probe, **more), card, loop

    return make


def test_it_measures_a_step_and_changes_nothing(make_probe: Make) -> None:
    probe, _, loop = make_probe(10**6)
    before, state = bench.trained(loop), torch.get_rng_state()
    best = probe.run()
    assert max(probe.lengths) <= best.tokens <= 8 * max(probe.lengths)
    assert 0 < best.peak_bytes <= 4 * best.tokens and best.tokens_per_second > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in bench.trained(loop).items())
    assert all(p.grad is None for p in loop.model.parameters())


def test_checkpointing_is_off_where_memory_suffices_without_it(make_probe: Make) -> None:
    large, card, _ = make_probe(10**6, fixed_tokens=160)
    assert large.run().checkpointing is False and not card.base.is_gradient_checkpointing
    longest = max(large.lengths)
    small, card, _ = make_probe(3 * longest)
    best = small.run()
    assert best.checkpointing is True and card.base.is_gradient_checkpointing and card.failures > 0
    assert longest <= best.tokens <= 3 * longest
    assert make_probe(10**6, checkpointing=True)[0].run().checkpointing is True


def test_one_row_that_does_not_fit_is_an_error_before_the_first_step(make_probe: Make) -> None:
    with pytest.raises(EnvironmentProblem, match=r"one row of .* does not fit") as caught:
        make_probe(5)[0].run()
    assert "max_seq_len" in str(caught.value)
    with pytest.raises(EnvironmentProblem, match="a micro-batch of 50 tokens does not fit"):
        make_probe(5, fixed_tokens=50)[0].run()


def test_a_configured_micro_batch_is_measured_as_it_is(make_probe: Make) -> None:
    best = make_probe(10**6, fixed_tokens=50, checkpointing=False)[0].run()
    assert (best.tokens, best.checkpointing) == (50, False)
    assert 0 < best.peak_bytes <= 4 * 50


def test_other_errors_are_raised(make_probe: Make) -> None:
    probe, card, _ = make_probe(10**6)

    def broken(tokens: int) -> None:
        raise RuntimeError("device-side assert")

    card.allocate = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="device-side"):
        probe.run()


@pytest.mark.parametrize("explicit", [{}, {"micro_batch_tokens": 64, "gradient_checkpointing": True}])
def test_a_resumed_run_uses_its_checkpoints_micro_batch_unless_the_config_has_one(
    tiny_qwen2: Path, tmp_path: Path, explicit: dict[str, Any]
) -> None:
    loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs/a", train=explicit))
    progress = {"asked_budget": [160, None, True], "checkpointing": False}
    (tmp_path / "trainer_state.json").write_text(json.dumps(progress), encoding="utf-8")
    config = bench.config(tiny_qwen2, tmp_path, train=explicit)
    job: Any = SimpleNamespace(
        config=config, unresolved=TrainSection(**explicit), device=SimpleNamespace(device="cuda")
    )
    step, settings = choose(job, loop.model, loop.step, tmp_path)
    assert step.micro_batch_tokens == settings["micro_batch_tokens"] == explicit.get("micro_batch_tokens", 160)
    base = loop.model.get_base_model()
    assert base.is_gradient_checkpointing == settings["gradient_checkpointing"] == bool(explicit)


def live_tensors() -> int:
    gc.collect()
    return sum(type(each) in (torch.Tensor, torch.UntypedStorage) for each in gc.get_objects())


def test_on_the_cpu_activations_take_at_most_half_of_the_free_memory(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs/a"))
    step, state = replace(loop.step, micro_batch_tokens=1024), torch.get_rng_state()

    def tokens(free_bytes: float) -> int:
        monkeypatch.setattr(autobatch, "memory", lambda: (free_bytes, free_bytes))
        return autobatch.cpu_tokens(loop.model, step, loop.rows[0])

    assert tokens(1e12) == 1024
    alive = live_tensors()
    tokens(1e12)
    assert live_tensors() == alive  # nothing of the measured graph stays
    enough = next(power for power in range(40) if tokens(2.0**power) == 1024)
    assert 10 < enough < 32  # bytes: what 1,024 tokens of two tiny layers store
    assert (tokens(2.0 ** (enough - 1)), tokens(2.0 ** (enough - 2)), tokens(0)) == (512, 256, 1)
    assert all(weight.grad is None for weight in loop.model.parameters()) and torch.equal(torch.get_rng_state(), state)


def test_the_longest_rows_make_the_batch() -> None:
    rows = [{"id": str(index)} for index in range(5)]
    batch = longest_batch(rows, [5, 9, 2, 9, 4], 24)
    assert [row["id"] for row in batch] == ["1", "3", "0"]
    assert longest_batch(rows, [5, 9, 2, 9, 4], 3) == [{"id": "1"}]


class Simulated(MemoryProbe):
    """Without a model: a row takes `a_row` bytes and a second, a micro-batch `overhead` seconds besides."""

    a_row, overhead = 1, 1.0

    def _measure(self, tokens: int, checkpointing: bool) -> Measurement | None:
        rows = tokens // self.lengths[0]
        self.tried = [*getattr(self, "tried", []), rows]
        if rows * self.a_row > self.gauge.total:
            return None
        return Measurement(tokens, checkpointing, rows * self.a_row, rows / (self.overhead + rows))


def simulated(total: int, *, length: int, most_rows: int, a_row: int = 1, overhead: float = 1e6) -> Simulated:
    model = torch.nn.Linear(1, 1)
    model.is_gradient_checkpointing = False  # type: ignore[assignment]
    step: Any = SimpleNamespace(device="cpu")
    probe = Simulated(model, step, [], [length], SimpleNamespace(total=total), most_rows, checkpointing=False)
    probe.a_row, probe.overhead = a_row, overhead
    return probe


def test_it_grows_until_speed_stops_growing() -> None:
    probe = simulated(10_000, length=10, most_rows=1000, overhead=1.0)
    assert probe.run().tokens == 160  # 32 rows would gain 3 %
    assert probe.tried == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(("length", "most_rows", "rows"), [(512, 1000, 8), (512, 3, 3), (9000, 16, 1)])
def test_it_stays_within_4096_tokens_and_the_step(length: int, most_rows: int, rows: int) -> None:
    assert simulated(10_000, length=length, most_rows=most_rows).run().tokens == rows * length


@pytest.mark.parametrize(("total", "rows"), [(10, 8), (19, 16), (16, 8)])
def test_it_doubles_while_the_margin_stays_free(total: int, rows: int) -> None:
    assert simulated(total, length=1, most_rows=10_000).run().tokens == rows


def test_one_row_that_fits_without_the_margin_is_used_and_one_that_does_not_is_an_error() -> None:
    assert simulated(100, a_row=95, length=512, most_rows=16).run().tokens == 512
    with pytest.raises(EnvironmentProblem, match="one row of 512 tokens does not fit"):
        simulated(100, a_row=101, length=512, most_rows=16).run()


def test_it_stops_growing_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 99.0])
    monkeypatch.setattr(autobatch.time, "monotonic", lambda: next(clock))
    probe = simulated(10_000, length=1, most_rows=1000)
    assert probe.run().tokens == 4 and probe.tried == [1, 2, 4]
