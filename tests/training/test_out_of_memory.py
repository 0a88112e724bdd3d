"""Memory runs out once at every stage of a run: the run continues, and only its token budget changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sft.config.schema import GenerationSection
from sft.errors import EnvironmentProblem
from sft.step.step import optimizer_step
from sft.training import checkpoint
from tests.generation.test_stop import Stops, answering
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


def watch_steps(loop: bench.TrainingLoop, fault: Once, at: int) -> list[list[str]]:
    """Arms the fault at step `at`; returns the list that gets the row ids of each step."""
    taken, train_step = list[list[str]](), loop.train_step

    def watched(batch: dict[str, Any]) -> tuple[float, float]:
        fault.armed = loop.progress.global_step + 1 >= at
        taken.append(list(batch["ids"]))
        return train_step(batch)

    loop.train_step = watched  # type: ignore[method-assign]
    return taken


def _layer(loop: bench.TrainingLoop) -> Any:
    return loop.model.get_base_model().model.layers[1]


def _forward(loop: bench.TrainingLoop, fault: Once, _: Any) -> None:
    _layer(loop).register_forward_hook(lambda *_: fault() if torch.is_grad_enabled() else None)


def _backward(loop: bench.TrainingLoop, fault: Once, _: Any) -> None:
    _layer(loop).register_full_backward_hook(fault)


def _optimizer(loop: bench.TrainingLoop, fault: Once, patch: pytest.MonkeyPatch) -> None:
    """The optimizer state of the first few weights is allocated; that of the next one runs out of memory."""
    real, calls = torch.zeros_like, []

    def zeros_like(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 5:
            fault()
        return real(*args, **kwargs)

    patch.setattr(torch, "zeros_like", zeros_like)


def _evaluation(loop: bench.TrainingLoop, fault: Once, _: Any) -> None:
    _layer(loop).register_forward_hook(lambda *_: None if torch.is_grad_enabled() else fault())


def _generation(loop: bench.TrainingLoop, fault: Once, _: Any) -> None:
    """In the middle of an answer: a single token goes in, the rest is in the cache."""
    _layer(loop).register_forward_hook(lambda _, args, __: fault() if args[0].shape[1] == 1 else None)


def _saving(loop: bench.TrainingLoop, fault: Once, patch: pytest.MonkeyPatch) -> None:
    real = checkpoint.save_weights

    def save(model: Any, folder: Path, state: Any) -> None:
        real(model, folder, state)
        fault()

    patch.setattr(checkpoint, "save_weights", save)


Inject = Callable[[bench.TrainingLoop, Once, pytest.MonkeyPatch], None]
STAGES: dict[str, tuple[Inject, int]] = {
    "forward": (_forward, 2),
    "backward": (_backward, 3),
    "optimizer": (_optimizer, 1),
    "evaluation": (_evaluation, 1),
    "generation": (_generation, 1),
    "saving": (_saving, 1),
}


def _answers(model: Any, folder: Path) -> tuple[dict[str, float], str]:
    """Three answers as one number, so that they can be compared in the log."""
    prompts, settings = [[20, 21, 22], [23, 24], [30, 31, 32, 33]], GenerationSection(max_new_tokens=5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = answering(model, tokenizer, Stops()).generate(prompts, settings, 3)
    ids = [token for answer in answers for token in answer.ids]
    return {"answers": float(sum(place * token for place, token in enumerate(ids, 1)))}, ""


def _run(folder: Path, out: Path, inject: Inject | None, at: int) -> tuple[bench.TrainingLoop, list[list[str]], Once]:
    fault = Once()
    settings = bench.config(folder, out, tuning=LORA, train=TRAIN)
    loop = bench.make_loop(settings, answer=lambda model: _answers(model, folder))
    loop.model.double()  # AdamW turns rounding of a gradient near zero into a full step
    taken = watch_steps(loop, fault, at)
    with pytest.MonkeyPatch.context() as patch:
        if inject is not None:
            inject(loop, fault, patch)
        loop.fit()
    return loop, taken, fault


def _losses(loop: bench.TrainingLoop) -> list[float]:
    history = loop.progress.log_history
    return [
        entry[key] for key in ("loss", "eval_loss", "grad_norm", "eval_answers") for entry in history if key in entry
    ]


@pytest.fixture(scope="module")
def clean(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bench.TrainingLoop, list[list[str]]]:
    loop, rows, _ = _run(tiny_qwen2, tmp_path_factory.mktemp("clean") / "outputs" / "a", None, 1)
    return loop, rows


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_continues_as_if_memory_had_not_run_out(
    stage: str,
    tiny_qwen2: Path,
    tmp_path: Path,
    clean: tuple[bench.TrainingLoop, list[list[str]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected, expected_rows = clean
    inject, at = STAGES[stage]
    loop, rows, fault = _run(tiny_qwen2, tmp_path / "outputs" / "a", inject, at)
    assert fault.failures == 1
    assert "out of memory" in caplog.text or "memory ran out" in caplog.text
    assert rows == expected_rows and len(rows) == STEPS
    losses = _losses(loop)
    assert len(losses) == 2 * STEPS + 6
    assert losses == pytest.approx(_losses(expected), abs=1e-6)
    for name, weight in bench.trained(loop).items():
        assert torch.allclose(weight, bench.trained(expected)[name], rtol=0, atol=1e-8), name
    saved = checkpoint.Progress.read(loop.checkpoints.run.checkpoints()[-1])
    assert saved.budget == loop.step.budget
    lowered = loop.step.micro_batch_tokens < expected.step.micro_batch_tokens
    assert lowered == (stage in ("forward", "backward", "optimizer"))
    assert (saved.evaluating is not None) == (stage == "evaluation")
    if lowered:
        assert str(loop.step.micro_batch_tokens) in caplog.text
    assert saved.tokens == checkpoint.Progress.read(expected.checkpoints.run.checkpoints()[-1]).tokens


def test_a_resumed_run_keeps_the_budget_that_fitted(tiny_qwen2: Path, tmp_path: Path) -> None:
    loop, _, _ = _run(tiny_qwen2, tmp_path / "outputs" / "a", _forward, 2)
    again = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", tuning=LORA, train=TRAIN))
    before = again.step.micro_batch_tokens
    again.fit(loop.checkpoints.run.checkpoints()[-1])
    assert again.step.micro_batch_tokens == loop.step.micro_batch_tokens < before


def _stepped(optimizer: Any, weight: torch.nn.Parameter, times: int) -> torch.Tensor:
    for index in range(times):
        weight.grad = torch.full_like(weight, 0.5 + index)
        optimizer.step()
    return weight.detach().clone()


def test_memory_that_runs_out_in_a_later_optimizer_step_ends_the_run_with_its_fix() -> None:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    optimizer, fault = torch.optim.AdamW([weight], lr=0.1), Once()
    _stepped(optimizer, weight, 2)
    optimizer.register_step_post_hook(fault)
    fault.armed = True
    weight.grad = torch.full_like(weight, 2.5)
    with pytest.raises(EnvironmentProblem, match="optimizer's step") as caught:
        optimizer_step(optimizer, lambda: pytest.fail("it was retried"))
    assert "checkpoint" in str(caught.value)
