"""Preference objectives: one loss for each pair of rows that belong together, chosen by `train.objective`.

dpo, ipo, orpo, simpo: a chosen and a rejected answer to one prompt. kto: an answer that is rated good or bad, and a row
of the same prompt with another row's answer, by which the drift from the reference is estimated. All are functions of
the rows' log-probabilities, which come from the tiled head like any loss; the reference is the base with its adapter
off, computed first and without gradients. So a step needs no more memory than SFT on the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from sft.config.schema import WITH_REFERENCE
from sft.step.batch import MicroBatch
from sft.step.objectives import response

if TYPE_CHECKING:
    from sft.step.step import StepConfig

PreferenceName = Literal["dpo", "ipo", "orpo", "simpo"]
MEASURES = (  # TRL's names; logps: sums over an answer's tokens, for orpo and simpo means; rewards: beta times them
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip


class PairLosses(NamedTuple):
    """losses: of each pair, [P] in fp32 (fp64 for a model in fp64). measures: detached, [P, len(MEASURES)]."""

    losses: Tensor
    measures: Tensor


def pair_losses(model: nn.Module, micro: MicroBatch, config: StepConfig) -> PairLosses:
    """The losses of a micro-batch of pairs.

    dpo: Rafailov et al. 2023, eq. 7. ipo: Azar et al. 2024, eq. 17, of means over tokens, as its authors use it. orpo:
    Hong et al. 2024, eq. 6; both of its terms are of the answers alone. simpo: Meng et al. 2024, eq. 6.
    """
    beta, counts = float(config.preference.beta), torch.tensor(micro.counts, device=micro.targets.device)
    if config.objective in WITH_REFERENCE:
        with reference(model):
            before = log_probs(model, micro, config)
        sums = log_probs(model, micro, config)
        ratios = sums - before
        if config.objective == "dpo":
            losses = -logsigmoid(beta * _difference(ratios))
        else:
            losses = (_difference(ratios / counts) - 1 / (2 * beta)) ** 2
        return _measured(losses, beta * ratios, sums)
    means = log_probs(model, micro, config) / counts
    if config.objective == "orpo":
        losses = -means[::2] - beta * logsigmoid(_difference(means - _log1mexp(means)))
    else:
        losses = -logsigmoid(beta * _difference(means) - float(config.preference.gamma))
    return _measured(losses, beta * means, means)


def log_probs(model: nn.Module, micro: MicroBatch, config: StepConfig) -> Tensor:
    """The log-probability of each row's labelled tokens together, [rows]."""
    losses = response(model, micro, replace(config, label_smoothing=0.0, z_loss=0.0))
    return -torch.stack([row.sum() for row in torch.split(losses, list(micro.counts))])


@contextmanager
def reference(model: nn.Module) -> Iterator[None]:
    """The model that training began from: the base with its adapter off, without dropout and gradients."""
    adapted: Any = model
    while not hasattr(adapted, "disable_adapter"):
        adapted = adapted.module
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:  # 4-bit layers stay in training mode: on a CPU evaluation repacks them for good
        module.training = hasattr(module, "quant_state")
    try:
        with torch.no_grad(), adapted.disable_adapter():
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


def _measured(losses: Tensor, rewards: Tensor, logps: Tensor) -> PairLosses:
    chosen, rejected = rewards.detach().view(-1, 2).unbind(1)
    both = [chosen, rejected, chosen - rejected, (chosen > rejected).to(losses.dtype)]
    return PairLosses(losses, torch.stack([*both, *logps.detach().view(-1, 2).unbind(1)], 1))
