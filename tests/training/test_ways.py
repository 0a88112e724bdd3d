"""A faster way to compute a layer gives the same step, or is not taken; weights keep their names, evaluation is plain.

Liger's kernels are Triton's: on a machine without a GPU they run in Triton's interpreter, which shows that they are put
in the right places with the right settings and that their arithmetic is right in fp32 and fp16. It shows nothing of
speed, of bf16 (which the interpreter lacks), or of what the Triton compiler makes of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.errors import EnvironmentProblem
from sft.memory.probe import Measured
from sft.model import kernels
from sft.step.batch import Collator
from sft.step.step import StepConfig, forward_backward
from sft.training import ways
from tests.step import models
from tests.training import bench
from tests.training.test_out_of_memory import Once

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = {"qwen2": 9, "llama": 9, "gemma": 9, "qwen3": 13, "phi3": 9, "glm4": 11, "mixtral": 7}


@pytest.fixture(scope="module")
def liger() -> Iterator[None]:
    """Liger, on the GPU or interpreted: CUDA's own functions written out, floats as the numbers a kernel would get."""
    if not (find_spec("liger_kernel") and find_spec("triton")):
        pytest.skip("liger-kernel and triton are not installed")
    if DEVICE == "cuda":
        yield
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("without a GPU this runs with TRITON_INTERPRET=1 in pytest's environment")
    from tests.training import interpreted

    with pytest.MonkeyPatch.context() as patch:
        interpreted.prepare(patch)
        yield


def small(family: str, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from sft.step import attention

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300, "pad_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(family, **sizes, **more, bos_token_id=2)
    torch.manual_seed(0)
    wanted = attention.implementation("cpu", config) or attention.fallback(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=wanted, dtype=dtype).to(DEVICE).train()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data += 0.2 * torch.randn_like(weight)
    return model


def step_config(model: Any) -> StepConfig:
    from sft.step import attention

    return StepConfig(device=DEVICE, micro_batch_tokens=64, packed=attention.keeps_rows_apart(model))


@pytest.mark.parametrize(("family", "layers"), FAMILIES.items())
def test_ligers_kernels_serve_every_part_of_a_family_with_equal_gradients(
    liger: None, family: str, layers: int
) -> None:
    model = small(family, torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    names, asked = list(model.state_dict()), step_config(model)
    ids = torch.arange(3, 20, device=DEVICE)[None]
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
    assert ways.take(model, "liger", asked) is None
    served = [module for module in model.modules() if "forward" in module.__dict__]
    assert len(served) == layers  # GLM turns neighbours, Liger halves: its attention stays as it is
    assert kernels.way_of(model) == "liger" and list(model.state_dict()) == names
    faster = model(input_ids=ids, use_cache=False).logits
    assert 0 < models.relative(faster, plain) < 1e-5
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
    kernels.give_back(model)
    assert kernels.way_of(model) == "plain"
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)


def test_ligers_kernels_train_adapters_on_four_bits_as_plain_layers_do(
    liger: None, tiny_qwen2: Path, tmp_path: Path
) -> None:
    ends = []
    for way in ("plain", "liger"):
        trainer = made(tiny_qwen2, tmp_path / "outputs" / way)
        assert ways.take(trainer.model, way, trainer.step_config) is None
        trainer.fit(None)
        ends.append((trainer, bench.trained(trainer)))
    (_, plain), (trainer, found) = ends
    assert all(models.relative(found[name], plain[name]) < 1e-4 for name in plain)
    session = trainer._session()
    assert session["kernels"] == "liger"


def test_a_way_that_is_not_equal_is_given_back_and_one_that_is_not_possible_names_its_fix(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = made(tiny_qwen2, tmp_path / "outputs" / "a", mode="lora")
    model, asked = trainer.model, trainer.step_config
    before = bench.trained(trainer)
    monkeypatch.setattr(kernels, "_compiled", lambda module: off(module) if is_norm(module) else None)
    reason = ways.take(model, "compiled", asked)
    assert reason is not None and "not equal" in reason and "1e-05 is allowed" in reason
    monkeypatch.setattr(kernels, "_compiled", lambda module: no_gradient(module) if is_norm(module) else None)
    assert "nan off" in (ways.take(model, "compiled", asked) or "")
    assert kernels.way_of(model) == "plain" and not any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in bench.trained(trainer).items())
    assert all(weight.grad is None for weight in model.parameters())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if DEVICE == "cpu":
        with pytest.raises(EnvironmentProblem, match="Liger's kernels cannot be used") as caught:
            ways.ask(model, "liger", asked)
        ways.ask(model, "liger", asked, found=True)  # by an earlier run, where it was installed
        assert kernels.way_of(model) == "plain"
        assert caught.value.fix == "--set train.kernels=auto"


def is_norm(module: Any) -> bool:
    return "RMSNorm" in type(module).__name__


def off(module: Any) -> Any:
    """A norm that scales by a thousandth too much."""
    return lambda hidden: type(module).forward(module, hidden) * 1.001


def no_gradient(module: Any) -> Any:
    """The right norm, whose gradient is no number."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = type(module).forward(module, hidden)
        made.register_hook(lambda gradient: gradient * torch.nan)
        return made

    return forward


def test_where_the_compiler_fails_while_it_is_measured_layers_are_plain_from_there_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from torch._dynamo.exc import TorchDynamoException

    model = torch.nn.Linear(2, 2)

    def measure() -> str:
        if kernels.way_of(model) == "compiled":
            raise TorchDynamoException("no compiler for this length")
        return "measured"

    kernels._put(model, model.forward, "compiled")
    assert ways.or_plainly(model, measure) == "measured" and kernels.way_of(model) == "plain"
    assert "no compiler for this length" in caplog.text
    with pytest.raises(TorchDynamoException):
        ways.or_plainly(model, lambda: failing(TorchDynamoException("of no layer of ours")))


def failing(error: Exception) -> None:
    raise error


def test_the_fastest_way_is_kept_if_it_gains_enough_and_the_compiler_only_in_long_runs(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = made(tiny_qwen2, tmp_path / "outputs" / "a", mode="lora")
    model, asked = trainer.model, trainer.step_config
    monkeypatch.setattr(kernels, "why_not", lambda *_, **__: None)
    monkeypatch.setattr(kernels, "_liger", lambda module: module.forward if is_norm(module) else None)
    monkeypatch.setattr(kernels, "_compiled", kernels._liger)

    def chosen(speeds: dict[str, float | None], run_tokens: float) -> str:
        def measure() -> Measured | None:
            speed = speeds[kernels.way_of(model)]
            return None if speed is None else Measured(1, 1, 100 / speed, 100)

        kernels.give_back(model)
        found = ways.fastest(model, asked, ("liger", "compiled"), measure, run_tokens)
        assert found is not None and found.speed == speeds[kernels.way_of(model)]
        return kernels.way_of(model)

    long = 2000 * 100.0
    assert chosen({"plain": 100, "liger": 104, "compiled": 104}, long) == "plain"
    assert chosen({"plain": 100, "liger": 110, "compiled": 112}, long) == "liger"
    assert chosen({"plain": 100, "liger": 110, "compiled": 120}, long) == "compiled"
    assert chosen({"plain": 100, "liger": None, "compiled": 120}, long) == "compiled"
    assert chosen({"plain": 100, "liger": 110, "compiled": 120}, long / 2) == "liger"


def test_where_the_compiler_fails_in_a_step_it_is_replayed_plainly(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.exc import TorchDynamoException

    ends = []
    for failing in (False, True):
        trainer = made(tiny_qwen2, tmp_path / "outputs" / str(failing))
        if failing:
            calls = []

            def breaking(module: Any, calls: list[Any] = calls) -> Any:
                if not hasattr(module, "act_fn"):
                    return None

                def forward(hidden: Any) -> Any:
                    calls.append(hidden)
                    if len(calls) == 4:  # the proof and the first micro-batches went well
                        raise TorchDynamoException("no compiler for this length")
                    return type(module).forward(module, hidden)

                return forward

            monkeypatch.setattr(kernels, "_compiled", breaking)
            kernels.take(trainer.model, "compiled")
        trainer.fit(None)
        ends.append(bench.trained(trainer))
    assert all(torch.equal(ends[1][name], weight) for name, weight in ends[0].items())
    assert [record.message for record in caplog.records if "torch.compile failed" in record.message]
    assert kernels.way_of(trainer.model) == "plain" and trainer._session()["kernels"] == "plain"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_layers_give_the_same_step_with_dropout_on_four_bits_however_it_is_cut(
    tiny_qwen2: Path, tmp_path: Path
) -> None:
    trainer = made(tiny_qwen2, tmp_path / "outputs" / "a")
    model, names, fault, lowered = trainer.model, list(trainer.model.state_dict()), Once(), list[int]()
    model.get_base_model().model.embed_tokens.register_forward_hook(fault)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    batch = {key: value for key, value in Collator("causal")(bench.features(4)).items() if key != "ids"}

    def step(tokens: int) -> torch.Tensor:
        torch.manual_seed(3)
        config = StepConfig(micro_batch_tokens=tokens, packed=trainer.step_config.packed)
        fitted = forward_backward(model, batch, config).config.micro_batch_tokens
        lowered.extend([fitted] if fitted < tokens else [])
        return models.gradients(model)

    plain = {tokens: step(tokens) for tokens in (32, 256, 1)}
    kernels.take(model, "compiled")
    for tokens, expected in plain.items():
        assert models.relative(step(tokens), expected) < 1e-5
    fault.armed = True
    assert models.relative(step(256), plain[32]) < 1e-5 and lowered == [32]
    assert kernels.way_of(model) == "compiled" and list(model.state_dict()) == names


def made(folder: Path, out: Path, *, mode: str = "qlora", **train: Any) -> Any:
    given = {"gradient_checkpointing": True, "epochs": 1, "eval_strategy": "no", "load_best_model_at_end": False}
    return bench.trainer(bench.config(folder, out, tuning={"mode": mode}, train={**given, **train}))
