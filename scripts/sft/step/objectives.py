"""Training objectives: functions `(model, micro_batch, config) -> per-token losses [N]`, chosen by `train.objective`.

An objective returns one loss for each labelled token of the micro-batch, row by row, in fp32 (fp64 for a model in
fp64), times the token's weight. `step.forward_backward` adds them up over all micro-batches and divides by the weights
of the step batch (`batch.loss_weight`). To add one: write a function with this signature, add its name to OBJECTIVES
and to `train.objective` in config/schema.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from sft.model.adapters import unwrap
from sft.model.shard import compute
from sft.step.batch import IGNORED, MicroBatch
from sft.step.loss import TokenLoss, full_cross_entropy, tiled_cross_entropy

if TYPE_CHECKING:
    from sft.step.step import StepConfig

ObjectiveName = Literal["response", "dft"]
Objective = Callable[[nn.Module, MicroBatch, "StepConfig"], Tensor]


def response(model: nn.Module, micro: MicroBatch, config: StepConfig, *, dft: bool = False) -> Tensor:
    """Cross-entropy of each labelled token [N], as `config.label_smoothing` and `config.z_loss` say.

    dft: times the probability that the model gives to the token (dynamic fine-tuning).
    """
    inputs: dict[str, Any] = dict(micro.inputs)
    if micro.seq2seq:
        inputs["decoder_input_ids"] = _decoder_inputs(unwrap(model), micro.targets)
    loss = TokenLoss(config.label_smoothing, config.z_loss, dft)
    losses = full_cross_entropy if config.logits == "full" else partial(tiled_cross_entropy, tile=config.logits_tile)
    return compute(model, lambda: losses(model, inputs, micro.targets, loss, micro.weights))


OBJECTIVES: dict[ObjectiveName, Objective] = {"response": response, "dft": partial(response, dft=True)}


def _decoder_inputs(base: Any, labels: Tensor) -> Tensor:
    """The target shifted right behind the decoder's start token, [B, L], as for any encoder-decoder."""
    if shift := getattr(base, "prepare_decoder_input_ids_from_labels", None):
        return shift(labels=labels)  # type: ignore[no-any-return]
    pad, start = base.config.pad_token_id or 0, base.config.decoder_start_token_id
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = pad if start is None else start
    return shifted.masked_fill(shifted == IGNORED, pad)
