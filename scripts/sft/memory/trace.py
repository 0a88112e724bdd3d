"""The peak memory of a training step, by running our own step on tensors that have shapes and no memory.

The model is drawn from its config.json (`model.outline`), filled with fake tensors, and given one micro-batch of
`sft.step` with optimizer state in place: its forward, its backward, the clipping of gradients and the optimizer's step.
No model family has code of its own here.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sft.config.schema import Config
from sft.errors import ModelError
from sft.memory import kernels
from sft.memory.live import Live
from sft.model import outline
from sft.model.layers import head
from sft.step import unwrap
from sft.step.microbatch import loss_sum
from sft.step.window import Collator, MicroBatch, cut

ROUNDING = {"cuda": 512, "cpu": 1}  # bytes: CUDA's caching allocator hands out multiples of 512


@dataclass(frozen=True)
class Traced:
    """Bytes. parts: what was alive at the highest moment of a step, by kind; peak: their sum. standing: before it."""

    parts: dict[str, int]
    peak: int
    standing: int


class Tracer:
    """Traces steps of one model at one config, which must be resolved for `device` (but for its batch sizes).

    description: the model's config.json. Raises ModelError for a family that transformers has not, or that cannot be
    followed without values.
    """

    def __init__(self, config: Config, description: Mapping[str, Any], *, device: str) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        dtype = compute_dtype(config)
        self.config, self.device = config, device
        attention, self.apart = kernels.choose(device, description)
        self.model = outline.draw(
            description,
            config.model.name,
            config.tuning,
            torch.float32 if config.tuning.mode == "full" else dtype,
            attention=attention,
            checkpointing=config.train.gradient_checkpointing is True,
        )
        base: Any = unwrap(self.model)
        self.kind: Any = "seq2seq" if getattr(base.config, "is_encoder_decoder", False) else "causal"
        full = config.tuning.mode == "full"
        self.parameters = sum(p.numel() for p in self.model.parameters() if full or not p.requires_grad)
        self.fakes = FakeTensorMode()
        vocabulary = int(base.config.get_text_config().vocab_size)
        self.live = Live(rounding=ROUNDING[device], vocabulary=vocabulary, fake=True)
        with self._faking():
            outline.fill(self.model, dtype)
            self.steps = Steps(self.model, config, self.live, device=device)

    def step(self, lengths: Sequence[int], *, waiting: bool) -> Traced:
        """The peak of a step whose largest micro-batch has rows of these lengths, all labelled.

        For an encoder-decoder these are the lengths of a source and of its target. waiting: whether gradients of
        other micro-batches of the same step are there already.
        """
        kernels.rows_are(lengths)
        real = micro_batch(self.kind, lengths, apart=self.apart)
        with self._faking():
            inputs = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in real.inputs.items()}
            targets = torch.empty(real.targets.shape, dtype=torch.long)
            micro = MicroBatch(inputs, targets, real.rows, real.computed, real.labelled, real.seq2seq)
            return self.steps.run(micro, waiting=waiting)

    @contextlib.contextmanager
    def _faking(self) -> Iterator[None]:
        from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

        step_log = logging.getLogger("sft.step")
        before, step_log.level = step_log.level, logging.ERROR
        try:
            with self.fakes, self.live:
                yield
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ModelError(
                f"{self.config.model.name} cannot be planned: what it computes depends on values ({error})",
                where="config.json",
            ) from None
        finally:
            step_log.level = before


class Steps:
    """A model's steps, followed: real tensors or fake ones alike. Puts optimizer state in place at once."""

    def __init__(self, model: nn.Module, config: Config, live: Live, *, device: str) -> None:
        self.model, self.config, self.live = model, config, live
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        sort_weights(model, live)
        for weight in self.trained:
            hook = weight.register_post_accumulate_grad_hook
            hook(lambda w: live.see(w.grad, "gradients", again=True))  # type: ignore[no-untyped-call]
        self.optimizer = kernels.optimizer(self.trained, config.train, live, device=device)

    def run(self, micro: MicroBatch, *, waiting: bool) -> Traced:
        """One step of one micro-batch: its peak."""
        train, live = self.config.train, self.live
        if waiting:
            live.default = "gradients"
            for weight in self.trained:
                weight.grad = torch.zeros_like(weight)
            live.default = "activations"
        live.start()
        standing = live.total
        with computing(self.config):
            loss, count = loss_sum(
                self.model, micro, logits=train.logits, tile=train.logits_tile, label_smoothing=train.label_smoothing
            )
            loss = loss / count
            loss.backward()  # type: ignore[no-untyped-call]
        del loss
        if train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained, train.max_grad_norm)
        self.optimizer.step()
        for weight in self.trained:
            weight.grad = None
        return Traced({name: size for name, size in live.at_peak.items() if size}, live.peak, standing)


def sort_weights(model: nn.Module, live: Live) -> None:
    """Says of every tensor of the model which part it is."""
    base: Any = unwrap(model)
    top = head(base)
    adapted = any(not weight.requires_grad for weight in model.parameters())
    four_bit = any(outline.is_four_bit(weight) for weight in model.parameters())
    edges = {id(p) for m in base.modules() if m is top or isinstance(m, nn.Embedding) for p in m.parameters()}
    rest = "embedding and head" if four_bit else "weights"
    for weight in model.parameters():
        if outline.is_four_bit(weight):
            live.see_all([weight, *outline.constants(weight)], "weights in 4 bit")
        elif weight.requires_grad and adapted:
            live.see(weight, "adapters", again=True)
        else:
            small = weight.ndim < 2 and four_bit  # norms and biases stand with the rest that is not quantised
            live.see(weight, "embedding and head" if id(weight) in edges or small else "weights", again=True)
    live.see_all(model.buffers(), rest)


def micro_batch(kind: Any, lengths: Sequence[int], *, apart: bool) -> MicroBatch:
    """Rows of these lengths, all labelled, in one micro-batch; all of the longest length where they are not packed."""
    if not apart:
        lengths = [max(lengths)] * len(lengths)
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in lengths]
    (made,) = cut(Collator(kind)(rows), tokens=2 * max(lengths) * len(lengths), apart=apart)
    return made


def compute_dtype(config: Config) -> torch.dtype:
    """The type that the resolved config computes in."""
    if config.train.bf16 is True:
        return torch.bfloat16
    return torch.float16 if config.train.fp16 is True else torch.float32


@contextlib.contextmanager
def computing(config: Config) -> Iterator[None]:
    """Autocast as training has it. Fake tensors are the CPU's, whatever they stand for."""
    dtype = compute_dtype(config)
    if dtype == torch.float32:
        yield
        return
    with torch.autocast("cpu", dtype=dtype):
        yield
