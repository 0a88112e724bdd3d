"""Optimizers and schedules: which weights Muon takes, their libraries' own steps, the rates of each schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sft.config.schema import TrainSection
from sft.errors import ConfigError
from sft.step.optimizer import averaged_weights, begin_training, create_optimizer, create_scheduler, end_training
from tests.step import models


def train(**settings: Any) -> TrainSection:
    return TrainSection(**{"learning_rate": 0.01, "weight_decay": 0.1, **settings})


def test_muon_takes_the_matrices_of_the_layers_and_adamw_all_else(tiny_qwen2: Path) -> None:
    model, reference = models.load(tiny_qwen2), models.load(tiny_qwen2)
    optimizer = create_optimizer(model, train(optim="muon"))
    names = {id(weight): name for name, weight in model.named_parameters()}
    of_muon = {names[id(w)] for group in optimizer.param_groups if group["matrices"] for w in group["params"]}
    matrices = {name for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name}
    assert of_muon == matrices and all("_proj" in name for name in matrices)
    weights = dict(reference.named_parameters())
    rest = {name: weight for name, weight in weights.items() if name not in matrices}
    whole = [weight for name, weight in rest.items() if "norm" in name or "bias" in name]  # not decayed
    others = [
        torch.optim.Muon([weights[name] for name in matrices], 0.01, 0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([weight for weight in rest.values() if weight.ndim == 2], 0.01, weight_decay=0.1),
        torch.optim.AdamW(whole, 0.01, weight_decay=0.0),
    ]
    for _ in range(2):
        for one, steps in ((model, [optimizer]), (reference, others)):
            one(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
            for each in steps:
                each.step()
            one.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())  # as a resume does
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())


def test_a_schedule_free_optimizer_shows_its_average_and_goes_on_with_the_same_bits(tiny_qwen2: Path) -> None:
    pytest.importorskip("schedulefree")
    model = models.load(tiny_qwen2, dtype=torch.float32)
    optimizer: Any = create_optimizer(
        model, train(optim="schedule_free_adamw", lr_scheduler_type="constant", weight_decay=0.0)
    )
    begin_training(optimizer)
    weight, steps = model.model.norm.weight, list[torch.Tensor]()
    for _ in range(3):
        model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
        optimizer.step()
        model.zero_grad()
        steps.append(optimizer.state[weight]["z"].clone())
    before = weight.detach().clone()
    with averaged_weights(optimizer):
        assert torch.allclose(weight, torch.stack(steps).mean(dim=0), atol=1e-6)  # of equal rates: the plain mean
    assert torch.equal(weight, before) and "trained" not in optimizer.state[weight]
    end_training(optimizer)
    assert torch.allclose(weight, torch.stack(steps).mean(dim=0), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1}, [0, 0.5, 1, 0.93971, 0.775, 0.55, 0.325, 0.16029]),
        ({"lr_scheduler_type": "warmup_stable_decay", "decay_ratio": 0.5}, [0, 0.5, 1, 1, 1, 0.5, 0.29289, 0.13397]),
        ({"lr_scheduler_type": "warmup_stable_decay", "min_lr_ratio": 0.5}, [0.5, 0.75, 1, 1, 1, 1, 1, 0.64645]),
    ],
)
def test_schedules(settings: dict[str, Any], expected: list[float]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    schedule, rates = create_scheduler(optimizer, train(**settings), 2, 8), list[float]()
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        schedule.step()
    assert rates == [pytest.approx(rate, abs=1e-5) for rate in expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "schedule_free_adamw"}, "needs no schedule, but lr_scheduler_type is cosine"),
        ({"min_lr_ratio": 0.1, "lr_scheduler_type": "linear"}, "min_lr_ratio is of cosine"),
        ({"decay_ratio": 0.1}, "decay_ratio is of warmup_stable_decay"),
        ({"objective": "dft", "label_smoothing": 0.1}, "objective is dft, which has no label_smoothing"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**settings)


def test_a_missing_library_is_named(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "schedulefree", None)
    settings = train(optim="schedule_free_adamw", lr_scheduler_type="constant")
    with pytest.raises(ConfigError, match="pip install schedulefree"):
        create_optimizer(models.load(tiny_qwen2), settings)
