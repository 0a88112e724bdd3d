"""The model of a run opened again: adapters on their base, the base alone, whole weights; and its rows answered."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sft import runs
from sft.config.load import load
from sft.data import rows as records
from sft.data import store
from sft.errors import DataError, ModelError, RunError
from sft.generation import decode, evaluate
from sft.generation import load as serving
from sft.model import hardware
from sft.model import load as model_load
from sft.training.job import sample_answers
from tests import tiny_models
from tests.generation import tiny_runs


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    root = tiny_runs.project(tmp_path_factory.mktemp("project"), tiny_qwen2)
    tiny_runs.finished_run(root)
    return root


def chosen(root: Path, *sets: str, **kwargs: Any) -> serving.Target:
    return serving.resolve_model(root / "configs" / "run_bnb.yaml", list(sets), is_default=True, root=root, **kwargs)


def rows_of(root: Path, split: str = "test") -> list[dict[str, Any]]:
    return store.read_rows(root / "data" / "processed" / f"{split}.jsonl")


def sides(
    target: serving.Target, names: list[str], rows: list[dict[str, Any]], root: Path, on_progress: Any = None
) -> dict[str, evaluate.Evaluation]:
    return evaluate.evaluate_sides(target, names, rows, root, on_progress)


def test_an_adapter_changes_the_answers_and_switched_off_gives_those_of_the_base(project: Path) -> None:
    target = chosen(project)
    assert (target.name, target.adapter) == ("tiny", project / "adapters" / "tiny")
    served = serving.open_model(target.config, adapter=target.adapter, root=project)
    base = serving.open_model(target.config, root=project)
    rows = rows_of(project)
    tuned = serving.answer_all(served, rows, target.config)
    with served.base_only():
        off = serving.answer_all(served, rows, target.config)
    assert off == serving.answer_all(base, rows, target.config)
    assert off != tuned
    assert serving.answer_all(served, [None, rows[0]], target.config) == [None, tuned[0]]


def test_one_load_scores_both_sides_as_two_loads_would(project: Path) -> None:
    target, rows = chosen(project), rows_of(project)
    done: list[tuple[int, int]] = []
    both = sides(target, ["tuned", "base"], rows, project, lambda *at: done.append(at))
    base = sides(target, ["base"], rows, project)
    assert both["base"].metrics == pytest.approx(base["base"].metrics, rel=1e-5)
    assert both["tuned"].metrics["loss"] != pytest.approx(both["base"].metrics["loss"], rel=1e-5)
    assert done[-1] == (14, 14)
    assert math.log(both["tuned"].metrics["perplexity"]) == pytest.approx(both["tuned"].metrics["loss"])


def test_the_loss_is_the_mean_over_labelled_tokens(project: Path) -> None:
    target, rows = chosen(project), rows_of(project)
    served = serving.open_model(target.config, adapter=target.adapter, root=project)
    total, count = 0.0, 0
    for row in rows:
        encoded = served.encoder.encode(row)
        logits = served.model(torch.tensor([encoded.input_ids])).logits[0, :-1].float()
        labels = torch.tensor(encoded.labels[1:])
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    assert evaluate.losses(served, rows, target.config)[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_conversation_too_long_loses_its_oldest_turns(project: Path) -> None:
    target = chosen(project, "generation.max_new_tokens=512")
    served = serving.open_model(target.config, root=project)
    turns = [
        {"role": role, "content": f"{role} {i} " + "word " * 30} for i in range(12) for role in ("user", "assistant")
    ]
    messages = [{"role": "system", "content": "S"}, *turns, {"role": "user", "content": "last"}]
    ids, lost = served.prompt(messages, target.config.generation)
    limit = served.max_prompt_tokens(target.config.generation)
    assert limit == 512 and len(ids) <= limit and 0 < lost < 12
    text = served.tokenizer.decode(ids)
    assert "<|im_start|>system\nS<|im_end|>" in text and "last" in text
    assert "user 0 " not in text and f"user {lost} " in text and f"user {lost - 1} " not in text
    assert served.prompt(messages[-1:], target.config.generation)[1] == 0


def test_answers_that_loop_are_cut_and_counted(tmp_path: Path, tiny_qwen2: Path) -> None:
    root = tiny_runs.project(tmp_path, tiny_qwen2)
    tiny_runs.finished_run(root, seed=3, scale=0.1)  # these weights repeat themselves
    target = chosen(root, "generation.max_new_tokens=400", "generation.stop_loops=true")
    (tuned,) = sides(target, ["tuned"], rows_of(root), root).values()
    looped = [sample for sample in tuned.samples if sample.get("looped")]
    assert tuned.metrics["loop_rate"] == len(looped) / 7 > 0.5
    assert all(sample["tokens"] < 400 and not sample["stopped"] for sample in looped)


@pytest.mark.parametrize("proven", [True, False])  # by our own loop, and by transformers' generate
def test_chat_batch_evaluation_and_training_generate_the_same_text(
    proven: bool, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PROVEN", decode.PROVEN if proven else frozenset())
    root, target = project, chosen(project, "generation.max_new_tokens=40", "generation.repetition_penalty=1.2")
    config, served = target.config, serving.open_model(target.config, adapter=target.adapter, root=project)
    long = {"messages": [{"role": role, "content": "word " * 60} for role in ("user", "assistant") * 8]}
    rows = [*rows_of(root), long]  # the last loses its oldest turns, everywhere the same ones
    batch = [answer.text for answer in serving.answer_all(served, rows, config) if answer is not None]
    chat = ["".join(served.stream(records.messages(row)[:-1], config.generation)) for row in rows]
    measured = [sample["prediction"] for sample in evaluate.evaluate(served, rows, config, root).samples]
    assert len(set(batch)) > 1 and batch == chat == measured
    answers = sample_answers(served, rows, config, root)
    _, samples = answers(served.model.train())
    assert batch[0] in samples


def test_a_question_longer_than_the_context_is_refused_in_a_chat(project: Path) -> None:
    target = chosen(project, "generation.max_new_tokens=512")
    served = serving.open_model(target.config, root=project)
    for words, fix in ((100, r"/set max_new_tokens \d+"), (2000, "fix:   shorten it$")):
        with pytest.raises(DataError, match=rf"(?s)this question is too long: .* the model reads 512.*{fix}"):
            next(served.stream([{"role": "user", "content": "question " * words}], target.config.generation))


def test_an_adapter_of_another_base_is_refused(project: Path, tmp_path: Path) -> None:
    other = tiny_models.tiny_qwen2(tmp_path / "other", seed=5)
    target = chosen(project, f"model.name={other}")
    with pytest.raises(ModelError, match=r"(?s)base"):
        serving.open_model(target.config, adapter=target.adapter, root=project)


def test_a_full_fine_tune_is_opened_from_its_own_weights(tmp_path: Path, tiny_qwen2: Path) -> None:
    root = tiny_runs.project(tmp_path, tiny_qwen2, mode="full")
    run = runs.at(root / "outputs" / "tiny", root)
    run.folder.mkdir(parents=True)
    tiny_models.tiny_qwen2(run.model_dir, seed=9)
    runs.write_resolved(run.folder, load(root / "configs" / "run_bnb.yaml", root=root).config)
    runs.point_last(run, root)
    target = chosen(root)
    assert (target.adapter, target.merged, target.name) == (None, run.model_dir, "tiny")
    evaluations = sides(target, ["tuned", "base"], rows_of(root), root)
    assert evaluations["tuned"].metrics["loss"] != evaluations["base"].metrics["loss"]
    assert chosen(root, merged=run.model_dir).run == run


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_t5"])
def test_other_families_are_evaluated(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = tiny_runs.project(tmp_path, request.getfixturevalue(family))
    target = chosen(root, base=True)
    evaluations = sides(target, ["base"], rows_of(root), root)["base"]
    assert 0 < evaluations.metrics["loss"] < 20 and 0 <= evaluations.metrics["stop_rate"] <= 1
    assert len(evaluations.samples) == 7


def test_a_four_bit_run_is_opened_in_four_bits(tmp_path: Path, tiny_qwen2: Path) -> None:
    root = tiny_runs.project(tmp_path, tiny_qwen2, mode="qlora")
    tiny_runs.finished_run(root)
    target = chosen(root)
    served = serving.open_model(target.config, adapter=target.adapter, root=root)
    assert served.model.get_base_model().is_loaded_in_4bit
    assert all(answer is not None and answer.ids for answer in serving.answer_all(served, rows_of(root), target.config))


def test_a_chat_loads_in_four_bits_where_memory_is_short(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target, card = chosen(project), hardware.probe()
    monkeypatch.setattr(hardware, "probe", lambda: dataclasses.replace(card, free_bytes=100_000))
    caplog.set_level("WARNING", logger="sft")
    logging.getLogger("sft").propagate = True
    served = serving.open_model(target.config, adapter=target.adapter, root=project, low_memory="4bit")
    assert served.model.get_base_model().is_loaded_in_4bit and "it is loaded in 4 bits" in caplog.text
    assert list(served.stream([{"role": "user", "content": "What is 2 + 2?"}], target.config.generation))
    assert list(served.stream_base([{"role": "user", "content": "What is 2 + 2?"}], target.config.generation))


def test_merged_weights_larger_than_the_free_gpu_memory_are_opened_in_four_bits_or_on_the_cpu(
    project: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card = dataclasses.replace(hardware.probe(), device="cuda", free_bytes=100_000)
    monkeypatch.setattr(hardware, "probe", lambda: card)
    calls: list[dict[str, Any]] = []
    real = model_load.load_base

    def load_base(*args: Any, **kwargs: Any) -> Any:
        calls.append({"device": kwargs["device"], "quantise": kwargs["quantise"]})
        return real(*args, **{**kwargs, "device": "cpu"})

    monkeypatch.setattr(model_load, "load_base", load_base)
    caplog.set_level("WARNING", logger="sft")
    logging.getLogger("sft").propagate = True
    target = chosen(project, merged=tiny_qwen2)
    quantised = serving.open_model(target.config, merged=target.merged, root=project)
    assert calls == [{"device": "cuda:0", "quantise": True}] and quantised.model.is_loaded_in_4bit
    assert "it is loaded in 4 bits" in caplog.text
    whole = serving.open_model(target.config, merged=tiny_qwen2, root=project, dtype=torch.float16, low_memory="cpu")
    assert calls[1:] == [{"device": "cpu", "quantise": False}] and whole.device == "cpu"
    assert whole.model.dtype == torch.float16 and "it is loaded on the CPU" in caplog.text


def test_settings_come_from_the_run_the_config_and_set_in_that_order(project: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "model: {name: another/model}\ntrain: {output_dir: outputs/else}\ngeneration: {max_new_tokens: 5, top_k: 9}\n"
    )

    def settings(*sets: str, default: bool = False) -> Any:
        return serving.resolve_model(mine, list(sets), is_default=default, root=project).config

    named = settings("generation.top_k=3")
    assert (named.generation.max_new_tokens, named.generation.top_k) == (5, 3)
    assert named.eval.batch_size == 4 and named.model.name != "another/model"
    assert settings(default=True).generation.max_new_tokens == 12
    mine.write_text(mine.read_text().replace("outputs/else", "outputs/tiny"))
    assert settings(default=True).generation.max_new_tokens == 5


def test_an_adapter_belongs_to_the_run_that_wrote_it(tmp_path: Path, tiny_qwen2: Path) -> None:
    root = tiny_runs.project(tmp_path, tiny_qwen2)
    second = tiny_runs.finished_run(root, name="tiny-2")  # the second run of train.output_dir outputs/tiny
    target = chosen(root, adapters=second)
    assert target.run is not None and target.run.folder == root / "outputs" / "tiny-2" == chosen(root).run.folder
    shutil.copytree(second, root / "adapters" / "copy")
    shutil.copytree(second, tmp_path / "else" / "tiny-2")
    for copy in (root / "adapters" / "copy", tmp_path / "else" / "tiny-2"):
        assert (chosen(root, adapters=copy).run, chosen(root, adapters=copy).name) == (None, copy.name)


def test_without_a_run_only_the_base_can_be_opened(tmp_path: Path, tiny_qwen2: Path) -> None:
    root = tiny_runs.project(tmp_path, tiny_qwen2)
    with pytest.raises(RunError, match="no trained model yet"):
        chosen(root)
    base = chosen(root, base=True)
    assert (base.name, base.tuned, base.run) == ("base", False, None)
    for flags, problem in [
        ({"adapters": tmp_path}, "there is no adapter in"),
        ({"merged": tmp_path / "x"}, "there is no model folder"),
        ({"adapters": tmp_path, "merged": tmp_path}, "name two models"),
    ]:
        with pytest.raises(ModelError, match=problem):
            chosen(root, **flags)


def test_the_system_text_that_all_training_rows_share_is_the_default(project: Path, tmp_path: Path) -> None:
    config = chosen(project).config
    adapter = project / "adapters" / "tiny"
    assert serving.system_text(config, adapter, project) == tiny_runs.SYSTEM
    rows = tiny_runs.rows(2)
    assert records.shared_system_text([rows[0], {**rows[1], "system": "else"}]) is None
    assert records.shared_system_text([rows[0], {**rows[1], "system": ""}]) is None
    assert records.shared_system_text([]) is None
    (tmp_path / "serving.json").write_text('{"system": "other"}')
    assert serving.system_text(config, tmp_path, project) == "other"
    (tmp_path / "serving.json").write_text("[")
    with pytest.raises(ModelError, match="not a JSON object"):
        serving.system_text(config, tmp_path, project)


def test_a_row_without_an_answer_cannot_be_scored(project: Path) -> None:
    target = chosen(project)
    served = serving.open_model(target.config, root=project)
    row = {"messages": [{"role": "user", "content": "hello"}], "origin": "rows.jsonl:3"}
    with pytest.raises(DataError, match="no answer to compare with") as error:
        evaluate.evaluate(served, [row], target.config, project)
    assert error.value.where == "rows.jsonl:3"
