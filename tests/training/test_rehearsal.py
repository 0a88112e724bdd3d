"""Rehearsal: which data is narrow, what the base answers, how its answers are mixed in, what a resume reads."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.chat.dataset import RunLedger, TokenisedRows
from sft.config.schema import ContaminationSection, RehearsalSection
from sft.data.contamination import Contamination
from sft.data.rows import RowFault
from sft.errors import ConfigError, DataError, ModelError, RunError
from sft.step.batch import Collator, count_labels
from sft.training import distributed, rehearsal
from sft.training.loop import TrainingLoop, step_batches
from sft.training.rehearsal import Rehearsal
from tests.conftest import ROOT
from tests.training import bench, project


def of(task: list[int], extra: list[int], share: float, seed: int = 42) -> Rehearsal:
    features = [{"id": f"r{at}", "input_ids": [1], "labels": [1]} for at in range(len(extra))]
    return Rehearsal([], features, RunLedger(), np.array([*task, *extra]), share, seed)


# -- the mix


def test_after_every_step_the_share_is_as_close_as_whole_rows_allow() -> None:
    task, extra = [5, 7, 3, 9, 4, 6, 8, 2, 5, 5], [4, 11, 2, 6]
    steps = [step for epoch in range(5) for step in step_batches(10, 4, 42, epoch)]
    mixed = list(of(task, extra, 0.2).mix(steps))
    assert [rows[: len(step)] for rows, step in zip(mixed, steps, strict=True)] == steps  # the task's own steps
    added = [[row - 10 for row in rows[len(step) :]] for rows, step in zip(mixed, steps, strict=True)]
    order = [row for rows in added for row in rows]
    due, done, count = 0.0, 0, 0
    for step, rows in zip(steps, added, strict=True):
        due += sum(task[row] for row in step) * 0.2 / 0.8
        done, count = done + sum(extra[row] for row in rows), count + len(rows)
        if count < len(order):  # a row more would not be closer
            assert abs(due - done) <= abs(due - done - extra[order[count]])
        if rows:  # nor a row less
            assert abs(due - done) <= abs(due - done + extra[rows[-1]])
    assert count > 8 and all(sorted(order[at : at + 4]) == [0, 1, 2, 3] for at in range(0, len(order) - 3, 4))


def test_a_step_depends_on_seed_and_the_steps_before_it_alone() -> None:
    steps = [step for epoch in range(2) for step in step_batches(40, 8, 1, epoch)]
    task, extra = list(range(3, 43)), list(range(2, 14))
    first = list(of(task, extra, 0.15).mix(steps))
    assert first == list(of(task, extra, 0.15).mix(iter(steps)))
    assert first[:4] == list(of(task, extra, 0.15).mix(steps[:4]))
    assert first != list(of(task, extra, 0.15, seed=7).mix(steps))


@pytest.mark.parametrize("done", [0, 7])
def test_ranks_share_the_same_mixed_steps(done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(rank: int, world: int) -> list[tuple[int, list[int]]]:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world", lambda: world)
        loop: Any = SimpleNamespace(
            progress=SimpleNamespace(global_step=done),
            settings=SimpleNamespace(effective_batch=4, seed=42),
            schedule=SimpleNamespace(steps_per_epoch=3),
            rows=range(14),
            rehearsal=of([5, 7, 3, 9, 4, 6, 8, 2, 5, 5], [4, 11, 2, 6], 0.3),
        )
        return list(itertools.islice(TrainingLoop._remaining_steps(loop), 5))

    whole, first, second = steps(0, 1), steps(0, 2), steps(1, 2)
    assert [epoch for epoch, _ in whole] == [(done + at) // 3 for at in range(5)]
    assert any(row >= 10 for _, rows in whole for row in rows)
    for (_, rows), (_, even), (_, odd) in zip(whole, first, second, strict=True):
        assert rows[::2] == even and rows[1::2] == odd


def test_losses_are_counted_as_the_step_counts_them() -> None:
    rows = [*bench.features(9), {"id": "all", "input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    rows.append({"id": "none", "input_ids": [3], "labels": [-100]})
    table = TokenisedRows().joined(rows[:6]).joined(rows[6:])
    assert [row["id"] for row in table] == [row["id"] for row in rows]
    counts = rehearsal.loss_counts(table, causal=True).tolist()
    assert counts == [count_labels(Collator()([row])) for row in rows] and counts[9] == 2
    assert rehearsal.loss_counts(table, causal=False).tolist()[9] == 3


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run_with_rehearsal_resumes_bit_for_bit(tiny_qwen2: Path, tmp_path: Path, mode: str) -> None:
    extra = bench.features(5, seed=9)
    losses = rehearsal.loss_counts(TokenisedRows().joined([*bench.features(10), *extra]), causal=True)
    mixed = Rehearsal([{"id": "x", "user": "a", "assistant": "b"}], extra, RunLedger(), losses, 0.3, 42)
    every_step = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 99, "load_best_model_at_end": False}
    out = tmp_path / "outputs" / "a"
    settings = bench.config(tiny_qwen2, out, tuning={"mode": mode}, train=every_step)
    straight = bench.make_loop(settings, rehearsal=mixed)
    straight.fit()
    assert straight.progress.global_step == 9  # three epochs of 10 rows in steps of 4: rehearsal adds no step
    share = (straight.progress.labelled - 3 * int(losses[:10].sum())) / straight.progress.labelled
    assert abs(share - 0.3) < 0.05
    copy = Path(shutil.copytree(out, tmp_path / "outputs" / "b"))
    again = bench.make_loop(bench.config(tiny_qwen2, copy, tuning={"mode": mode}, train=every_step), rehearsal=mixed)
    again.fit(copy / "checkpoint-4")
    pairs = zip(bench.trained(straight).values(), bench.trained(again).values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert again.progress.labelled == straight.progress.labelled
    stored = json.loads((copy / "checkpoint-9" / "rehearsal.json").read_text())
    assert stored == {"rows": [{"id": "x", "user": "a", "assistant": "b"}]}


# -- which data is narrow


def answers_of(path: Path, key: str) -> TokenisedRows:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "demo")
    rows = [json.loads(line)[key] for line in path.read_text(encoding="utf-8").splitlines()]
    ids = tokenizer(rows, add_special_tokens=False)["input_ids"]
    return TokenisedRows().joined([{"id": "x", "input_ids": one, "labels": one} for one in ids])


def faq_answers() -> list[str]:
    return [json.loads(line)["answer"] for line in (ROOT / "data/samples/faq.jsonl").read_text().splitlines()]


def test_tickets_are_narrow_and_a_shops_answers_are_not() -> None:
    assert rehearsal.effective_vocabulary(answers_of(ROOT / "data/samples/support_desk.jsonl", "assistant"), []) < 100
    assert rehearsal.effective_vocabulary(answers_of(ROOT / "data/samples/faq.jsonl", "answer"), []) > 180


def test_the_effective_vocabulary_is_two_to_the_entropy_and_leaves_end_tokens_out() -> None:
    labels = [[-100, 5, 6, 2], [-100, 7, 8, 2], [-100, 5, 6, 2], [-100, 7, 8, 2]]
    rows = TokenisedRows().joined([{"id": "x", "input_ids": one, "labels": one} for one in labels])
    assert rehearsal.effective_vocabulary(rows, [2]) == pytest.approx(4)
    assert rehearsal.effective_vocabulary(rows, [2, 7, 8]) == pytest.approx(2)


# -- the questions


def test_shipped_questions_are_many_broad_and_none_of_the_reports() -> None:
    rows = rehearsal.read_questions(RehearsalSection(), ROOT)
    assert 140 <= len(rows) == len({row["user"].casefold() for row in rows}) == len({row["id"] for row in rows})
    kinds = {row["id"].split(":")[1].rsplit("-")[0] for row in rows}
    assert kinds == {row["id"].split(":")[1].rsplit("-")[0] for row in rows[:16]} and len(kinds) == 8
    general = Contamination(ContaminationSection(against=["data/samples/general.jsonl"], ngram=5), ROOT)
    for row in rows:  # shares neither a whole question nor five words in a row
        general.check({"user": row["user"], "assistant": ""})
    with pytest.raises(RowFault):
        general.check({"user": "What is the capital of France?", "assistant": ""})


def test_a_question_that_cannot_be_read_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for text, where, what in (
        ('{"user": "a"}\n\n{"question": "b"}\n', "q.jsonl:3", "`user` is not text"),
        ('{"user": "a"}\n{"user": \n', "q.jsonl:2", "JSON"),
        ("\n", "q.jsonl", "no question"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=what) as error:
            rehearsal.read_questions(RehearsalSection(path=str(path)), tmp_path)
        assert str(error.value.where).endswith(where)
    with pytest.raises(DataError, match="No such file"):
        rehearsal.read_questions(RehearsalSection(path="none.jsonl"), tmp_path)


# -- runs


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    return project.make(tmp_path, ROOT / "models" / "demo", rows=70)


def ledger(root: Path, name: str = "t") -> dict[str, Any]:
    value = json.loads((root / "outputs" / name / "ledger.json").read_text())
    assert isinstance(value, dict)
    return value


def test_a_number_of_rows_is_used_whatever_the_data_and_a_resume_reads_the_same_answers(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging.getLogger("sft").propagate = True
    caplog.set_level(logging.INFO, "sft")
    sets = (
        "train.rehearsal.rows=12",
        "train.rehearsal.share=0.3",
        "train.save_strategy=steps",
        "train.eval_strategy=no",
    )
    project.run(root, *sets)
    rehearsed = ledger(root)["rehearsal"]
    assert rehearsed["rows_read"] == 12 == rehearsed["rows_trained"] + sum(rehearsed["reasons"].values())
    assert rehearsed["rows_trained"] > 2
    stored = json.loads((root / "outputs/t/checkpoint-2/rehearsal.json").read_text())["rows"]
    assert [row["user"] for row in stored] == [
        row["user"] for row in rehearsal.read_questions(RehearsalSection(), ROOT)[:12]
    ]
    assert sum(bool(row["assistant"]) for row in stored) == rehearsed["rows_trained"]
    summary = json.loads((root / "outputs/t/finished.json").read_text())
    weights = (root / "adapters/t/adapter_model.safetensors").read_bytes()

    for path in (root / "outputs/t/finished.json", *(root / "outputs/t").glob("checkpoint-[46]")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(root / ".cache")
    with pytest.raises(RunError, match=r"rehearsal\.rows: was 12, is 11"):
        project.run(root, "train.rehearsal.rows=11", *sets[1:])
    with pytest.raises(RunError, match="rehearsal: was 12 questions, is off"):
        project.run(root, "train.rehearsal.rows=off", *sets[1:])

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a resumed run asks the base nothing")

    monkeypatch.setattr(rehearsal, "_generate", refuse)
    again = project.run(root, *sets)
    assert again["labelled_tokens"] == summary["labelled_tokens"]
    assert (root / "adapters/t/adapter_model.safetensors").read_bytes() == weights
    monkeypatch.undo()
    assert "rehearsal: " in caplog.text


def test_answers_of_the_base_are_stored_and_used_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project.run(root, "train.rehearsal.rows=8", "train.max_steps=1", "train.eval_strategy=no")
    first = json.loads((root / "outputs/t/checkpoint-1/rehearsal.json").read_text())
    calls: list[Any] = []
    monkeypatch.setattr(rehearsal, "_generate", lambda *args: calls.append(args))
    project.run(root, "train.rehearsal.rows=8", "train.max_steps=1", "train.eval_strategy=no", "train.seed=3")
    assert not calls and json.loads((root / "outputs/t-2/checkpoint-1/rehearsal.json").read_text()) == first


def test_auto_gives_up_early_on_a_base_that_completes_nothing(
    tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    model, certain = AutoModelForCausalLM.from_pretrained(tiny_qwen2), tmp_path / "certain"
    model.model.norm.weight.data *= 1000  # one token has all the probability, and it is never the end
    model.save_pretrained(certain)
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(certain)
    project.make(tmp_path, certain, rows=70)
    logging.getLogger("sft").propagate = True
    caplog.set_level(logging.INFO, "sft")
    planned = project.run(tmp_path, dry=True)
    assert planned["train"]["rehearsal"]["rows"] == 48  # as many as these few rows can use
    assert 100 < planned["rehearsal_tokens"] < 400
    assert "narrow (below" in planned["reasons"]["train.rehearsal.rows"]
    assert not (tmp_path / ".cache/base_answers").exists()  # a dry run asks nothing
    sets = ("train.max_steps=2", "train.save_strategy=steps", "train.save_steps=1", "train.eval_strategy=no")
    project.run(tmp_path, *sets)
    assert "no rehearsal: the base ended only 0 of" in caplog.text
    assert "rehearsal" not in ledger(tmp_path)
    assert json.loads((tmp_path / "adapters/t/backend.json").read_text())["rehearsal"] == "off"
    (tmp_path / "outputs/t/finished.json").unlink()
    shutil.rmtree(tmp_path / "outputs/t/checkpoint-2")
    monkeypatch.setattr(rehearsal, "_generate", lambda *_: pytest.fail("asked again"))
    assert project.run(tmp_path, *sets)["steps"] == 2
    with pytest.raises(ModelError, match=r"no general answer for train\.rehearsal: 3 rows: the base did not end"):
        monkeypatch.undo()
        monkeypatch.setenv("SFT_ROOT", str(tmp_path))
        project.run(tmp_path, "train.rehearsal.rows=3", *sets)


def test_auto_is_off_for_few_or_varied_rows_and_off_is_off(root: Path) -> None:
    assert project.run(root, "train.rehearsal.rows=off", dry=True)["train"]["rehearsal"]["rows"] == "off"
    project.make(root, ROOT / "models" / "demo", rows=63)
    few = project.run(root, dry=True)
    assert few["train"]["rehearsal"]["rows"] == "off"
    assert few["reasons"]["train.rehearsal.rows"] == "fewer than 64 training rows"
    path = root / "data/processed/train.jsonl"
    lines = [{"user": f"Question {at}?", "assistant": text} for at, text in enumerate(faq_answers() * 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    varied = project.run(root, dry=True)
    assert varied["train"]["rehearsal"]["rows"] == "off"
    assert "equally frequent tokens (narrow: below 150)" in varied["reasons"]["train.rehearsal.rows"]


def test_ones_own_questions_and_answers(root: Path) -> None:
    own = root / "own.jsonl"
    own.write_text(
        '{"user": "Ping?", "assistant": "Pong."}\n{"user": "Who?", "assistant": "Me.", "system": "Be brief"}\n'
    )
    sets = (f"train.rehearsal.path={own}", "train.max_steps=2", "train.eval_strategy=no")
    with pytest.raises(ConfigError, match=r"rows is 3, but own\.jsonl has 2 questions"):
        project.run(root, "train.rehearsal.rows=3", *sets)
    project.run(root, "train.rehearsal.rows=2", *sets)
    assert ledger(root)["rehearsal"]["rows_trained"] == 2
    assert not (root / ".cache/base_answers").exists()


def test_every_other_row_has_the_tasks_system_text() -> None:
    from sft.chat.encode import build_encoder
    from sft.config.schema import Config

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "demo")
    config = Config.model_validate({"model": {"max_seq_len": 40}})
    encoder = build_encoder(config, tokenizer, "causal", ROOT)
    rows = [{"id": f"r{at}", "user": "Ping?", "assistant": "Pong."} for at in range(4)]
    rows.append({"id": "own", "user": "Ping?", "assistant": "Pong.", "system": "Mine."})
    rows += [{"id": "long", "user": "Ping? " * 50, "assistant": "Pong."}, {"id": "open", "user": "a", "assistant": ""}]
    made, joined = rehearsal.make(rows, TokenisedRows(), encoder, config, "Be terse.")
    texts = [tokenizer.decode(row["input_ids"]) for row in made.features]
    assert ["terse" in text for text in texts] == [True, False, True, False, False] and "Mine." in texts[4]
    assert made.ledger.dropped == {"over length": ["long"], rehearsal.INCOMPLETE: ["open"]}
    assert len(joined) == 5 and RehearsalSection().share == made.share
