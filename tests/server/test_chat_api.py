"""/v1 with the official openai client: the same greedy text as `infer`, streams, several models, tools, mistakes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.generation import tiny_runs
from tests.generation.test_requests import QUESTIONS, one_by_one
from tests.server.serving import serving

pytest.importorskip("fastapi", reason="the server's packages are not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    return tiny_runs.two_runs(tmp_path_factory.mktemp("chat"), tiny_qwen2)


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    from fastapi import FastAPI

    from sft.server.chat_api import create_router

    app = FastAPI()
    app.include_router(create_router(root))
    with serving(app) as server:
        yield f"{server}/v1"


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120)


def ask(client: Any, model: str, question: str, **settings: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=model, messages=messages, **settings)


def test_models_are_the_finished_runs_with_their_bases(client: Any, root: Path) -> None:
    (root / "outputs" / "begun").mkdir(exist_ok=True)
    (root / "outputs" / "begun" / "config.resolved.yaml").write_text("{}")
    names = {model.id for model in client.models.list()}
    assert names == {"base", "first", "first:base", "second", "second:base"}
    assert client.models.retrieve("first:base").id == "first:base"
    with pytest.raises(openai.NotFoundError, match=r"did you mean first\?"):
        client.models.retrieve("frist")


def test_answers_are_those_of_infer_at_once_and_as_a_stream(client: Any, root: Path) -> None:
    for model in ("first", "second", "base"):
        (expected,) = one_by_one(root, model, QUESTIONS[:1])
        answer = ask(client, model, QUESTIONS[0])
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "length" and answer.model == model
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    chunks = list(ask(client, "base", QUESTIONS[0], stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 12
    assert len(chunks) > 5


def test_many_clients_at_once_get_their_own_answers(address: str, root: Path) -> None:
    expected = {model: one_by_one(root, model, QUESTIONS) for model in ("first", "second")}

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=120) as client:
            answers = await asyncio.gather(
                *(ask(client, model, question) for model in expected for question in QUESTIONS)
            )
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(all_at_once()) == [*expected["first"], *expected["second"]]


def test_settings_choose_how_it_answers(client: Any) -> None:
    drawn = {"temperature": 1.5, "seed": 3, "max_tokens": 16, "n": 3}
    first, again = (
        [choice.message.content for choice in ask(client, "first", QUESTIONS[1], **drawn).choices] for _ in range(2)
    )
    assert first == again and len(set(first)) == 3
    unseeded = {ask(client, "first", QUESTIONS[1], temperature=1.5).choices[0].message.content for _ in range(3)}
    assert len(unseeded) > 1
    greedy = ask(client, "first", QUESTIONS[1], temperature=0).choices[0].message.content
    stopped = ask(client, "first", QUESTIONS[1], temperature=0, stop=[greedy[4:7]]).choices[0]
    assert stopped.message.content == greedy[: greedy.index(greedy[4:7])] and stopped.finish_reason == "stop"
    short = ask(client, "first", QUESTIONS[1], max_completion_tokens=3)
    assert short.usage.completion_tokens == 3 and greedy.startswith(short.choices[0].message.content)
    plain = client.completions.create(model="base", prompt=["The quick brown", "What is"], max_tokens=5)
    assert [choice.index for choice in plain.choices] == [0, 1] and plain.usage.completion_tokens == 10
    pieces = client.completions.create(model="base", prompt="The quick brown", max_tokens=5, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == plain.choices[0].text


@pytest.mark.parametrize(
    ("settings", "status", "words"),
    [
        ({"model": "frist"}, 404, "did you mean first?"),
        ({"model": "first:tuned"}, 400, "model"),
        ({"model": "../../etc"}, 400, "model"),
        ({"model": "begun"}, 404, "not finished"),
        ({"temperature": 3}, 400, "temperature"),
        ({"logprobs": True}, 400, "logprobs is not supported here"),
        ({"tool_choice": "required"}, 400, "tool_choice is not supported here"),
        ({"extra_body": {"temprature": 1}}, 400, "there is no parameter temprature: did you mean temperature?"),
        ({"tools": [{"type": "function", "function": {"nme": "f"}}]}, 400, "tools[0] has no function with a name"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, 400, "not a question"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "image_url"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "the model reads 1,024"),
    ],
)
def test_mistakes_are_named(client: Any, root: Path, settings: dict[str, Any], status: int, words: str) -> None:
    (root / "outputs" / "begun").mkdir(exist_ok=True)
    (root / "outputs" / "begun" / "config.resolved.yaml").write_text("{}")
    request = {"model": "first", "messages": [{"role": "user", "content": "Hi"}], **settings}
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as raised:
            client.chat.completions.create(**request, stream=stream)
        assert raised.value.status_code == status and words in raised.value.message


def test_half_a_character_is_refused(address: str) -> None:
    body = {"model": "first", "messages": [{"role": "user", "content": "\ud800"}]}
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{address}/chat/completions", content=json.dumps(body), headers=headers)
    assert answer.status_code == 400 and "surrogates not allowed" in answer.json()["error"]["message"]


def test_calls_of_tools_have_the_form_of_the_client() -> None:
    from sft.server.chat_api import Form

    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    done = {"finish": "tool_calls", "prompt_tokens": 1, "completion_tokens": 2, "tool_calls": [call]}
    whole = openai.types.chat.ChatCompletion.model_validate(Form("chat.completion").whole([(0, {"done": done})], 1))
    message = whole.choices[0].message
    assert message.content is None and message.tool_calls[0].function.name == "weather"
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    chunk = openai.types.chat.ChatCompletionChunk.model_validate(Form("chat.completion").chunk(0, {"done": done}))
    assert chunk.choices[0].delta.tool_calls[0].index == 0 and chunk.choices[0].finish_reason == "tool_calls"


@pytest.mark.slow
def test_a_worker_that_dies_is_named_and_started_again_and_a_client_that_leaves_is_forgotten(root: Path) -> None:
    from sft.server.chat_api import Refused, Worker

    async def scenario() -> None:
        worker = Worker(root)
        line = {"model": "first", "messages": [{"role": "user", "content": "Hi"}], "settings": {"max_new_tokens": 900}}
        events = worker.ask([line])
        await anext(events)
        assert worker.process is not None
        worker.process.kill()
        with pytest.raises(Refused, match="ended with code -9"):
            async for _ in events:
                pass
        short = {**line, "settings": {"max_new_tokens": 2}}
        left = worker.ask([line, line])
        await anext(left)
        await left.aclose()
        assert not worker.waiting
        assert [event async for _, event in worker.ask([short])][-1]["done"]["completion_tokens"] == 2
        process = worker.process
        await worker.release()
        assert process.returncode is not None
        (root / "configs" / "local.yaml").write_text("train: {epochs: many}")
        try:
            with pytest.raises(Refused, match="epochs"):
                await anext(worker.ask([{**short, "model": "base"}]))
        finally:
            (root / "configs" / "local.yaml").unlink()
            await worker.close()

    asyncio.run(scenario())
