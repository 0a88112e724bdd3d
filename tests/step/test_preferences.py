"""Losses of preference pairs equal formulas written out by hand, however a step is split, and TRL's trainers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch.nn.functional import logsigmoid

from sft.config.schema import PAIRED, PREFERENCES, WITH_REFERENCE, PreferenceSection
from sft.step import step
from sft.step.batch import Collator
from sft.step.preferences import MEASURES, means, reference
from sft.step.step import StepConfig, evaluate_loss, forward_backward
from tests.step import models

PAIRS = ((9, 7), (5, 12), (14, 4), (6, 6), (8, 3))  # tokens of the chosen and the rejected side
BETA, GAMMA = 0.3, 0.7
TRITON = "TRL 1.15 forms this loss in Triton: put trl 1.14.2 on PYTHONPATH (benchmarks/step_cpu.py)"
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def pairs(prompt: int = 2) -> list[dict[str, Any]]:
    """Pairs whose two sides begin with the same `prompt` tokens, which are not in the loss."""
    drawn = torch.Generator().manual_seed(1)
    rows = []
    for index, (first, second) in enumerate(PAIRS):
        sizes = (prompt, first - prompt, second - prompt)
        shared, *answers = (torch.randint(3, 250, (size,), generator=drawn).tolist() for size in sizes)
        sides = [(shared + answer, [-100] * prompt + answer) for answer in answers]
        ids, labels = (sides[0][part] + sides[1][part] for part in (0, 1))
        rows.append({"id": f"p{index}", "input_ids": ids, "labels": labels, "chosen": first})
    return rows


def adapted(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """A model with an adapter that changes it, so that it is not its own reference."""
    return randomised(get_peft_model(models.load(folder, dtype=dtype), LORA).to(dtype))


def randomised(model: Any) -> Any:
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora" in name:
            weight.data = torch.randn_like(weight) / 8
    return model


def by_hand(model: Any, objective: str) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """The mean loss of the pairs, its gradients and the first four measures, a sequence at a time from full logits."""
    total, measures = torch.zeros((), dtype=model.dtype), torch.zeros(4, dtype=torch.float64)

    def logp(ids: list[int]) -> torch.Tensor:
        scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        return torch.stack([scores[at - 1, ids[at]] for at in range(2, len(ids))])

    for pair in pairs():
        both = pair["input_ids"][: pair["chosen"]], pair["input_ids"][pair["chosen"] :]
        with torch.no_grad(), model.disable_adapter():
            base = [logp(ids).sum() for ids in both]
        policy = [logp(ids) for ids in both]
        ratio = [of_tokens.sum() - before for of_tokens, before in zip(policy, base, strict=True)]
        mean = [of_tokens.mean() for of_tokens in policy]
        rewards = [BETA * value for value in (mean if objective in ("orpo", "simpo") else ratio)]
        if objective == "dpo":
            loss = -logsigmoid(BETA * (ratio[0] - ratio[1]))
        elif objective == "ipo":
            loss = (ratio[0] / len(policy[0]) - ratio[1] / len(policy[1]) - 1 / (2 * BETA)) ** 2
        elif objective == "simpo":
            loss = -logsigmoid(BETA * (mean[0] - mean[1]) - GAMMA)
        else:
            odds = [value.exp() / (1 - value.exp()) for value in mean]
            loss = -mean[0] - BETA * logsigmoid(torch.log(odds[0] / odds[1]))
        total = total + loss / len(PAIRS)
        one, other = (float(reward.detach()) for reward in rewards)
        measures += torch.tensor([one, other, one - other, one > other], dtype=torch.float64) / len(PAIRS)
    total.backward()
    return total.detach(), models.gradients(model), measures.tolist()


def named(measures: torch.Tensor) -> list[float]:
    """Rewards of the chosen and the rejected answers, margin and accuracy."""
    values = means(measures.tolist())
    return [values[name] for name in MEASURES[:4]]


SPLITS = {
    "all packed": StepConfig(packed=True),
    "all padded": StepConfig(),
    "a pair at a time": StepConfig(max_rows=1, packed=True),
    "packed into 30": StepConfig(micro_batch_tokens=30, packed=True),
    "padded into 30": StepConfig(micro_batch_tokens=30),
    "tiles": StepConfig(logits_tile=16),
    "full logits": StepConfig(logits="full"),
}


@pytest.mark.parametrize("objective", PAIRED)
def test_any_split_gives_the_loss_and_gradients_of_the_formula(tiny_qwen2: Path, objective: str) -> None:
    model, batch = adapted(tiny_qwen2), Collator()(pairs())
    loss, gradient, expected = by_hand(model, objective)
    settings = {"objective": objective, "preference": PreferenceSection(beta=BETA, gamma=GAMMA)}
    for name, split in SPLITS.items():
        config = replace(split, **settings)  # type: ignore[arg-type]
        result = forward_backward(model, batch, config)
        assert float((result.loss - loss).detach().abs()) < 1e-12, name
        assert models.relative(models.gradients(model), gradient) < 1e-9, name
        assert named(result.measures) == pytest.approx(expected, abs=1e-9)
        evaluated = evaluate_loss(model, pairs(), config)
        assert (evaluated.count, evaluated.loss_sum / 5) == (5, pytest.approx(float(loss), abs=1e-12))
        assert named(evaluated.measures) == pytest.approx(expected, abs=1e-9)


def test_the_reference_of_a_prefix_is_the_base_without_it(tiny_qwen2: Path) -> None:
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(models.load(tiny_qwen2), prefix).double()
    ids = torch.arange(3, 20)[None]
    with reference(model):
        assert torch.equal(model(input_ids=ids).logits, models.load(tiny_qwen2)(input_ids=ids).logits)
    loss, gradient, expected = by_hand(model, "dpo")
    for split in (StepConfig(), StepConfig(max_rows=1)):  # rows with a prefix are padded
        config = replace(split, objective="dpo", preference=PreferenceSection(beta=BETA))
        result = forward_backward(model, Collator()(pairs()), config)
        assert float((result.loss - loss).detach().abs()) < 1e-12
        assert models.relative(models.gradients(model), gradient) < 1e-9
        assert named(result.measures) == pytest.approx(expected, abs=1e-9)


def test_a_step_that_runs_out_of_memory_is_replayed_without_parting_a_pair(
    tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = adapted(tiny_qwen2), Collator()(pairs())
    config = StepConfig(objective="dpo", packed=True, preference=PreferenceSection(beta=BETA))
    expected, gradient = forward_backward(model, batch, config).loss, models.gradients(model)
    computed, whole = [], step.pair_losses

    def limited(model: Any, micro: Any, *settings: Any) -> Any:
        if micro.computed > 40:
            raise torch.OutOfMemoryError("out of memory")
        computed.append(micro.rows)
        return whole(model, micro, *settings)

    monkeypatch.setattr(step, "pair_losses", limited)
    result = forward_backward(model, batch, config)
    assert float((result.loss - expected).abs()) < 1e-12
    assert models.relative(models.gradients(model), gradient) < 1e-9
    assert result.config.micro_batch_tokens < 40
    rows = [row for rows in computed[-len(computed) :] for row in rows]
    assert all(first % 2 == 0 and second == first + 1 for first, second in zip(rows[::2], rows[1::2], strict=True))


def test_the_reference_is_the_base_without_dropout_and_leaves_the_model_as_it_was(tiny_qwen2: Path) -> None:
    model = adapted(tiny_qwen2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    config = StepConfig(objective="dpo", packed=True, preference=PreferenceSection(beta=BETA))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()  # now the model is its own reference
    result = forward_backward(model, Collator()(pairs()), config)
    assert named(result.measures)[:3] == pytest.approx([0, 0, 0], abs=1e-12)
    assert model.training and all(module.training for module in model.modules())
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("lora" in name for name in trained)


def rated(prompt: int = 2) -> list[dict[str, Any]]:
    """Rated answers, each with another row's answer to its prompt behind it."""
    rows, ratings = pairs(prompt), (1, -1, -1, 1, 1)
    answers = [row["input_ids"][prompt : row["chosen"]] for row in rows]
    mixed = [row["input_ids"][:prompt] + answers[at - 1] for at, row in enumerate(rows)]
    return [
        {
            "id": row["id"],
            "input_ids": row["input_ids"][: row["chosen"]] + other,
            "labels": row["labels"][: row["chosen"]] + [-100] * prompt + other[prompt:],
            "chosen": row["chosen"],
            "rating": rating,
        }
        for row, other, rating in zip(rows, mixed, ratings, strict=True)
    ]


KTO = PreferenceSection(beta=BETA, desirable_weight=1.5, undesirable_weight=0.5)


def test_rated_answers_give_the_loss_of_kto_by_hand_in_any_split(
    tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "EVALUATED_TOGETHER", 2)  # the drift is that of all five rows nevertheless
    model = adapted(tiny_qwen2)

    def logp(ids: list[int]) -> torch.Tensor:
        scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        return torch.stack([scores[at - 1, ids[at]] for at in range(2, len(ids))]).sum()

    def ratio(ids: list[int]) -> torch.Tensor:
        with torch.no_grad(), model.disable_adapter():
            before = logp(ids)
        return logp(ids) - before

    with torch.no_grad():
        drift = torch.stack([ratio(row["input_ids"][row["chosen"] :]) for row in rated()]).mean().clamp(min=0)
    assert drift > 0
    loss = torch.zeros((), dtype=torch.float64)
    for row in rated():
        distance = BETA * row["rating"] * (ratio(row["input_ids"][: row["chosen"]]) - drift)
        loss = loss + (1.5 if row["rating"] > 0 else 0.5) * (1 - torch.sigmoid(distance)) / 5
    loss.backward()
    gradient, batch = models.gradients(model), Collator()(rated())
    for name, split in SPLITS.items():
        config = replace(split, objective="kto", preference=KTO)
        result = forward_backward(model, batch, config)
        assert float((result.loss - loss).detach().abs()) < 1e-12, name
        assert models.relative(models.gradients(model), gradient) < 1e-9, name
        evaluated = evaluate_loss(model, rated(), config)
        assert (evaluated.count, evaluated.loss_sum / 5) == (5, pytest.approx(float(loss), abs=1e-12))
        assert named(evaluated.measures) == pytest.approx(named(result.measures), abs=1e-9)


def trainer_of_trl(objective: str, folder: Path, tmp_path: Path) -> Any:
    """TRL's trainer for the objective, with a new adapter on the same model."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    from transformers import AutoTokenizer

    if objective in WITH_REFERENCE and not torch.cuda.is_available() and trl.__version__ >= "1.15":
        pytest.skip(TRITON)
    if objective == "kto":
        more = {"desirable_weight": KTO.desirable_weight, "undesirable_weight": KTO.undesirable_weight}
        trainer, config = trl.KTOTrainer, trl.KTOConfig
    elif objective in ("dpo", "ipo"):
        trainer, config, more = (
            trl.DPOTrainer,
            trl.DPOConfig,
            {"loss_type": ["sigmoid" if objective == "dpo" else "ipo"]},
        )
    elif objective == "orpo":
        from trl.experimental import orpo

        trainer, config, more = orpo.ORPOTrainer, orpo.ORPOConfig, {}
    else:
        from trl.experimental import cpo

        more = {"loss_type": "simpo", "simpo_gamma": GAMMA, "cpo_alpha": 0.0}
        trainer, config = cpo.CPOTrainer, cpo.CPOConfig
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return trainer(
        model=models.load(folder, dtype=torch.float32),
        args=config(
            output_dir=str(tmp_path),
            beta=BETA,
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
            **more,
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
            if objective == "kto"
            else [{"prompt": "a", "chosen": "b", "rejected": "c"}]
        ),
        processing_class=tokenizer,
        peft_config=LORA,
    )


def batch_of_trl(objective: str, trainer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    if objective == "kto":
        features = [
            {
                "prompt_ids": row["input_ids"][:1],
                "completion_ids": row["input_ids"][1 : row["chosen"]],
                "KL_completion_ids": row["input_ids"][row["chosen"] + 1 :],
                "label": row["rating"] > 0,
            }
            for row in rows
        ]
        return dict(trainer.data_collator(features))
    sides = [(row["input_ids"][: row["chosen"]], row["input_ids"][row["chosen"] :]) for row in rows]
    if objective in ("dpo", "ipo"):
        features = [{"prompt_ids": a[:1], "chosen_ids": a[1:], "rejected_ids": b[1:]} for a, b in sides]
        return dict(trainer.data_collator(features))
    ((chosen, rejected),) = sides
    batch = {}
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        batch[f"{name}_input_ids"] = torch.tensor([ids])
        batch[f"{name}_attention_mask"] = torch.ones_like(batch[f"{name}_input_ids"])
        batch[f"{name}_labels"] = torch.tensor([[-100, *ids[1:]]])
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("objective", PREFERENCES)
def test_losses_gradients_and_rewards_are_those_of_trl(tiny_qwen2: Path, objective: str, tmp_path: Path) -> None:
    """Prompts of one token, and for ORPO and SimPO a pair a batch: TRL's ORPO takes its first term over the prompt too,
    and over all pairs of a batch together.
    """
    trainer = trainer_of_trl(objective, tiny_qwen2, tmp_path)
    rows = rated(prompt=1) if objective == "kto" else pairs(prompt=1)
    model = randomised(trainer.model)
    groups = [rows] if objective in WITH_REFERENCE else [[row] for row in rows]
    names = [name for name in MEASURES[:4] if objective != "kto" or name != "rewards/accuracies"]
    total, rewards = torch.zeros(()), torch.zeros(len(names))
    for group in groups:
        loss = trainer.compute_loss(model, batch_of_trl(objective, trainer, group)) / len(groups)
        loss.backward()
        total += loss.detach()
        stored = trainer._metrics["train"] if objective in WITH_REFERENCE else trainer._stored_metrics["train"]
        rewards += torch.tensor([float(stored[name][-1]) for name in names]) / len(groups)
    expected = models.gradients(model)
    preference = KTO if objective == "kto" else PreferenceSection(beta=BETA, gamma=GAMMA)
    config = StepConfig(objective=objective, preference=preference)  # type: ignore[arg-type]
    result = forward_backward(model, Collator()(rows), config)
    assert float((result.loss - total).abs() / total.abs()) < 1e-5
    assert models.relative(models.gradients(model), expected) < 1e-5
    measured = means(result.measures.tolist())
    assert [measured[name] for name in names] == pytest.approx(rewards.tolist(), rel=1e-4, abs=1e-6)
