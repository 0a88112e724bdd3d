"""Requests answered as they arrive: the same text as one by one, whoever else is in the batch; adapters on one base."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sft.generation import load
from sft.generation.requests import Models, RunningBatch, serve, tool_calls
from tests.generation import tiny_runs
from tests.tiny_models import tiny_t5

QUESTIONS = [f"What is {n} + {n}?" + " Please answer." * (7 * n % 5) for n in range(8)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    return tiny_runs.two_runs(tmp_path_factory.mktemp("requests"), tiny_qwen2)


def models(root: Path) -> Models:
    return Models(root / "configs" / "run_bnb.yaml", [], is_default=True, root=root)


def ask(id_: Any, model: str, question: str, **more: Any) -> dict[str, Any]:
    return {"id": id_, "model": model, "messages": [{"role": "user", "content": question}], **more}


def answered(root: Path, *entries: dict[str, Any] | str, served: Models | None = None) -> dict[Any, dict[str, Any]]:
    """Each request's text, its pieces, and what came at its end."""
    result: dict[Any, dict[str, Any]] = {}

    def send(event: dict[str, Any]) -> None:
        place = result.setdefault(event["id"], {"text": "", "pieces": 0})
        place["text"] += event.get("text", "")
        place["pieces"] += "text" in event
        place |= {key: event[key] for key in ("done", "error", "status") if key in event}

    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    serve(lines, send, served or models(root))
    return result


def one_by_one(root: Path, name: str, questions: list[str]) -> list[str]:
    """The answers of `infer` to each question alone."""
    flags: dict[str, Any] = {"base": True} if name == "base" else {"adapters": root / "adapters" / name}
    target = load.resolve_model(root / "configs" / "run_bnb.yaml", [], is_default=True, root=root, **flags)
    loaded = load.open_model(target.config, adapter=None if name == "base" else target.adapter, root=root)
    system = load.system_text(target.config, target.folder, root)
    texts = []
    for question in questions:
        row = {"messages": [{"role": "system", "content": system}, {"role": "user", "content": question}]}
        (answer,) = load.answer_all(loaded, [row], target.config)
        assert answer is not None
        texts.append(answer.text)
    return texts


def test_requests_of_several_models_get_the_text_of_infer_from_one_base(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: one_by_one(root, name, QUESTIONS) for name in ("base", "first", "second")}
    assert len({tuple(texts) for texts in expected.values()}) == 3
    loads, real = [], load.open_model

    def counted(*args: Any, **kwargs: Any) -> Any:
        loads.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(load, "open_model", counted)
    names = ["first", "second", "base", "first:base"]
    entries = [ask(f"{name} {n}", name, question) for n, question in enumerate(QUESTIONS) for name in names]
    result = answered(root, *entries)
    for name in names:
        texts = [result[f"{name} {n}"]["text"] for n in range(len(QUESTIONS))]
        assert texts == expected[name.replace("first:base", "base")], name
    assert len(loads) == 1
    done = result["first 0"]["done"]
    assert done["finish"] == "length" and done["completion_tokens"] == 12 and done["prompt_tokens"] > 10
    assert result["first 0"]["pieces"] > 3


def test_a_request_joins_the_running_batch_at_any_token(root: Path) -> None:
    served = models(root).open("first")
    assert served is not None
    settings = [{"max_new_tokens": 6 + 5 * n} for n in range(len(QUESTIONS))]
    texts: dict[int, str] = dict.fromkeys(range(len(QUESTIONS)), "")

    def run(joins: Callable[[int], int]) -> dict[int, str]:
        """joins: the step at which each question arrives."""
        texts.clear()
        arrivals = sorted(range(len(QUESTIONS)), key=joins)
        step, together = 0, 0
        while arrivals or served.batch.requests:
            while arrivals and joins(arrivals[0]) <= step:
                n = arrivals.pop(0)
                served.batch.add(served.request(ask(n, "first", QUESTIONS[n], settings=settings[n])))
            for request in served.batch.advance() if served.batch.requests else []:
                request.report(
                    lambda event: texts.update({event["id"]: texts.get(event["id"], "") + event.get("text", "")})
                )
            together = max(together, len(served.batch.active))
            step += 1
        texts[-1] = str(together)
        return dict(texts)

    alone = run(lambda n: 60 * n)
    assert alone.pop(-1) == "1" and len(alone) == len(QUESTIONS)
    for joins in (lambda n: 0, lambda n: 3 * n, lambda n: 2 * (9 - n), lambda n: (5 * n) % 8):
        mixed = run(joins)
        assert int(mixed.pop(-1)) > 2
        assert mixed == alone


def test_memory_that_runs_out_makes_the_batch_smaller_and_changes_no_text(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [ask(n, "first", question) for n, question in enumerate(QUESTIONS)]
    expected = {n: each["text"] for n, each in answered(root, *entries).items()}
    most, real = [3], RunningBatch._forward

    def limited(self: RunningBatch, ids: list[list[int]], shared: int) -> Any:
        if len(ids) > most[0]:
            raise MemoryError("out of memory")
        return real(self, ids, shared)

    monkeypatch.setattr(RunningBatch, "_forward", limited)
    assert {n: each["text"] for n, each in answered(root, *entries).items()} == expected
    most[0] = 0
    result = answered(root, *entries)
    assert {each["status"] for each in result.values()} == {503}
    assert "not enough memory for a single answer" in result[0]["error"]["error"]


def test_each_request_has_its_own_sampling_stop_and_length(root: Path) -> None:
    question, drawn = QUESTIONS[1], {"do_sample": True, "temperature": 1.5, "seed": 4, "max_new_tokens": 20}
    greedy = answered(root, ask(0, "first", question))[0]["text"]
    half = greedy[3:6]
    result = answered(
        root,
        ask("greedy", "first", question),
        ask("drawn", "first", question, settings=drawn),
        ask("again", "first", question, settings=drawn),
        ask("other", "first", question, settings={**drawn, "seed": 5}),
        ask("stop", "first", question, settings={"stop": [half]}),
        ask("short", "first", question, settings={"max_new_tokens": 2}),
        {"id": "plain", "model": "base", "prompt": "The quick brown"},
        {"id": "ids", "model": "base", "prompt": [5, 6, 7]},
    )
    assert result["greedy"]["text"] == greedy
    assert result["drawn"]["text"] == result["again"]["text"] != result["other"]["text"]
    assert result["stop"]["text"] == greedy[: greedy.index(half)] and result["stop"]["done"]["finish"] == "stop"
    assert result["short"]["done"]["completion_tokens"] == 2
    assert result["ids"]["done"]["prompt_tokens"] == 3 and result["plain"]["text"]


def test_mistakes_are_named_and_stop_nobody_else(root: Path) -> None:
    result = answered(
        root,
        "not json",
        ask("typo", "frist", "Hello"),
        ask("side", "first:tuned", "Hello"),
        ask("key", "first", "Hello", settings={"temprature": 1}),
        {"id": "end", "model": "first", "messages": [{"role": "assistant", "content": "Hi"}]},
        {"id": "form", "model": "first", "messages": [{"content": "Hi"}]},
        {"id": "long", "model": "first", "prompt": [5] * 1024},
        {"id": "ids", "model": "first", "prompt": [10**9]},
        ask("gone", "first", QUESTIONS[0]),
        {"cancel": "gone"},
        ask("good", "first", QUESTIONS[0]),
    )
    assert result["good"]["text"] and "gone" not in result
    assert {each["status"] for id_, each in result.items() if id_ != "good"} == {400}
    errors = {id_: each["error"] for id_, each in result.items() if id_ != "good"}
    assert errors["typo"] == {
        "error": "there is no run called frist", "where": str(root / "outputs" / "frist"), "fix": "did you mean first?"
    }  # fmt: skip
    assert "temprature" in errors["key"]["error"] and "not a question" in errors["end"]["error"]
    assert "no `role`" in errors["form"]["error"] and "1,024 tokens" in errors["long"]["error"]
    assert errors[None]["where"] == "not json"


def test_an_adapter_that_was_trained_again_is_opened_again(root: Path) -> None:
    served = models(root)
    before = answered(root, ask(0, "second", QUESTIONS[0]), served=served)[0]["text"]
    tiny_runs.finished_run(root, name="second", seed=7)
    after = answered(root, ask(0, "second", QUESTIONS[0]), served=served)[0]["text"]
    assert after != before
    assert after == one_by_one(root, "second", QUESTIONS[:1])[0]


def test_another_base_waits_for_the_answers_before_it(tmp_path: Path, tiny_qwen2: Path) -> None:
    tiny_runs.project(tmp_path, tiny_qwen2)
    tiny_runs.finished_run(tmp_path, name="decoder")
    tiny_runs.project(tmp_path, tiny_t5(tmp_path / "t5"))
    entries = [ask(n, name, f"{QUESTIONS[n]}") for n, name in enumerate(["decoder", "base", "decoder"])]
    order: list[Any] = []

    def send(event: dict[str, Any]) -> None:
        assert "error" not in event
        if "done" in event:
            order.append(event["id"])

    class Lines:
        def __iter__(self) -> Iterator[str]:
            yield from map(json.dumps, entries)

    (tmp_path / "outputs" / "last").unlink()
    serve(Lines(), send, models(tmp_path))
    assert order == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", ["f"]),
        ('I look. <tool_call>{"name": "f", "arguments": "{}"}</tool_call><tool_call>{"name": "g"}', "I look.", "fg"),
        ('[{"name": "f", "arguments": {}}, {"name": "g", "parameters": {"b": 2}}]', "", "fg"),
        ("It is 4.", "It is 4.", []),
        ("<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
        ('{"temperature": 21}', '{"temperature": 21}', []),
    ],
)
def test_calls_of_tools_are_read_from_the_answer(text: str, content: str, names: list[str]) -> None:
    shown, calls = tool_calls(text)
    assert shown == content
    assert [call["function"]["name"] for call in calls] == list(names)
