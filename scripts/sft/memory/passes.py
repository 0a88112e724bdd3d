"""What a run does with its model, followed storage by storage: a training step, an evaluation, an answer.

Real tensors or fake ones alike: the same code counts what small models really hold, in the tests.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sft.config.schema import Config
from sft.memory import folding, kernels
from sft.memory.live import Live, Window
from sft.model import outline
from sft.model.layers import head
from sft.step import unwrap
from sft.step.microbatch import loss_sum
from sft.step.offload import stays
from sft.step.window import Collator, MicroBatch, cut

BACKWARD, STEP, ANSWER = "backward", "optimizer", "answer"  # windows that are no layer's


class Passes:
    """A model's passes. An optimizer that is followed has its state at once: every phase of a run stands beside it."""

    def __init__(self, model: nn.Module, config: Config, live: Live, *, device: str) -> None:
        self.model, self.config, self.live = model, config, live
        self.offload = config.train.activation_offload and device == "cuda"
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        sort_weights(model, live)
        places = dict[int, str]()
        for index, stack in enumerate(folding.layers(model)):
            for layer in stack:
                layer.register_forward_pre_hook(lambda *_, label=str(index): live.mark(label))
                places |= {id(weight): str(index) for weight in layer.parameters()}
        for weight in self.trained:
            self._watch(weight, places.get(id(weight), ""))
        self.optimizer = kernels.optimizer(self.trained, config.train, live, device=device)

    def _watch(self, weight: nn.Parameter, label: str) -> None:
        """Counts the weight's gradient as one, and marks its arrival."""

        def arrived(arriving: Tensor) -> None:
            assert arriving.grad is not None
            self.live.see(arriving.grad, "gradients", again=True)
            self.live.mark(label)

        weight.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]

    def step(self, micro: MicroBatch, *, waiting: bool) -> list[Window]:
        """One optimizer step of one micro-batch. waiting: gradients of earlier ones are there."""
        train, live = self.config.train, self.live
        self.model.train()
        if waiting:
            live.default = "gradients"
            for weight in self.trained:
                weight.grad = torch.zeros_like(weight)
            live.default = "activations"
        live.start()
        with computing(self.config), _away() if self.offload else contextlib.nullcontext():
            loss = self._loss(micro)
            live.mark(BACKWARD)
            loss.backward()  # type: ignore[no-untyped-call]
        del loss
        live.mark(STEP)
        if train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained, train.max_grad_norm)
        if self.optimizer is not None:
            self.optimizer.step()
        for weight in self.trained:
            weight.grad = None
        return live.stop()

    def _loss(self, micro: MicroBatch) -> Tensor:
        train = self.config.train
        loss, count = loss_sum(
            self.model, micro, logits=train.logits, tile=train.logits_tile, label_smoothing=train.label_smoothing
        )
        return loss / count

    def evaluation(self, micro: MicroBatch) -> list[Window]:
        """The loss of one micro-batch, without gradients."""
        self.model.eval()
        self.live.start()
        with torch.no_grad(), computing(self.config):
            self._loss(micro)
        return self.live.stop()

    def generation(self, micro: MicroBatch, prompt: int, answer: int) -> list[Window]:
        """The prompts of `micro` read at once, then the last token of answers of `answer` tokens, all in the cache."""
        self.model.eval()
        base: Any = unwrap(self.model)
        self.live.start()
        with torch.no_grad(), computing(self.config):
            ids = micro.inputs["input_ids"]
            inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True}
            one = torch.ones((len(ids), 1), dtype=torch.long)
            if micro.seq2seq:
                inputs = {
                    "encoder_outputs": base.get_encoder()(input_ids=ids),
                    "decoder_input_ids": one,
                }
            elif "logits_to_keep" in inspect.signature(base.forward).parameters:
                inputs["logits_to_keep"] = 1
            out = self.model(**inputs)
            cache = out.past_key_values
            _draw_choice(out)
            del out
            self.live.mark(ANSWER)
            _lengthen(cache, max(0, answer - 2))
            self.live.mark(ANSWER)
            inputs |= {"decoder_input_ids": one} if micro.seq2seq else {"input_ids": one}
            out = self.model(**inputs, past_key_values=cache)
            _draw_choice(out)
        return self.live.stop()


def _away() -> Any:
    """`step.offload` as the GPU's memory sees it: what leaves is gone, what comes back is new."""

    def away(tensor: Tensor) -> Any:
        return tensor if stays(tensor) else (tensor.shape, tensor.dtype)

    def back(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1])

    return torch.autograd.graph.saved_tensors_hooks(away, back)


def _draw_choice(out: Any) -> None:
    """The last position's logits in fp32 and their best: what choosing a token takes."""
    out.logits[:, -1, :].float().argmax(-1)


def _lengthen(cache: Any, tokens: int) -> None:
    """Puts keys and values of `tokens` more positions into every layer of a cache, by its own rule."""
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(cache, "layers", ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if tokens and isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == 4:
            more = [each.new_empty((*each.shape[:2], tokens, each.shape[3])) for each in (keys, values)]
            layer.update(*more)


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
