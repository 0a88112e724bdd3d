"""Rows as questions: which answers are evaluated, examples in front, several correct answers, tags, long prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft.errors import ConfigError
from sft.generation import engine, evaluate, load
from sft.generation.evaluate import Question, answerable
from sft.generation.evaluate import questions as build
from tests.generation import tiny_runs


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    return tiny_runs.project(tmp_path_factory.mktemp("questions"), tiny_qwen2)


@pytest.fixture(scope="module")
def served(project: Path) -> engine.LoadedModel:
    return load.open_model(config(project), root=project)


def config(root: Path, *sets: str) -> Any:
    return load.resolve_model(
        root / "configs" / "run_bnb.yaml", list(sets), base=True, is_default=True, root=root
    ).config


def questions(
    served: engine.LoadedModel, rows: list[dict[str, Any]], config: Any, root: Path = Path()
) -> list[Question]:
    return build(lambda row: served.prompt(row, config.generation), rows, config, root)


def conversation(*turns: str, **extra: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "id": "c",
        "messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(turns)],
        **extra,
    }


def text(served: engine.LoadedModel, ids: list[int]) -> str:
    return str(served.tokenizer.decode(ids))


def test_the_last_answer_is_evaluated_or_every_one(project: Path, served: engine.LoadedModel) -> None:
    row = conversation("one", "1", "two", "2", "three")  # the last question has no answer to compare with
    (last,) = questions(served, [row], config(project))
    assert (last.id, last.source, last.reference) == ("c", "two", "2")
    assert text(served, last.ids).endswith("two<|im_end|>\n<|im_start|>assistant\n") and "three" not in text(
        served, last.ids
    )
    both = questions(served, [row], config(project, "eval.turns=all"))
    assert [(one.id, one.source, one.reference) for one in both] == [("c#0", "one", "1"), ("c#1", "two", "2")]
    called = conversation("one", "1", "two")
    called["messages"].append({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]})
    (words,) = questions(served, [called], config(project))  # a call is no answer in words
    assert (words.source, words.options) == ("one", ["1"])
    assert not answerable(conversation("one")) and not answerable({"messages": called["messages"][1:2]})
    assert both[1].ids == last.ids and "<|im_start|>user\none" in text(served, last.ids)


def test_examples_come_first_and_are_never_the_row_itself(project: Path, served: engine.LoadedModel) -> None:
    train = tiny_runs.rows(12)
    built = questions(served, train, config(project, "eval.shots=4"), project)
    for row, question in zip(train, built, strict=True):
        prompt = text(served, question.ids)
        assert prompt.count("<|im_start|>user") == 5 and prompt.count("<|im_start|>system") == 1
        assert prompt.count(f"user\n{row['user']}<|im_end|>") == 1  # as the question, and not as an example
    again = questions(served, train, config(project, "eval.shots=4"), project)
    assert [one.ids for one in again] == [one.ids for one in built]
    other = questions(served, train, config(project, "eval.shots=4", "generation.seed=5"), project)
    assert [one.ids for one in other] != [one.ids for one in built]
    with pytest.raises(ConfigError, match="has 12 rows of one question"):
        questions(served, train, config(project, "eval.shots=13"), project)


def test_a_prompt_too_long_loses_examples_and_turns_with_a_warning(
    project: Path, served: engine.LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="sft")
    row = conversation("first " * 200, "1", "second " * 200, "2", "last", "3")
    (question,) = questions(served, [row], config(project, "generation.max_new_tokens=700", "eval.shots=2"), project)
    assert question.turns_removed == 4 and text(served, question.ids).count("<|im_start|>user") == 1
    assert text(served, question.ids).count("last") == 1
    assert "1 prompts are too long for the model: their oldest 4 turns were removed" in caplog.text


def test_several_correct_answers_and_tags_reach_the_scores(project: Path, served: engine.LoadedModel) -> None:
    rows = [conversation(f"q{i}", "ref", references=["ref", "else"], tags=["even"][: 1 - i % 2]) for i in range(3)]
    rows.append(conversation("q3", "ref", category="other"))
    built = questions(served, rows, config(project))
    assert [one.options for one in built] == [["ref", "else"]] * 3 + [["ref"]]
    answers = load.answer_all(served, rows, config(project))
    else_answers = [replace(answer, text="else") for answer in answers if answer is not None]
    evaluation = evaluate.score_answers(built, else_answers, config(project), project)
    assert evaluation.metrics["exact_match"] == 0.75
    assert {tag: (values["rows"], values["exact_match"]) for tag, values in evaluation.by_tag.items()} == {
        "even": (2, 1.0), "other": (1, 0.0),
    }  # fmt: skip
    assert evaluation.samples[0]["references"] == ["ref", "else"] and evaluation.samples[0]["tags"] == ["even"]
