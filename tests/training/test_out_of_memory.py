"""Memory runs out once at every stage of a run: it goes on, and nothing but the budget is another than it would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, TrainerCallback

from sft.config.schema import GenerationSection
from sft.errors import EnvironmentProblem
from sft.generation import engine
from sft.step.step import CarefulOptimizer
from sft.training import checkpoint
from tests.generation.test_stop import Stops
from tests.training import bench

STEPS = 6
LORA = {"mode": "lora", "lora": {"dropout": 0.0}}
TRAIN = {"max_steps": STEPS, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_strategy": "steps"}


class Once:
    """Fails the first time that it is called when armed, as the allocator does."""

    def __init__(self) -> None:
        self.armed, self.failures = False, 0

    def __call__(self, *_: Any, **__: Any) -> None:
        if self.armed and not self.failures:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


class Rows(TrainerCallback):
    """Which rows each step took; arms the fault at the step it is meant for."""

    def __init__(self, fault: Once, at: int) -> None:
        self.fault, self.at, self.taken = fault, at, list[list[str]]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.fault.armed = state.global_step + 1 >= self.at

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.taken.append(list(self.trainer._last_ids))


def _layer(trainer: bench.WindowTrainer) -> Any:
    return trainer.model.get_base_model().model.layers[1]


def _forward(trainer: bench.WindowTrainer, fault: Once, _: Any) -> None:
    _layer(trainer).register_forward_hook(lambda *_: fault() if torch.is_grad_enabled() else None)


def _backward(trainer: bench.WindowTrainer, fault: Once, _: Any) -> None:
    _layer(trainer).register_full_backward_hook(fault)


def _optimizer(trainer: bench.WindowTrainer, fault: Once, patch: pytest.MonkeyPatch) -> None:
    """The state of the first few weights is there, that of the next one finds no memory."""
    real, calls = torch.zeros_like, []

    def zeros_like(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 5:
            fault()
        return real(*args, **kwargs)

    patch.setattr(torch, "zeros_like", zeros_like)


def _evaluation(trainer: bench.WindowTrainer, fault: Once, _: Any) -> None:
    _layer(trainer).register_forward_hook(lambda *_: None if torch.is_grad_enabled() else fault())


def _generation(trainer: bench.WindowTrainer, fault: Once, _: Any) -> None:
    """In the middle of an answer: a single token goes in, the rest is in the cache."""
    _layer(trainer).register_forward_hook(lambda _, args, __: fault() if args[0].shape[1] == 1 else None)


def _saving(trainer: bench.WindowTrainer, fault: Once, patch: pytest.MonkeyPatch) -> None:
    real = checkpoint.save_weights

    def save(model: Any, folder: Path) -> None:
        real(model, folder)
        fault()

    patch.setattr(checkpoint, "save_weights", save)


Inject = Callable[[bench.WindowTrainer, Once, pytest.MonkeyPatch], None]
STAGES: dict[str, tuple[Inject, int]] = {
    "forward": (_forward, 2),
    "backward": (_backward, 3),
    "optimizer": (_optimizer, 1),
    "evaluation": (_evaluation, 1),
    "generation": (_generation, 1),
    "saving": (_saving, 1),
}


def _answers(model: Any, folder: Path) -> dict[str, float]:
    """Three answers as one number, so that they can be compared in the log."""
    prompts, settings = [[20, 21, 22], [23, 24], [30, 31, 32, 33]], GenerationSection(max_new_tokens=5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = engine.generate(model, tokenizer, prompts, settings, Stops(), batch_size=3)
    ids = [token for answer in made for token in answer.ids]
    return {"answers": float(sum(place * token for place, token in enumerate(ids, 1)))}


def _run(folder: Path, out: Path, inject: Inject | None, at: int) -> tuple[bench.WindowTrainer, Rows, Once]:
    fault = Once()
    rows = Rows(fault, at)
    trainer = bench.trainer(bench.config(folder, out, tuning=LORA, train=TRAIN), callbacks=[rows])
    rows.trainer = trainer
    trainer.answers = lambda model: _answers(model, folder)
    trainer.model.double()  # AdamW turns rounding of a gradient near zero into a full step
    with pytest.MonkeyPatch.context() as patch:
        if inject is not None:
            inject(trainer, fault, patch)
        trainer.fit(None)
    return trainer, rows, fault


def _losses(trainer: bench.WindowTrainer) -> list[float]:
    history = trainer.state.log_history
    return [
        entry[key] for key in ("loss", "eval_loss", "grad_norm", "eval_answers") for entry in history if key in entry
    ]


@pytest.fixture(scope="module")
def clean(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[bench.WindowTrainer, Rows]]:
    trainer, rows, _ = _run(tiny_qwen2, tmp_path_factory.mktemp("clean") / "outputs" / "a", None, 1)
    yield trainer, rows


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_as_if_memory_had_not_run_out(
    stage: str,
    tiny_qwen2: Path,
    tmp_path: Path,
    clean: tuple[bench.WindowTrainer, Rows],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected, expected_rows = clean
    inject, at = STAGES[stage]
    trainer, rows, fault = _run(tiny_qwen2, tmp_path / "outputs" / "a", inject, at)
    assert fault.failures == 1
    assert "out of memory" in caplog.text or "memory ran out" in caplog.text
    assert rows.taken == expected_rows.taken and len(rows.taken) == STEPS
    found = _losses(trainer)
    assert len(found) == 2 * STEPS + 6
    assert found == pytest.approx(_losses(expected), abs=1e-6)
    for name, weight in bench.trained(trainer).items():
        assert torch.allclose(weight, bench.trained(expected)[name], rtol=0, atol=1e-8), name
    session = checkpoint.read_state(trainer.keeper.run.checkpoints()[-1], checkpoint.SESSION)
    assert session["budget"] == trainer.step_config.budget
    lowered = trainer.step_config.micro_batch_tokens < expected.step_config.micro_batch_tokens
    assert lowered == (stage in ("forward", "backward", "optimizer"))
    assert (session["evaluating"] is not None) == (stage == "evaluation")
    if lowered:
        assert str(trainer.step_config.micro_batch_tokens) in caplog.text
    assert (
        session["tokens"] == checkpoint.read_state(expected.keeper.run.checkpoints()[-1], checkpoint.SESSION)["tokens"]
    )


def test_a_run_that_is_taken_up_keeps_the_budget_that_fitted(tiny_qwen2: Path, tmp_path: Path) -> None:
    trainer, _, _ = _run(tiny_qwen2, tmp_path / "outputs" / "a", _forward, 2)
    again = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", tuning=LORA, train=TRAIN))
    asked = again.step_config.micro_batch_tokens
    again.fit(trainer.keeper.run.checkpoints()[-1])
    assert again.step_config.micro_batch_tokens == trainer.step_config.micro_batch_tokens < asked


def _stepped(optimizer: Any, weight: torch.nn.Parameter, times: int) -> torch.Tensor:
    for index in range(times):
        weight.grad = torch.full_like(weight, 0.5 + index)
        optimizer.step()
    return weight.detach().clone()


@pytest.mark.parametrize("how", [{}, {"fused": True}, {"foreach": False}])
def test_a_later_step_is_taken_again_only_where_nothing_was_changed(how: dict[str, bool]) -> None:
    def weight() -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))

    plain, fault, retries = weight(), Once(), []
    expected = _stepped(torch.optim.AdamW([plain], lr=0.1, **how), plain, 3)
    ours = weight()
    inner = torch.optim.AdamW([ours], lr=0.1, **how)
    careful = CarefulOptimizer(inner, lambda: retries.append(1))
    _stepped(careful, ours, 2)
    inner.register_step_pre_hook(fault)
    fault.armed = True
    ours.grad = torch.full_like(ours, 2.5)
    careful.step()
    assert (fault.failures, retries) == (1, [1])
    assert torch.equal(ours, expected)

    late = Once()
    late.armed = True
    inner.register_step_post_hook(late)
    with pytest.raises(EnvironmentProblem, match="in the middle of the optimizer's step") as caught:
        careful.step()
    assert "checkpoint" in str(caught.value)
