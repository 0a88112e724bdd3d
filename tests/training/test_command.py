"""The train command from rows to adapter, on tiny models: what it writes, what it resumes, what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft import files, runs
from sft.config.load import load
from sft.data import store
from sft.errors import ConfigError, RunError
from sft.generation.encoder import load_encoder
from sft.step import step
from tests.training import project


@pytest.fixture
def root(tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    return project.make(tmp_path, tiny_qwen2)


def test_a_run_leaves_adapter_log_ledger_curves_and_links(root: Path) -> None:
    summary = project.run(root)
    assert (summary["run"], summary["steps"]) == ("t", 6)
    assert summary["train_loss_last"] < summary["train_loss_first"]
    assert json.loads((root / "outputs/t/finished.json").read_text()) == summary
    assert (root / "adapters/last").resolve() == root / "adapters/t"
    assert (root / "outputs/last").resolve() == root / "outputs/t"
    names = {path.name for path in (root / "adapters/t").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert runs.run_of_adapter(root / "adapters/t").train.max_steps == 6
    assert files.manifest_problem(root / "adapters/t") is None
    ledger = json.loads((root / "outputs/t/ledger.json").read_text())
    assert ledger["stage"] == "processed"
    assert (
        ledger["train"]["rows_read"] == 20 == ledger["train"]["rows_trained"] + sum(ledger["train"]["reasons"].values())
    )
    assert [step for step, _ in project.losses(root, "t")] == [1, 2, 4, 6]
    assert [step for step, _ in project.losses(root, "t", "eval/rougeL")] == [2, 4, 6]
    assert not list(root.rglob("training_args.bin"))


def test_rows_that_come_as_tokens_train_as_their_texts_do(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = project.run(root, "train.output_dir=outputs/texts")
    encoder = load_encoder(load(root / "config.yaml", [], root=root).config, root)
    rows = {}
    for split, name in (("train", "train"), ("val", "validation")):
        encoded = encoder.encode_batch(store.read_rows(root / f"data/processed/{split}.jsonl"))
        rows[name] = Dataset.from_list([{"input_ids": one.input_ids, "labels": one.labels} for one in encoded])
    DatasetDict(rows).save_to_disk(root / "tokens")
    logging.getLogger("sft").propagate = True
    caplog.set_level(logging.INFO, "sft")
    tokens = project.run(root, "train.output_dir=outputs/tokens", "data.train_path=tokens")
    assert "the validation rows are tokens" in caplog.text
    for key in ("train/loss", "eval/loss"):
        assert project.losses(root, "tokens", key) == project.losses(root, "texts", key) != []
    assert tokens["labelled_tokens"] == texts["labelled_tokens"]
    ledger = json.loads((root / "outputs/tokens/ledger.json").read_text())
    assert ledger["stage"] == "given" and ledger["train"]["rows_trained"] == 20 and ledger["val"]["rows_trained"] == 6
    with pytest.raises(ConfigError, match="the validation rows are tokens"):
        project.run(root, "data.train_path=tokens", "train.metric_for_best_model=rougeL")


def test_each_evaluation_is_one_line_of_verdict_and_its_figures_are_for_verbose(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("sft").propagate = True
    caplog.set_level(logging.DEBUG, "sft.training")
    project.run(root, "train.metric_for_best_model=rougeL", "train.max_steps=4")
    losses, scores = (dict(project.losses(root, "t", key)) for key in ("eval/loss", "eval/rougeL"))
    lines = [record.getMessage() for record in caplog.records if "validation loss" in record.getMessage()]
    assert lines[0].startswith(f"step 2: validation loss {losses[2]:.4f}, rougeL {scores[2]:.4f}; ")
    assert lines[0].endswith("% of the sample answers end by themselves")
    assert f"not better than {scores[2]:.4f} at step 2" in lines[1] and len(lines) == 2
    (figures, *_) = [record for record in caplog.records if "eval/perplexity" in record.getMessage()]
    assert figures.levelno == logging.DEBUG


def test_tensorboard_holds_the_same_numbers_samples_and_settings(root: Path) -> None:
    project.run(root)
    events = EventAccumulator(str(root / "outputs/tb/t"))
    events.Reload()
    tags = events.Tags()
    named = {"train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "eval/loss", "eval/rougeL"}
    named |= set() if torch.cuda.is_available() else {"cpu/memory_gib", "cpu/memory_now_gib"}
    assert named <= set(tags["scalars"])
    for key in ("train/loss", "eval/loss"):
        seen = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(key)]
        assert project.losses(root, "t", key) == seen
    assert "eval/samples/text_summary" in tags["tensors"]
    assert any("hparams" in tag for tag in events.summary_metadata)


def test_a_finished_run_is_followed_by_the_next_name_and_never_touched(root: Path) -> None:
    project.run(root, "train.max_steps=1")
    before = files.sha256(root / "adapters/t/adapter_model.safetensors")
    assert project.run(root, "train.max_steps=1")["run"] == "t-2"
    assert files.sha256(root / "adapters/t/adapter_model.safetensors") == before
    assert (root / "adapters/last").resolve() == root / "adapters/t-2"


def as_if_killed_after(root: Path, step: int) -> None:
    """The run's folder as a SIGKILL after this step leaves it."""
    for path in (root / "outputs/t").glob("checkpoint-*"):
        if runs.step_of(path) > step:
            shutil.rmtree(path)
    (root / "outputs/t/finished.json").unlink()


def test_a_killed_run_resumes_to_the_same_adapter_and_curve(root: Path) -> None:
    project.run(root)
    adapter, curve = load_file(root / "adapters/t/adapter_model.safetensors"), project.losses(root, "t")
    metrics = project.losses(root, "t", "eval/rougeL")
    as_if_killed_after(root, 4)
    (root / "outputs/t/checkpoint-4/optimizer.pt").write_bytes(b"torn")
    with open(root / "outputs/t/log.jsonl", "ab") as log:
        log.write(b"\0\xff\xfe{")  # what a power cut may leave
    assert project.run(root)["run"] == "t"
    again = load_file(root / "adapters/t/adapter_model.safetensors")
    assert all(bool((again[name] == weight).all()) for name, weight in adapter.items())
    assert project.losses(root, "t") == curve
    assert project.losses(root, "t", "eval/rougeL") == metrics


def test_other_settings_are_refused_showing_both_and_some_can_be_accepted(root: Path, tiny_gpt2: Path) -> None:
    project.run(root)
    as_if_killed_after(root, 2)
    with pytest.raises(RunError, match=r"learning_rate: was 0\.005, is 0\.001"):
        project.run(root, "train.learning_rate=1e-3")
    with pytest.raises(RunError, match=r"base_model: was .*tiny-qwen2, is .*tiny-gpt2"):
        project.run(root, f"model.name={tiny_gpt2}", "data.template_path=chatml")
    with pytest.raises(RunError, match="precision: was fp32, is bf16"):
        project.run(root, "train.bf16=true", allow=("precision",))
    with pytest.raises(RunError, match="mode: was lora, is full"):
        project.run(root, "tuning.mode=full")
    with pytest.raises(RunError, match=r"label_smoothing: was 0\.0, is 0\.1\n  max_grad_norm: was 1\.0, is 9\.0"):
        project.run(root, "train.label_smoothing=0.1", "train.max_grad_norm=9.0")
    with pytest.raises(RunError, match="effective_batch: was 8, is 4") as caught:
        project.run(root, "train.effective_batch=4", "train.seed=7", "data.template_path=chatml")
    assert "seed: was 42, is 7" in str(caught.value) and "template: the chat template changed" in str(caught.value)
    rows = root / "data/processed/train.jsonl"
    before = rows.read_text()
    rows.write_text(before + '{"user": "one more?", "assistant": "yes"}\n')
    with pytest.raises(RunError, match=r"data: your rows have changed \(train\.jsonl\)"):
        project.run(root)
    rows.write_text(before)
    (root / "outputs/t").rename(root / "outputs/u")
    summary = project.run(root, "train.learning_rate=1e-3", "train.output_dir=outputs/u", allow=("learning_rate",))
    assert (summary["run"], summary["steps"]) == ("u", 6) and (root / "adapters/u").is_dir()


def test_another_revision_of_the_base_is_refused_showing_both(
    root: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "hub"))
    cached = root / "hub/models--someone--tiny"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(tiny_qwen2, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("a" * 40)
    project.run(root, "model.name=someone/tiny")
    as_if_killed_after(root, 4)
    (cached / "refs/main").write_text("b" * 40)
    with pytest.raises(RunError, match=f"revision: was {'a' * 40}, is {'b' * 40}") as caught:
        project.run(root, "model.name=someone/tiny")
    assert "weights: was" not in str(caught.value) and "--allow-change revision" in str(caught.value.fix)
    assert project.run(root, "model.name=someone/tiny", f"model.revision={'a' * 40}")["run"] == "t"


BEST_AT_2 = (
    "train.greater_is_better=true",  # of a loss that falls: the first evaluation is the best one
    "eval.train_sample=0",
    "logging.log_interval=4",  # lines of the log begin before a checkpoint and end after it
)


def test_a_damaged_best_checkpoint_is_warned_of_and_the_best_of_what_follows_is_the_result(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("sft").propagate = True
    assert project.run(root, *BEST_AT_2)["best_step"] == 2
    as_if_killed_after(root, 4)
    (root / "outputs/t/checkpoint-2/rng.pt").unlink()
    assert project.run(root, *BEST_AT_2)["best_step"] == 6
    assert "the best checkpoint, checkpoint-2, cannot be used: rng.pt" in caplog.text
    as_if_killed_after(root, 6)
    (root / "outputs/t/checkpoint-2/optimizer.pt").unlink()
    assert project.run(root, *BEST_AT_2)["steps"] == 6


def test_a_checkpoint_of_an_earlier_version_with_its_session_file_resumes(root: Path) -> None:
    project.run(root, *BEST_AT_2)
    before = files.sha256(root / "adapters/t/adapter_model.safetensors")
    as_if_killed_after(root, 4)
    folder = root / "outputs/t/checkpoint-4"
    state = json.loads((folder / "trainer_state.json").read_text())
    names = "tokens labelled seconds skipped last_loss unlogged asked_budget budget evaluating checkpointing kernels"
    session = {name: state.pop(name) for name in names.split()}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "session.json").write_text(json.dumps({**session, "best": 2}))
    files.write_manifest(folder)
    assert project.run(root, *BEST_AT_2)["tokens"] > session["tokens"] > 0
    assert files.sha256(root / "adapters/t/adapter_model.safetensors") == before


@pytest.mark.parametrize(
    "sets",
    [
        ["tuning.lora={init: pissa, dropout: 0, lora_plus_ratio: 4}", "train={merge_at_end: true, neftune_alpha: 5}"],
        ["tuning.adapter=prefix", "train.learning_rate=auto"],
        pytest.param(["model.add_tokens=['; order ', Mara Olsen]", "train.merge_at_end=true"], marks=pytest.mark.slow),
        [
            "train={objective: dft, z_loss: 1.0e-4, normalize: rows, optim: muon, min_lr_ratio: 0.1}",
            "data.weight_field=grade",
        ],
        pytest.param(["train={objective: dft, lr_scheduler_type: warmup_stable_decay}"], marks=pytest.mark.slow),
        pytest.param(["train={normalize: rows, label_smoothing: 0.1, optim: lion_32bit}"], marks=pytest.mark.slow),
        pytest.param(["tuning.mode=qlora", "tuning.lora={init: olora, dropout: 0}"], marks=pytest.mark.slow),
        pytest.param(["tuning.lora={layers_to_transform: [1], rank_pattern: {q_proj: 2}}"], marks=pytest.mark.slow),
        pytest.param(["tuning={mode: full, freeze: ['layers[.]0[.]']}"], marks=pytest.mark.slow),
    ],
    ids=["pissa", "prefix", "tokens", "losses", "dft", "rows", "olora", "patterns", "freeze"],
)
def test_every_method_trains_and_its_result_answers_as_at_the_last_evaluation(root: Path, sets: list[str]) -> None:
    """What is written, opened again as eval does it, gives the answers of the evaluation while training."""
    from sft.generation.load import open_model
    from sft.training.job import sample_answers

    summary = project.run(root, *sets, "train.load_best_model_at_end=false")
    key = "eval/loss" if "dft" in sets[0] else "train/loss"  # that of dft rises where the model is most unsure
    losses = [value for _, value in project.losses(root, "t", key)]
    assert losses[-1] < losses[0]
    output = Path(summary["output"])
    config = runs.run_of_adapter(output)
    kind = {"merged": output} if config.tuning.mode == "full" else {"adapter": output}
    loaded = open_model(config, root=root, **kind)
    rows = [json.loads(line) for line in (root / "data/processed/val.jsonl").read_text().splitlines()[:4]]
    scores, _ = sample_answers(loaded, rows, config, root)(loaded.model)
    assert scores == pytest.approx({name: value for name, value in summary["eval"].items() if name in scores}, abs=1e-6)


@pytest.mark.slow
def test_a_run_goes_on_from_an_adapter_and_from_that_very_one_when_it_resumes(root: Path) -> None:
    first = project.run(root, "train.max_steps=4")
    sets = ("tuning.adapter_path=adapters/last", "train.output_dir=outputs/more")
    second = project.run(root, *sets, "train.warmup_steps=0")
    assert second["train_loss_first"] < first["train_loss_first"] - 0.1
    assert runs.run_of_adapter(root / "adapters/more").tuning.adapter_path == str(root / "adapters/t")
    (root / "outputs/more/finished.json").unlink()
    with pytest.raises(RunError, match="adapter_path: was"):  # adapters/last is another adapter now
        project.run(root, *sets, "train.warmup_steps=0")


def test_full_mode_leaves_a_whole_model_that_loads(root: Path, tiny_qwen2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    summary = project.run(root, "tuning.mode=full", "train.max_steps=2")
    folder = root / "outputs/t/model"
    assert summary["output"] == str(folder)
    assert (root / "outputs/last").resolve() == root / "outputs/t" and not (root / "adapters/t").exists()
    model, base = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    assert not (model.get_input_embeddings().weight == base.get_input_embeddings().weight).all()
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_a_t5_trains_is_scored_resumes_and_merges(
    tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    root = project.make(tmp_path, tiny_t5, mode="full")
    sets = ("train.max_steps=8", "train.rehearsal.rows=auto")
    planned = project.run(root, *sets, dry=True)
    assert (planned["train"]["optim"], planned["train"]["rehearsal"]["rows"]) == ("adafactor", "off")
    assert "encoder-decoder" in planned["reasons"]["train.rehearsal.rows"]
    summary = project.run(root, *sets)
    assert summary["train_loss_last"] < summary["train_loss_first"]
    assert {"loss", "rougeL", "exact_match", "stop_rate", "length_tokens"} <= summary["eval"].keys()
    assert [step for step, _ in project.losses(root, "t", "eval/rougeL")] == [2, 4, 6, 8]
    weights = (root / "outputs/t/model/model.safetensors").read_bytes()
    as_if_killed_after(root, 4)
    project.run(root, *sets)
    assert (root / "outputs/t/model/model.safetensors").read_bytes() == weights
    own = root / "own.jsonl"
    own.write_text('{"user": "Ping?", "assistant": "Pong."}\n')
    adapter = ("tuning.mode=lora", "train.merge_at_end=true", "train.max_steps=2", "train.output_dir=outputs/lora")
    project.run(root, *adapter, "train.rehearsal.rows=1", f"train.rehearsal.path={own}")
    assert json.loads((root / "outputs/lora/ledger.json").read_text())["rehearsal"]["rows_trained"] == 1
    assert (root / "outputs/lora/merged/model.safetensors").is_file()


def test_the_best_metric_may_be_any_that_is_measured_and_the_end_may_merge(root: Path) -> None:
    settings = ("train.metric_for_best_model=length_tokens", "train.max_steps=2", "train.merge_at_end=true")
    summary = project.run(root, *settings)
    assert summary["best_step"] == 2 and "length_tokens" in summary["eval"]
    assert (root / "outputs/t/merged/model.safetensors").is_file()
    assert summary["merged"] == str(root / "outputs/t/merged")
    with pytest.raises(ConfigError, match="'bleurt', which is not measured"):
        project.run(root, "train.metric_for_best_model=bleurt")
    with pytest.raises(ConfigError, match=r"eval\.train_sample is 0"):
        project.run(root, "train.metric_for_best_model=rougeL", "eval.train_sample=0")


def test_a_run_whose_adapter_cannot_be_merged_is_finished_with_a_warning(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("train.merge_at_end=true", "train.max_steps=1", "train.learning_rate=1e-9", "eval.train_sample=0")
    summary = project.run(root, *settings)
    assert summary["merged"] is None and (root / "outputs/t/finished.json").is_file()
    assert not (root / "outputs/t/merged").exists()
    warned = " ".join(capsys.readouterr().err.split())
    assert "t is trained, but not merged: the merge changed nothing" in warned and "try --dtype fp32" in warned
    assert "scripts/merge_lora.py --adapters adapters/t --out outputs/t/merged" in warned


def test_a_checkpoint_whose_answers_do_not_stop_is_never_the_best(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"min_stop_rate is 0.9, but eval\.train_sample is 0"):
        project.run(root, "train.min_stop_rate=0.9", "eval.train_sample=0")
    logging.getLogger("sft").propagate = True
    caplog.set_level(logging.INFO, "sft")
    summary = project.run(root, "train.min_stop_rate=1.0", "train.max_steps=2", "generation.max_new_tokens=1")
    assert summary["eval"]["stop_rate"] < 1.0 and summary["best_step"] is None
    assert "too few for the best checkpoint (train.min_stop_rate)" in caplog.text


@pytest.mark.parametrize(("sets", "most"), [(["train.batch_size=2"], 2), (["train.grad_accum=8"], 1), ([], 8)])
def test_an_explicit_batch_size_caps_the_rows_of_a_micro_batch(
    root: Path, sets: list[str], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, rows = step.token_losses, list[int]()

    def token_losses(model: Any, micro: Any, config: Any) -> Any:
        rows.append(len(micro.rows))
        return real(model, micro, config)

    monkeypatch.setattr(step, "token_losses", token_losses)
    project.run(root, *sets, "train.max_steps=1", "train.effective_batch=8", "eval.train_sample=0")
    assert max(rows) == most


def test_a_dry_run_shows_the_settings_and_writes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(root.rglob("*"))
    shown = project.run(root, dry=True)
    assert (shown["run"], shown["steps"], shown["rows"]) == ("t", 6, 20)
    assert sorted(path for path in root.rglob("*") if ".cache" not in path.parts) == before
    printed = capsys.readouterr().out
    assert "a new run: outputs/t" in printed and "bf16 is off: fp32 on the CPU" in printed


def test_two_runs_in_one_folder_are_refused_with_the_holders_pid(root: Path) -> None:
    (root / "outputs/t").mkdir(parents=True)
    with files.lock(root / "outputs/t" / runs.LOCK, "t"), pytest.raises(RunError, match="in use by another process"):
        project.run(root)


def test_a_folder_that_is_not_writable_is_refused_before_weights_are_loaded(root: Path) -> None:
    (root / "outputs").write_text("a file, where the folder should be")
    with pytest.raises(RunError, match="cannot be written to"):
        project.run(root)


def test_the_real_qwen_tokenizer_trains_with_its_own_template(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/qwen2.5")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = Qwen2Config(vocab_size=151936, num_key_value_heads=1, tie_word_embeddings=True, **sizes)
    Qwen2ForCausalLM(settings).save_pretrained(tmp_path / "model")
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    root = project.make(tmp_path, tmp_path / "model", mode="qlora")
    summary = project.run(root, "train.max_steps=2", "eval.train_sample=2")
    assert summary["steps"] == 2
    saved = AutoTokenizer.from_pretrained(root / "adapters/t")
    assert saved.chat_template == tokenizer.chat_template
    assert (saved.pad_token, saved.eos_token) == ("<|endoftext|>", "<|im_end|>")
