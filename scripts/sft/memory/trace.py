"""The peak memory of a run, by running our own step on tensors that have shapes and no memory.

The model is drawn from its config.json (`model.outline`), filled with fake tensors, and put through what training does
(`passes`). Layers that repeat are drawn a few times only (`folding`). No model family has code of its own here.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sft.config.schema import Config
from sft.errors import ModelError
from sft.memory import folding, kernels, shapes
from sft.memory.live import Live, Window
from sft.memory.memo import NUMBERS
from sft.memory.passes import Passes, compute_dtype, micro_batch
from sft.model import outline
from sft.model.layers import head, is_linear
from sft.step import unwrap
from sft.step.window import MicroBatch

ROUNDING = {"cuda": 512, "cpu": 1}  # bytes: CUDA's caching allocator hands out multiples of 512
log = logging.getLogger("sft.memory")


@dataclass(frozen=True)
class Traced:
    """Bytes. parts: what was alive at the highest moment, by kind; peak: their sum. standing: before it began.

    A Tracer's is without the optimizer's state where that merely stands there; `memo.Traces` adds it.
    """

    parts: dict[str, int]
    peak: int
    standing: int


class Tracer:
    """Traces one model at one config, which must be resolved for `device` (but for its batch sizes).

    description: the model's config.json. fold: False draws every layer. Of the base, in numbers: parameters; largest
    tensor; widest linear layer but the head; experts: in tensors of three dimensions, which 4-bit leaves as they are.
    standing: bytes before any pass; moments: those of a number for every trained weight, by the bytes of one. Raises
    ModelError for a family that transformers has not, or that cannot be followed without values.
    """

    def __init__(self, config: Config, description: Mapping[str, Any], *, device: str, fold: bool = True) -> None:
        self.config, self.description, self.device = config, description, device
        self.parameters = self.out = self.largest = self.widest = self.experts = 0
        self.kind: Any = "seq2seq" if description.get("is_encoder_decoder") else "causal"
        self.drawn = [_Drawn(self, False if fold else None)]
        if self.out:
            self.drawn.append(_Drawn(self, True))
        self.kind, self.apart = self.drawn[0].kind, self.drawn[0].apart
        self.standing = self._unfolded([drawn.passes.live.total for drawn in self.drawn])
        self.moments = {str(size): self._unfolded([drawn.moment(size) for drawn in self.drawn]) for size in NUMBERS}

    def _unfolded(self, bytes_: Sequence[int]) -> int:
        """Of the full depth, by those of what is drawn."""
        return bytes_[0] + self.out * (bytes_[-1] - bytes_[0])

    def step(self, lengths: Sequence[int], *, waiting: bool) -> Traced:
        """The peak of a step whose largest micro-batch has rows of these lengths, all labelled.

        For an encoder-decoder these are the lengths of a source and of its target. waiting: whether gradients of
        other micro-batches of the same step are there already.
        """
        return self._follow(lengths, lambda passes, micro: passes.step(micro, waiting=waiting))

    def evaluation(self, lengths: Sequence[int]) -> Traced:
        """The peak of an evaluation's forward pass over such rows, in the middle of a run."""
        return self._follow(lengths, lambda passes, micro: passes.evaluation(micro))

    def generation(self, rows: int, prompt: int, answer: int) -> Traced:
        """The peak of answering `rows` prompts of `prompt` tokens side by side with `answer` tokens each."""
        return self._follow(
            [prompt] * rows, lambda passes, micro: passes.generation(micro, prompt, answer), padded=True
        )

    def _follow(
        self, lengths: Sequence[int], act: Callable[[Passes, MicroBatch], list[Window]], *, padded: bool = False
    ) -> Traced:
        kernels.rows_are(lengths)
        real = micro_batch(self.kind, lengths, apart=self.apart and not padded)
        seen = [drawn.follow(real, act) for drawn in self.drawn]
        windows = seen[0] if len(seen) == 1 else folding.unfold(seen[0], seen[1], self.out)
        if windows is None:
            log.debug("%s: its layers do not repeat as they seem to; it is traced whole", self.config.model.name)
            self.drawn, self.out = [_Drawn(self, None)], 0
            windows = self.drawn[0].follow(real, act)
        top = max(windows, key=lambda window: window.total)
        return Traced(top.parts, top.total, windows[0].standing)


class _Drawn:
    """The model at one depth: shallow, one period deeper, or (None) with every layer."""

    def __init__(self, owner: Tracer, deeper: bool | None) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        config, device = owner.config, owner.device
        dtype = compute_dtype(config)
        with outline.reading(config.model.name):
            attention, self.apart = kernels.choose(device, owner.description)

        def shorten(model: Any) -> None:
            sizes = [(weight.numel(), weight.ndim) for weight in model.parameters()]
            owner.parameters = sum(size for size, _ in sizes)
            owner.largest = max(size for size, _ in sizes)
            top = head(model)
            owner.widest = max((m.weight.numel() for m in model.modules() if is_linear(m) and m is not top), default=0)
            if shapes.experts(model.config.get_text_config()):
                owner.experts = sum(size for size, dimensions in sizes if dimensions == 3)
            if deeper is not None:
                out = folding.shorten(model, deeper=deeper)
                owner.out = owner.out or out

        self.name = config.model.name
        self.model = outline.draw(
            owner.description,
            self.name,
            config.tuning,
            torch.float32 if config.tuning.mode == "full" else dtype,
            attention=attention,
            checkpointing=config.train.gradient_checkpointing is True,
            shorten=shorten,
        )
        base: Any = unwrap(self.model)
        self.kind: Any = "seq2seq" if getattr(base.config, "is_encoder_decoder", False) else "causal"
        self.real_masks = device == "cpu"
        self.fakes = FakeTensorMode()
        vocabulary = int(base.config.get_text_config().vocab_size)
        live = Live(rounding=ROUNDING[device], vocabulary=vocabulary, fake=True)
        with self._faking(live):
            outline.fill(self.model, dtype)
            self.passes = Passes(self.model, config, live, device=device)

    def moment(self, size: int) -> int:
        """Bytes of a number of `size` bytes for every trained weight, allocated weight by weight."""
        live = self.passes.live
        return sum(live.rounded(weight.numel() * size) for weight in self.passes.trained)

    def follow(self, real: MicroBatch, act: Callable[[Passes, MicroBatch], list[Window]]) -> list[Window]:
        """The windows of `act` on a micro-batch of the shapes of `real`."""
        mask = real.inputs.get("attention_mask")
        seen = None if mask is None or not self.real_masks else mask.bool()
        with self._faking(self.passes.live):
            inputs = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in real.inputs.items()}
            if seen is not None:  # rows of one length need no mask: transformers sees that of a real tensor alone
                inputs["attention_mask"] = seen
            targets = torch.empty(real.targets.shape, dtype=torch.long)
            micro = MicroBatch(inputs, targets, real.rows, real.computed, real.labelled, real.seq2seq)
            return act(self.passes, micro)

    @contextlib.contextmanager
    def _faking(self, live: Live) -> Iterator[None]:
        step_log = logging.getLogger("sft.step")
        before, step_log.level = step_log.level, logging.ERROR
        try:
            with self.fakes, live, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except ModelError:
            raise
        except Exception as error:  # whatever a model's own code does with tensors that have no values
            log.debug("tracing %s failed", self.name, exc_info=True)
            raise ModelError(
                f"{self.name} cannot be planned: its code needs values, and a plan has shapes alone"
                f" ({type(error).__name__}: {' '.join(str(error).split())[:160]})",
                where="config.json",
                mend="train it with --force: the batch size is measured on the card",
            ) from None
        finally:
            step_log.level = before
