"""Elastic weight consolidation (`train.ewc`): weights that general answers depend on stay near those of the base.

Kirkpatrick et al. 2017 (arXiv 1612.00796), equation 3: strength / 2 * sum F (w - w0)^2 is added to the loss. w0 are the
base's weights; F is the diagonal of the Fisher information of general answers, estimated per answer token: the squared
gradients of each row's log-likelihood, summed over the rows and divided by their labels. 1/2 sum F (w - w0)^2 estimates
the KL divergence, in nats, of an answer's token from the base's (to second order, without the terms off the diagonal),
and strength weighs that against the loss of a token of the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sft.step.batch import Collator, count_labels
from sft.step.step import StepConfig, forward_backward


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained weights by name, tied ones once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def squared_gradients(
    model: nn.Module, rows: Sequence[Mapping[str, Any]], config: StepConfig
) -> tuple[dict[str, Tensor], int]:
    """The squared gradients of each row's log-likelihood, summed over the rows, for every trained weight; the labels.

    Without dropout; gradients must be clear, and are clear again at the end. fp16 is left for fp32, in which small
    gradients do not vanish.
    """
    weights, training, labels = trained_weights(model), model.training, 0
    sums = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
    autocast = None if config.autocast is torch.float16 else config.autocast
    plain = replace(config, objective="response", label_smoothing=0.0, z_loss=0.0, autocast=autocast)
    collate = Collator(config.kind)
    model.eval()
    for row in rows:
        batch = {name: tensor.to(config.device) for name, tensor in collate([row]).items()}
        forward_backward(model, batch, plain, normalizer=1)
        labels += count_labels(batch)
        for name, weight in weights.items():
            if weight.grad is not None:
                sums[name].addcmul_(weight.grad, weight.grad)
        model.zero_grad(set_to_none=True)
    model.train(training)
    return sums, labels


@dataclass(frozen=True)
class Consolidation:
    """The penalty on a model's trained weights: `fisher` and `base` have a tensor for each, in order."""

    strength: float
    weights: list[nn.Parameter]
    fisher: list[Tensor]
    base: list[Tensor]

    @classmethod
    def around(cls, model: nn.Module, fisher: Mapping[str, Tensor], strength: float) -> Consolidation:
        """Consolidates the weights that the model has now."""
        weights = trained_weights(model)
        base = [weight.detach().clone() for weight in weights.values()]
        return cls(strength, list(weights.values()), [fisher[name] for name in weights], base)

    @torch.no_grad()
    def add_gradients(self, scale: float = 1.0) -> Tensor:
        """Adds the penalty's gradient, strength * F * (w - w0), times `scale`; returns the penalty, a scalar.

        Called once a step, after the gradients of all micro-batches and ranks are summed. scale: of a gradient scaler.
        A weight without a gradient is not updated and has no penalty.
        """
        total = self.fisher[0].new_zeros(())
        for weight, fisher, base in zip(self.weights, self.fisher, self.base, strict=True):
            if weight.grad is not None:
                moved = weight - base
                weight.grad.addcmul_(fisher, moved, value=self.strength * scale)
                total += moved.square_().mul_(fisher).sum()
        return total * self.strength / 2
