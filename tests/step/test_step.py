"""A step gives the same result however its batch is split, even if memory runs out during it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sft.errors import EnvironmentProblem
from sft.model import adapters
from sft.step import step
from sft.step.batch import Collator, count_labels, split_micro_batches
from sft.step.step import StepConfig, evaluate_loss, forward_backward, token_losses
from tests.step import models

SPLITS = {
    "1x8": StepConfig(max_rows=1, packed=True),
    "1x8 padded": StepConfig(max_rows=1),
    "8x1 packed": StepConfig(packed=True),
    "8x1 padded": StepConfig(),
    "packed into 20": StepConfig(micro_batch_tokens=20, packed=True),
    "groups within 20": StepConfig(micro_batch_tokens=20, max_rows=3),
}


def _expected(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of the batch, written out a row at a time, and its gradients."""
    total = torch.zeros((), dtype=model.dtype)
    lengths = batch["lengths"].tolist()
    for ids, labels in zip(batch["input_ids"].split(lengths), batch["labels"].split(lengths), strict=True):
        scores = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        for position, label in enumerate(labels[1:].tolist()):
            if label != -100:
                total = total - scores[position, label]
    mean = total / count_labels(batch)
    mean.backward()
    return mean.detach(), models.gradients(model)


@pytest.mark.parametrize("family", ["tiny_qwen2", "tiny_gpt2"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_any_split_gives_the_gradients_of_the_mean_loss(
    family: str, dtype: torch.dtype, limit: float, request: pytest.FixtureRequest
) -> None:
    model, batch = models.load(request.getfixturevalue(family), dtype=dtype), models.batch()
    loss, gradient = _expected(model, batch)
    for name, config in SPLITS.items():
        for logits in ("chunked", "full"):
            mean, *_ = forward_backward(model, batch, replace(config, logits=logits, logits_tile=8))  # type: ignore[arg-type]
            assert mean.dtype == dtype
            assert float((mean - loss).abs() / loss) < limit, name
            assert models.relative(models.gradients(model), gradient) < limit, name


LOSSES: dict[str, tuple[StepConfig, bool, Any]] = {
    "weighted": (StepConfig(), True, "tokens"),
    "by rows": (StepConfig(), False, "rows"),
    "weighted, by rows": (StepConfig(), True, "rows"),
    "dft": (StepConfig(objective="dft"), False, "tokens"),
    "z_loss": (StepConfig(z_loss=0.01), False, "tokens"),
    "all": (StepConfig(objective="dft", z_loss=0.01), True, "rows"),
    "smoothed": (StepConfig(label_smoothing=0.1, z_loss=0.01), True, "tokens"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_its_formula_under_any_split(tiny_qwen2: Path, name: str) -> None:
    """Against the formulas of docs/TRAINING.md in fp64, a token at a time: values and gradients."""
    (loss, weighted, normalize), model, rows = LOSSES[name], models.load(tiny_qwen2), models.rows()
    for number, row in enumerate(rows if weighted else []):
        if number % 3:
            row["weights"] = [0.25 * (1 + (number + place) % 5) for place in range(len(row["labels"]))]
    total, divisor = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        labelled = [place for place, label in enumerate(row["labels"]) if place and label != -100]
        for place in labelled:
            scores, label = logits[place - 1], row["labels"][place]
            normalizer = scores.exp().sum().log()
            probability = (scores[label] - normalizer).exp()
            value = (1 - loss.label_smoothing) * (normalizer - scores[label])
            value = value + loss.label_smoothing * (normalizer - scores).mean()
            if loss.objective == "dft":
                value = value * probability.detach()
            value = value + loss.z_loss * normalizer**2
            weight = row.get("weights", [1.0] * len(row["labels"]))[place]
            weight /= len(labelled) if normalize == "rows" else 1
            total, divisor = total + weight * value, divisor + weight
    (total / divisor).backward()
    expected, gradient = float(total.detach() / divisor), models.gradients(model)
    batch, limit = Collator("causal", normalize)(rows), 1e-7 if normalize == "rows" else 1e-12  # weights are fp32
    for split, how in SPLITS.items():
        for logits in ("chunked", "full"):
            config = replace(loss, micro_batch_tokens=how.micro_batch_tokens, max_rows=how.max_rows, packed=how.packed)
            mean, *_ = forward_backward(model, batch, replace(config, logits=logits, logits_tile=8))  # type: ignore[arg-type]
            assert float(mean) == pytest.approx(expected, rel=limit), split
            assert models.relative(models.gradients(model), gradient) < limit, split


def test_any_split_of_a_seq2seq_batch_too(tiny_t5: Path) -> None:
    model = models.load(tiny_t5, attn="sdpa", seq2seq=True)
    batch = Collator("seq2seq")(models.seq2seq_rows())
    results = []
    for tokens, rows in ((10_000, 1), (10_000, None), (25, None)):
        loss, *_ = forward_backward(model, batch, StepConfig(kind="seq2seq", micro_batch_tokens=tokens, max_rows=rows))
        results.append((float(loss), models.gradients(model)))
    assert all(abs(loss - results[0][0]) < 1e-12 for loss, _ in results)
    assert all(models.relative(gradient, results[0][1]) < 1e-9 for _, gradient in results)
    ids, labels = batch["source_ids"].split(batch["source_lengths"].tolist()), batch["labels"]
    total = sum(
        float(model(input_ids=source[None], labels=target[None]).loss.detach()) * len(target)
        for source, target in zip(ids, labels.split(batch["lengths"].tolist()), strict=True)
    )
    assert abs(total / count_labels(batch) - results[0][0]) < 1e-6  # transformers' own loss, in fp32


def test_the_normalizer_may_cover_more_than_this_batch(tiny_qwen2: Path) -> None:
    model, batch = models.load(tiny_qwen2), models.batch()
    mine, *_ = forward_backward(model, batch, SPLITS["8x1 packed"])
    gradient = models.gradients(model)
    normalizer = torch.tensor(2 * count_labels(batch))
    doubled, *_ = forward_backward(model, batch, SPLITS["8x1 packed"], normalizer=normalizer)
    assert float(mine) == pytest.approx(2 * float(doubled), rel=1e-12)
    assert models.relative(2 * models.gradients(model), gradient) < 1e-12


def test_a_batch_without_a_label_changes_nothing(tiny_qwen2: Path) -> None:
    model = models.load(tiny_qwen2)
    batch = Collator("causal")([{"input_ids": [4, 5, 6], "labels": [-100] * 3}])
    (micro,) = split_micro_batches(batch, tokens=64, packed=True)
    for logits in ("chunked", "full"):
        losses = token_losses(model, micro, StepConfig(logits=logits))  # type: ignore[arg-type]
        assert losses.shape == (0,)
        losses.sum().backward()
        assert float(models.gradients(model).norm()) == 0
    assert float(forward_backward(model, batch, StepConfig()).loss) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("config", [SPLITS["packed into 20"], SPLITS["groups within 20"]])
def test_evaluation_gives_each_rows_own_loss_without_smoothing_or_gradients(
    tiny_qwen2: Path, config: StepConfig
) -> None:
    model, rows = models.load(tiny_qwen2).eval(), models.rows()
    settings = replace(config, label_smoothing=0.3, z_loss=0.1)
    evaluated = evaluate_loss(model, [{**row, "weights": [0.5] * len(row["labels"])} for row in rows], settings)
    assert evaluated.config == settings
    assert all(parameter.grad is None for parameter in model.parameters())
    for row, total, count in zip(rows, evaluated.row_sums, evaluated.row_counts, strict=True):
        batch = Collator()([row])
        expected = float(forward_backward(model, batch, config, normalizer=1).loss)
        assert float(total) == pytest.approx(expected, rel=1e-12) and int(count) == count_labels(batch)
    assert evaluated.count == count_labels(models.batch())
    assert evaluated.loss_sum == pytest.approx(float(evaluated.row_sums.sum()))


def test_evaluation_continues_with_half_the_budget_from_then_on(
    tiny_qwen2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = models.load(tiny_qwen2).eval(), models.rows()
    expected = evaluate_loss(model, rows, SPLITS["1x8"])
    ceiling = Ceiling(model, 20)
    evaluated = evaluate_loss(model, rows, SPLITS["8x1 packed"])
    assert ceiling.failed == 2 and evaluated.config.eval_tokens == 14
    assert evaluated.config.micro_batch_tokens == SPLITS["8x1 packed"].micro_batch_tokens
    assert torch.allclose(evaluated.row_sums, expected.row_sums, rtol=1e-12)
    assert "out of memory in evaluation" in caplog.text
    evaluate_loss(model, rows, evaluated.config)
    assert ceiling.failed == 2


def test_autocast_covers_the_forward_pass_alone(tiny_qwen2: Path) -> None:
    model, seen = models.load(tiny_qwen2, dtype=torch.float32), list[bool]()
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))

    def backward(loss: torch.Tensor) -> None:
        seen.append(torch.is_autocast_enabled("cpu"))
        loss.backward()  # type: ignore[no-untyped-call]

    forward_backward(model, models.batch(), StepConfig(autocast=torch.bfloat16), backward=backward)
    assert seen == [True, False]


class Ceiling:
    """Runs out of memory, as the allocator does, when a forward pass has more tokens than `limit`, or at one moment."""

    def __init__(self, model: Any, limit: int, *, layer: int = 0, backward: bool = False) -> None:
        self.limit, self.tokens, self.failed = limit, 0, 0
        model.get_input_embeddings().register_forward_hook(self.see)
        block = model.model.layers[layer]
        if backward:
            block.register_full_backward_hook(lambda *_: self.check())
        else:
            block.register_forward_hook(lambda *_: self.check())

    def see(self, _: Any, args: Any, __: Any) -> None:
        self.tokens = args[0].numel()

    def check(self) -> None:
        if self.tokens > self.limit:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("backward", [False, True])
def test_out_of_memory_is_rolled_back_and_the_same_rows_replayed(
    tiny_qwen2: Path, packed: bool, backward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = models.load(tiny_qwen2), models.batch()
    loss, gradient = _expected(model, batch)
    ceiling = Ceiling(model, 18, layer=1, backward=backward)
    mean, config, _ = forward_backward(model, batch, StepConfig(packed=packed))
    assert ceiling.failed == caplog.text.count("out of memory: replaying") > 0
    assert config.micro_batch_tokens <= 36 and config == StepConfig(
        packed=packed, micro_batch_tokens=config.micro_batch_tokens
    )
    assert f"at most {config.micro_batch_tokens} tokens" in caplog.text
    assert float((mean - loss).abs() / loss) < 1e-9
    assert models.relative(models.gradients(model), gradient) < 1e-9


def test_the_random_state_is_put_back_before_the_replay(tiny_qwen2: Path) -> None:
    model = get_peft_model(models.load(tiny_qwen2), LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj"]))
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.normal_()
    batch = models.batch()
    torch.manual_seed(1)
    forward_backward(model, batch, StepConfig(micro_batch_tokens=12, max_rows=2, packed=True))
    clean = models.gradients(model)
    ceiling = Ceiling(model.get_base_model(), 20, layer=1)
    torch.manual_seed(1)
    _, config, _ = forward_backward(model, batch, StepConfig(micro_batch_tokens=33, max_rows=2, packed=True))
    assert (ceiling.failed, config.micro_batch_tokens) == (1, 12)
    assert torch.equal(models.gradients(model), clean)


def test_a_row_that_does_not_fit_alone_is_an_error_with_a_fix(tiny_qwen2: Path) -> None:
    model = models.load(tiny_qwen2)
    Ceiling(model, 12)
    with pytest.raises(EnvironmentProblem, match="single row of 14 tokens") as caught:
        forward_backward(model, models.batch(), StepConfig())
    assert "max_seq_len" in str(caught.value)


def test_other_errors_are_not_taken_for_memory(tiny_qwen2: Path) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    model = models.load(tiny_qwen2)
    model.model.layers[0].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        forward_backward(model, models.batch(), StepConfig())
    assert step.out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))


def test_a_real_4_bit_base_trains_its_adapters_and_stays_as_it_was(tiny_qwen2: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from sft.step import attention

    attention.register()
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(
        tiny_qwen2, quantization_config=settings, dtype=torch.float32, attn_implementation=attention.NAME
    )
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    before = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    batch, gradients = models.batch(), []
    for name in ("1x8", "8x1 packed", "groups within 20"):
        forward_backward(model, batch, replace(SPLITS[name], logits_tile=8))
        gradients.append(models.gradients(model))
    assert float(gradients[0].norm()) > 0
    assert all(models.relative(gradient, gradients[0]) < 1e-5 for gradient in gradients)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(float(forward_backward(model, batch, SPLITS["8x1 packed"]).loss))
        optimizer.step()
        model.zero_grad(set_to_none=True)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_activations_give_the_same_bits(
    tiny_qwen2: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    model.train()
    adapters.set_checkpointing(model, checkpointing)
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (30, 17)]
    monkeypatch.setattr(step, "SMALL", 64)
    sent, stays = list[int](), step.stays_on_gpu
    monkeypatch.setattr(step, "stays_on_gpu", lambda tensor: stays(tensor) or bool(sent.append(tensor.numel())))
    gradients = []
    for offload in (False, True):
        model.zero_grad()
        forward_backward(model, Collator("causal")(rows), StepConfig(micro_batch_tokens=64, offload=offload))
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    assert len(sent) > 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_offloading_restores_strides_and_stores_an_expanded_tensor_once() -> None:
    padded = torch.randn(1, 1, 600, 608)[..., :597].expand(2, 4, 600, 597)
    turned = torch.randn(512, 4, 300).transpose(0, 1)
    hooks = step.offload_activations()
    for tensor in (padded, turned):
        *_, stored = packed = hooks.pack_hook(tensor)
        restored = hooks.unpack_hook(packed)
        assert torch.equal(restored, tensor) and restored.stride() == tensor.stride()
        assert stored.data_ptr() != tensor.data_ptr() and stored.numel() <= 600 * 4 * 512
    half = torch.randn(1, 600, 2048)[..., 1024:]  # of a fused projection: with its strides it would take the whole
    *_, stored = packed = hooks.pack_hook(half)
    assert torch.equal(hooks.unpack_hook(packed), half) and stored.untyped_storage().nbytes() == half.numel() * 4


def test_offloading_leaves_weights_and_their_views() -> None:
    weight = torch.nn.Parameter(torch.randn(1024, 1024))
    assert (
        step.stays_on_gpu(weight) and step.stays_on_gpu(weight.t()) and not step.stays_on_gpu(weight.detach().clone())
    )


@pytest.mark.parametrize("packed", [True, False])
def test_neftune_noise_is_that_of_transformers_for_each_row_by_its_own_length(tiny_qwen2: Path, packed: bool) -> None:
    """Against transformers' hook, a row at a time; noise is off where no gradients are formed."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = models.load(tiny_qwen2, dtype=torch.float32)
    embedding, batch = model.get_input_embeddings(), models.batch()
    micro, *rest = split_micro_batches(batch, tokens=4096, packed=packed)
    ids, seen = micro.inputs["input_ids"], dict[str, torch.Tensor]()
    plain = embedding(ids)
    with step.noisy_embeddings(model, micro, 5.0):
        torch.manual_seed(0)
        noise = (embedding(ids) - plain).detach()
        with torch.no_grad():
            assert torch.equal(embedding(ids), plain)
    assert torch.equal(embedding(ids), plain) and not rest
    mask = torch.ones_like(ids) if packed else micro.inputs["attention_mask"]
    rows = noise[mask.bool()].split([int(batch["lengths"][row]) for row in micro.rows])
    for row in rows:
        limit = 5.0 / (len(row) * plain.shape[-1]) ** 0.5
        assert 0.9 * limit < float(row.abs().max()) <= limit * 1.0001 and abs(float(row.mean())) < limit / 5
    (alone,) = split_micro_batches(models.batch((9,)), tokens=4096, packed=packed)
    embedding.neftune_noise_alpha, embedding.training = 5.0, True
    torch.manual_seed(1)
    expected = neftune_post_forward_hook(embedding, (alone.inputs["input_ids"],), embedding(alone.inputs["input_ids"]))
    with step.noisy_embeddings(model, alone, 5.0):
        torch.manual_seed(1)
        seen["ours"] = embedding(alone.inputs["input_ids"])
    assert torch.allclose(seen["ours"], expected, atol=1e-6)
    configs = [StepConfig(packed=packed, neftune_alpha=alpha) for alpha in (5.0, None)]
    noisy, clean = (float(forward_backward(model, batch, config).loss) for config in configs)
    assert abs(noisy - clean) > 1e-3
    sums = [evaluate_loss(model, models.rows(), config).loss_sum for config in configs]
    assert sums[0] == sums[1]
