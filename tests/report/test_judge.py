"""The judge, against a real local server: scores in both orders, retries, refusals, and no key in any text."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sft.errors import EnvironmentProblem
from sft.report import judge as judging

KEY = "sk-very-secret-key"
Reply = Callable[[dict[str, Any], dict[str, str]], tuple[int, Any]]


class Server:
    """Answers POST with what `reply(body, headers)` gives; records every request."""

    def __init__(self, reply: Reply) -> None:
        requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append((self.path, body, dict(self.headers)))
                code, value = reply(body, dict(self.headers))
                sent = value.encode() if isinstance(value, str) else json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.requests = requests
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Reply], Server]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(judging.KEY, KEY)
    servers: list[Server] = []

    def start(reply: Reply) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def chat(content: str) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": content}}]}


def shown(body: dict[str, Any]) -> tuple[str, str]:
    content = body["messages"][0]["content"]
    result = re.search(r"<first>\n(.*)\n</first>\n<second>\n(.*)\n</second>", content, re.DOTALL)
    assert result
    return result[1], result[2]


def marks(first: float, second: float) -> str:
    one, other = (dict.fromkeys(judging.ASPECTS, mark) for mark in (first, second))
    return f"Here you are:\n```json\n{json.dumps({'first': one, 'second': other})}\n```"


def biased(body: dict[str, Any], _: dict[str, str]) -> tuple[int, Any]:
    """5 for a short answer, 7 for one of over ten characters, and 2 more for whichever comes first."""
    first, second = (7.0 if len(text) > 10 else 5.0 for text in shown(body))
    return chat(marks(first + 2, second))


def test_both_orders_cancel_the_judges_position_bias(serve: Callable[[Reply], Server]) -> None:
    server = serve(biased)
    judge = judging.Judge(server.url, "a-judge")
    base, tuned, _ = judge.score_pair("Why?", "Because.", "short", "a much longer answer")
    assert (base["helpfulness"], tuned["helpfulness"]) == (6.0, 8.0)  # the 2 for the first place go half to each
    assert [shown(body) for _, body, _ in server.requests] == [
        ("short", "a much longer answer"),
        ("a much longer answer", "short"),
    ]
    path, body, headers = server.requests[0]
    assert (path, body["model"], headers["Authorization"]) == ("/v1/chat/completions", "a-judge", f"Bearer {KEY}")
    assert "<reference>\nBecause.\n</reference>" in body["messages"][0]["content"]


def test_rows_are_compared_with_intervals_and_equal_answers_are_a_tie(serve: Callable[[Reply], Server]) -> None:
    server = serve(biased)
    rows = [("Why?", "", "short", "a much longer answer")] * 12 + [
        ("Why?", "", "the same answer", "the same answer")
    ] * 3
    result = judging.score_rows(judging.Judge(server.url, "a-judge"), rows)
    assert (result["rows"], result["unjudged"], result["problem"]) == (15, 0, None)
    helpful = result["aspects"]["helpfulness"]
    assert (helpful["wins"], helpful["ties"], helpful["losses"], helpful["finding"]) == (12, 3, 0, "better")
    assert helpful["difference"] == pytest.approx(12 * 2 / 15, abs=1e-6)
    assert len(server.requests) == 12 * 2 + 3
    assert KEY not in json.dumps(result) and KEY not in repr(judging.Judge(server.url, "a-judge"))


def test_a_judge_that_fails_once_is_retried_then_reported(
    serve: Callable[[Reply], Server],
) -> None:
    replies = iter([(503, "busy"), (200, "not json at all"), chat(marks(4, 6))])
    server = serve(lambda body, headers: next(replies))
    judge = judging.Judge(server.url, "a-judge", wait=0.01)
    judge.check()
    assert len(server.requests) == 3
    wordy = serve(lambda body, headers: chat(f"I like the second, says {KEY}"))
    result = judging.score_rows(judging.Judge(wordy.url, "a-judge", wait=0.01), [("Why?", "", "a", "b")] * 2)
    assert (result["rows"], result["unjudged"], result["orders_agree"]) == (0, 2, None)
    assert "no JSON with scores" in result["problem"] and "3 times in a row" in result["problem"]
    assert KEY not in result["problem"]


def test_a_refusal_is_reported_at_once_with_its_fix_and_without_the_key(serve: Callable[[Reply], Server]) -> None:
    server = serve(lambda body, headers: (401, f"no such key: {headers['Authorization']}"))
    with pytest.raises(EnvironmentProblem) as error:
        judging.Judge(server.url, "a-judge").check()
    assert len(server.requests) == 1 and "answers 401" in str(error.value) and KEY not in str(error.value)
    assert "export JUDGE_API_KEY" in str(error.value)
    gone = judging.Judge("http://user:pass@127.0.0.1:9/v1", "a-judge", wait=0.01)
    with pytest.raises(EnvironmentProblem, match="cannot be reached") as error:
        gone.check()
    assert "pass" not in str(error.value)
    with pytest.raises(EnvironmentProblem, match="is not an address"):
        judging.Judge("localhost:8000", "a-judge")


def test_the_key_of_another_service_goes_to_that_service_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(judging.KEY, raising=False)
    monkeypatch.setenv(judging.OPENAI_KEY, KEY)
    assert judging.Judge("http://localhost:8000/v1", "m").key is None
    assert judging.Judge("https://api.openai.com/v1", "m").key == KEY


@pytest.mark.parametrize("reply", ["", "{}", '{"first": 3, "second": 4}', marks(0, 5), marks(5, 11)])
def test_a_reply_without_scores_from_one_to_ten_is_refused(reply: str) -> None:
    with pytest.raises(ValueError, match="no JSON with scores"):
        judging.parse_scores(reply)
