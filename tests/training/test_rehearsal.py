"""The rehearsal on the CPU: the very code that runs on a GPU, against a card whose memory is made up.

The card counts tokens that are computed at once and runs out, as an allocator does, beyond what it holds; with
checkpointing a token takes a quarter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.memory.probe import DoesNotFitError
from sft.training import rehearsal
from sft.training.rehearsal import Rehearsed, Scene
from tests.training import bench


class Card:
    """`holds` bytes; a token takes 4 (1 with checkpointing, or without gradients)."""

    def __init__(self, model: Any, holds: int) -> None:
        self.total, self.most, self.model, self.failures = holds, 0, model, 0
        base = model.get_base_model()
        base.get_input_embeddings().register_forward_hook(lambda _, args, __: self.see(args[0].numel()))

    def see(self, tokens: int) -> None:
        cheap = rehearsal.is_checkpointing(self.model) or not torch.is_grad_enabled()
        size = tokens * (1 if cheap else 4)
        if size > self.total:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        self.most = max(self.most, size)

    def start(self) -> None:
        self.most = 0

    def peaks(self) -> tuple[int, int]:
        return self.most, self.most


Make = Callable[..., tuple[Scene, Card, Any]]


@pytest.fixture
def scene(tiny_qwen2: Path, tmp_path: Path) -> Make:
    def make(holds: int, *, checkpointing: bool = True, **more: Any) -> tuple[Scene, Card, Any]:
        train = {"gradient_checkpointing": checkpointing, "effective_batch": 8}
        trainer = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", train=train), rows=20)
        card = Card(trainer.model, holds)
        lengths = [len(row["input_ids"]) for row in trainer.rows]
        made = Scene(trainer.model, trainer.step_config, trainer.rows, lengths, trainer.validation, 8, card)
        return replace(made, **more), card, trainer

    return make


def test_it_goes_through_training_evaluation_answers_and_a_save_and_leaves_no_trace(scene: Make) -> None:
    done: list[str] = []
    made, _, trainer = scene(10**6, answer=lambda: done.append("answer"), save=lambda: done.append("save"))
    before, state = bench.trained(trainer), torch.get_rng_state()
    found = rehearsal.rehearse(made)
    assert [stage.name for stage in found.stages] == ["training", "evaluation", "generation", "save"]
    assert done == ["answer", "save"]
    assert found.tokens % max(made.lengths) == 0 and found.tokens_per_second > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in bench.trained(trainer).items())
    assert all(p.grad is None for p in trainer.model.parameters()) and trainer.model.training
    assert Rehearsed.from_json(found.to_json()) == found
    assert made.step_config.micro_batch_tokens == found.tokens


def test_checkpointing_is_left_off_where_memory_allows_and_on_where_it_does_not(scene: Make) -> None:
    roomy, _, trainer = scene(10**6)
    assert rehearsal.rehearse(roomy).checkpointing is False
    assert not rehearsal.is_checkpointing(trainer.model)
    longest = max(roomy.lengths)
    tight, card, trainer = scene(3 * longest)
    found = rehearsal.rehearse(tight)
    assert found.checkpointing is True and rehearsal.is_checkpointing(trainer.model)
    assert card.failures > 0
    assert longest <= found.tokens <= 3 * longest
    asked, _, _ = scene(10**6, free=False)
    assert rehearsal.rehearse(asked).checkpointing is True


def test_one_row_that_does_not_fit_is_said_before_the_first_step(scene: Make) -> None:
    made, _, _ = scene(5)
    with pytest.raises(DoesNotFitError, match=r"one row of .* does not fit") as caught:
        rehearsal.rehearse(made)
    assert "max_seq_len" in str(caught.value)


def test_a_micro_batch_that_is_given_is_measured_as_it_is(scene: Make) -> None:
    made, _, _ = scene(10**6, fixed=50, checkpointing=False)
    found = rehearsal.rehearse(made)
    assert (found.tokens, found.checkpointing) == (50, False)
    assert 0 < found.stages[0].allocated_bytes <= 4 * 50


def test_evaluation_that_runs_out_is_lowered_and_stays_so(scene: Make) -> None:
    made, card, _ = scene(10**6)
    rows = [*made.validation, *bench.features(12, seed=3)]
    see = card.see

    def narrow(tokens: int) -> None:
        if not torch.is_grad_enabled() and tokens > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        see(tokens)

    card.see = narrow  # type: ignore[method-assign]
    found = rehearsal.rehearse(replace(made, validation=rows, fixed=120))
    assert found.evaluating is not None and found.evaluating <= 80


def test_the_longest_rows_make_the_batch() -> None:
    rows = [{"id": str(index)} for index in range(5)]
    taken = rehearsal.longest_batch(rows, [5, 9, 2, 9, 4], 24)
    assert [row["id"] for row in taken] == ["1", "3", "0"]
    assert rehearsal.longest_batch(rows, [5, 9, 2, 9, 4], 3) == [{"id": "1"}]
