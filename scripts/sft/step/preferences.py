"""Preference objectives: one loss for each pair of rows that belong together, chosen by `train.objective`.

dpo, ipo, orpo, simpo: a chosen and a rejected answer to one prompt. kto: an answer that is rated good or bad, and a row
of the same prompt with another row's answer, by which the drift from the reference is estimated. All are functions of
the rows' log-probabilities, which come from the tiled head like any loss; the reference is the base with its adapter
off, computed first and without gradients. So a step needs no more memory than SFT on the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from sft.config.schema import WITH_REFERENCE
from sft.model.adapters import without_adapter
from sft.step.batch import Batch, MicroBatch, other_answers, split_micro_batches
from sft.step.objectives import response

if TYPE_CHECKING:
    from sft.step.step import StepConfig

PreferenceName = Literal["dpo", "ipo", "orpo", "simpo", "kto"]
MEASURES = (  # TRL's names; logps: sums over an answer's tokens, for orpo and simpo means; rewards: beta times them
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip
SUMS = 8  # rewards of chosen and rejected answers, comparisons that are right, logps of both, how many of both, of all


class PairLosses(NamedTuple):
    """losses: of each comparison, [P] in fp32 (or the model's fp64). measures: detached, [P, SUMS], for `means`."""

    losses: Tensor
    measures: Tensor


def means(measures: Sequence[float]) -> dict[str, float]:
    """`MEASURES` by name, of sums over any number of comparisons; without what no answer was rated as."""
    chosen, rejected, right, logp, other_logp, good, bad, count = measures
    values = {"rewards/accuracies": right / count} if count else {}
    if good:
        values |= {"rewards/chosen": chosen / good, "logps/chosen": logp / good}
    if bad:
        values |= {"rewards/rejected": rejected / bad, "logps/rejected": other_logp / bad}
    if good and bad:
        values["rewards/margins"] = chosen / good - rejected / bad
    return values


def pair_losses(model: nn.Module, micro: MicroBatch, config: StepConfig, drift: Tensor | float = 0.0) -> PairLosses:
    """The losses of a micro-batch of pairs, or of rated answers. drift: `drift_sum` over the step's rows, their mean.

    dpo: Rafailov et al. 2023, eq. 7. ipo: Azar et al. 2024, eq. 17, of means over tokens, as its authors use it. orpo:
    Hong et al. 2024, eq. 6; both of its terms are of the answers alone. simpo: Meng et al. 2024, eq. 6. kto: Ethayarajh
    et al. 2024, eq. 8.
    """
    beta, counts = float(config.preference.beta), torch.tensor(micro.counts, device=micro.targets.device)
    if config.objective in WITH_REFERENCE:
        with reference(model):
            before = log_probs(model, micro, config)
        sums = log_probs(model, micro, config)
        ratios = sums - before
        if config.objective == "kto":
            return _rated_losses(ratios, sums, micro, config, drift)
        if config.objective == "dpo":
            losses = -logsigmoid(beta * _difference(ratios))
        else:
            losses = (_difference(ratios / counts) - 1 / (2 * beta)) ** 2
        return _measured(losses, beta * ratios, sums)
    mean = log_probs(model, micro, config) / counts
    if config.objective == "orpo":
        losses = -mean[::2] - beta * logsigmoid(_difference(mean - _log1mexp(mean)))
    else:
        losses = -logsigmoid(beta * _difference(mean) - float(config.preference.gamma))
    return _measured(losses, beta * mean, mean)


def log_probs(model: nn.Module, micro: MicroBatch, config: StepConfig) -> Tensor:
    """The log-probability of each row's labelled tokens together, [rows]."""
    losses = response(model, micro, replace(config, label_smoothing=0.0, z_loss=0.0))
    return -torch.stack([row.sum() for row in torch.split(losses, list(micro.counts))])


def drift_sum(model: nn.Module, batch: Batch, config: StepConfig) -> Tensor:
    """How much more likely the model finds the other answers of a batch of rated ones than the base does: the sum of
    the log-ratios. Without gradients and dropout.
    """
    others, total = other_answers(batch), torch.zeros((), device=config.device)
    settings = {"tokens": config.micro_batch_tokens, "rows": config.max_rows, "packed": config.packed}
    micros = split_micro_batches(others, **settings, counted=True) if others else []  # type: ignore[arg-type]
    for micro in config.in_lockstep(micros):
        with config.forward_context():
            with reference(model):
                before = log_probs(model, micro, config)
            with frozen(model):
                ratios = log_probs(model, micro, config) - before
            if micro.rows:
                total = total + ratios.sum()
    return total


@contextmanager
def reference(model: nn.Module) -> Iterator[None]:
    """The model that training began from: the base with its adapter off, without dropout and gradients."""
    adapted: Any = model
    while not hasattr(adapted, "disable_adapter"):
        adapted = adapted.module
    with frozen(model), without_adapter(adapted):
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model without dropout and gradients."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:  # 4-bit layers stay in training mode: on a CPU evaluation repacks them for good
        module.training = hasattr(module, "quant_state")
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _difference(values: Tensor) -> Tensor:
    """Chosen minus rejected, [2 P] to [P]."""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen - rejected


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, stable near 0 and far from it."""
    near = torch.log(-torch.expm1(values.clamp(min=-1)))
    return torch.where(values < -0.6931471805599453, torch.log1p(-torch.exp(values)), near)


def _rated_losses(
    ratios: Tensor, logps: Tensor, micro: MicroBatch, config: StepConfig, drift: Tensor | float
) -> PairLosses:
    settings, beta = config.preference, float(config.preference.beta)
    ratings = torch.tensor(micro.ratings, device=ratios.device, dtype=ratios.dtype)
    good, bad = (ratings > 0).to(ratios.dtype), (ratings < 0).to(ratios.dtype)
    distance = ratings * (ratios - drift)
    losses = (settings.desirable_weight * good + settings.undesirable_weight * bad) * torch.sigmoid(-beta * distance)
    rewards, logps, right = beta * ratios.detach(), logps.detach(), (distance.detach() > 0).to(ratios.dtype)
    columns = [rewards * good, rewards * bad, right, logps * good, logps * bad, good, bad, torch.ones_like(good)]
    return PairLosses(losses, torch.stack(columns, 1))


def _measured(losses: Tensor, rewards: Tensor, logps: Tensor) -> PairLosses:
    chosen, rejected = rewards.detach().view(-1, 2).unbind(1)
    both, ones = [chosen, rejected, (chosen > rejected).to(losses.dtype)], torch.ones_like(chosen)
    return PairLosses(losses, torch.stack([*both, *logps.detach().view(-1, 2).unbind(1), ones, ones, ones], 1))
