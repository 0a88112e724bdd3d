"""The routes: what they answer, whom they refuse, and one training from request to model through the real server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import serve
from sft.errors import EnvironmentProblem
from sft.server import api
from sft.server.access import MAX_BODY, PREFIX, Settings
from sft.server.api import create_app
from tests.conftest import ROOT
from tests.server import quick
from tests.server.quick import wait_for
from tests.training import project

YAML = "model: {name: models/tiny}\ntrain: {output_dir: outputs/t}\n"


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    quick.install(tmp_path, monkeypatch)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("# Mine.\n" + YAML)
    with TestClient(create_app(Settings(tmp_path)), base_url="http://localhost:8000") as client:
        yield client


def start(client: TestClient, steps: int, name: str = "chat") -> str:
    """A job of the quick script, past the plan, which needs a model."""
    return str(client.app.state.queue.add("train", ["--resume", "auto"], name=name, config=f"steps={steps}"))  # type: ignore[attr-defined]


def test_a_job_is_listed_watched_paused_resumed_and_stopped(client: TestClient) -> None:
    job = start(client, 60)
    wait_for(lambda: client.get(f"{PREFIX}/jobs/{job}").json()["current_step"] > 1)
    status = client.get(f"{PREFIX}/jobs/{job}").json()
    assert {
        "job_id",
        "status",
        "progress",
        "current_step",
        "total_steps",
        "metrics",
        "created_at",
        "updated_at",
    } <= set(status)
    assert (status["status"], status["phase"], status["total_steps"], status["model"]) == (
        "running", "training", 60, "tiny",
    )  # fmt: skip
    assert [each["job_id"] for each in client.get(f"{PREFIX}/jobs").json()["jobs"]] == [job]
    assert client.post(f"{PREFIX}/jobs/{job}/pause").json()["requested"] == "paused"
    wait_for(lambda: client.get(f"{PREFIX}/jobs/{job}").json()["status"] == "paused")
    assert client.post(f"{PREFIX}/jobs/{job}/resume").json()["status"] in ("queued", "running")
    wait_for(lambda: client.get(f"{PREFIX}/jobs/{job}").json()["phase"] == "training")
    client.delete(f"{PREFIX}/jobs/{job}")
    wait_for(lambda: client.get(f"{PREFIX}/jobs/{job}").json()["status"] == "stopped")
    history = client.get(f"{PREFIX}/jobs/{job}/metrics").json()["history"]
    assert [entry["step"] for entry in history] == list(range(1, len(history) + 1))
    after = client.get(f"{PREFIX}/jobs/{job}/metrics", params={"after": 2}).json()["history"]
    assert after == history[2:]


def test_logs_are_events_that_go_on_after_the_last_one_that_was_seen(client: TestClient) -> None:
    job = start(client, 5)
    whole = client.get(f"{PREFIX}/jobs/{job}/logs").text  # ends with the job
    events = [dict(line.partition(": ")[::2] for line in event.splitlines()) for event in whole.split("\n\n") if event]
    assert [event["data"] for event in events] == [f"step {step}" for step in range(1, 6)] + ["completed"]
    assert events[-1]["event"] == "end"
    rest = client.get(f"{PREFIX}/jobs/{job}/logs", headers={"Last-Event-ID": events[2]["id"]}).text
    assert [line for line in rest.splitlines() if line.startswith("data")][:2] == ["data: step 4", "data: step 5"]
    beyond = client.get(f"{PREFIX}/jobs/{job}/logs", headers={"Last-Event-ID": "999999"})  # of another file
    assert beyond.text == whole


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/jobs/nothing", 404),
        ("DELETE", "/jobs/nothing", 404),
        ("GET", "/jobs/..%2f..%2fetc", 404),
        ("GET", "/jobs/.server", 422),
        ("GET", "/models/nothing/info", 404),
        ("GET", "/models/last/report", 404),
        ("GET", "/nothing", 404),
        ("PUT", "/jobs", 405),
        ("GET", "/train", 404),
        ("POST", "/nothing", 405),
    ],
)
def test_what_does_not_exist_is_an_error_in_three_parts(
    client: TestClient, method: str, path: str, status: int
) -> None:
    answer = client.request(method, PREFIX + path)
    assert answer.status_code == status and {"error", "where", "fix"} <= set(answer.json())
    if path in ("/nothing", "/train"):
        assert answer.json()["error"] == f"there is no route {method} {PREFIX}{path}"
        assert "no route POST /v1/embeddings" in client.post("/v1/embeddings").json()["error"]["message"]


def test_every_mistake_of_a_config_is_named_with_its_line(client: TestClient) -> None:
    answer = client.post(
        f"{PREFIX}/configs/validate", json={"config": YAML + "tarin: 1\ndata: {max_droped: 0.5}\n"}
    ).json()
    assert not answer["valid"]
    assert [(error["where"], error["fix"]) for error in answer["errors"]] == [
        ("config:3", "did you mean `train`?"),
        ("config:4", "did you mean `data.max_dropped`?"),
    ]
    as_yaml = client.post(f"{PREFIX}/configs/validate", content=YAML + "tarin: 1\n")  # curl --data-binary @FILE
    assert as_yaml.json()["errors"] == answer["errors"][:1]
    no_text = client.post(f"{PREFIX}/configs/validate", content=b"\xff", headers={"Content-Type": "application/yaml"})
    wrong = client.post(f"{PREFIX}/configs/validate", json={"configs": YAML})
    assert (no_text.status_code, wrong.status_code) == (422, 422) and "did you mean `config`?" in wrong.text
    good = client.post(
        f"{PREFIX}/configs/validate", json={"config_path": "configs/mine.yaml", "overrides": {"train.epochs": 2}}
    )
    assert good.json()["config"]["train"]["epochs"] == 2
    listed = client.get(f"{PREFIX}/configs").json()["configs"]
    assert listed == [{"path": "configs/mine.yaml", "description": "Mine."}]
    keys = {each["key"]: each for each in client.get(f"{PREFIX}/configs/schema").json()["keys"]}
    assert keys["tuning.mode"]["choices"] == ["qlora", "lora", "full"] and keys["train.epochs"]["default"] == "auto"


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ({"config": "model: {name: /etc}"}, "leads out of the project"),
        ({"config": "model: {name: ~/secret}"}, "leads out of the project"),
        ({"config": "data: {raw_path: ../../etc/passwd}"}, "leads out of the project"),
        ({"config": "data: {sources: [{path: 'file:///etc/passwd'}]}"}, "leads out of the project"),
        ({"config": "data: {raw_path: 'http://192.168.1.1/rows.jsonl'}"}, "leads out of the project"),
        ({"config": "data: {raw_path: 'hf://a::http://192.168.1.1/rows.jsonl'}"}, "leads out of the project"),
        ({"config": "model: {trust_remote_code: true}"}, "cannot set model.trust_remote_code"),
        ({"config_path": "configs/mine.yaml", "overrides": {"model.trust_remote_code": True}}, "cannot set"),
        ({"config_path": "configs/mine.yaml", "overrides": {"model.name": "/etc"}}, "leads out of the project"),
        ({"config_path": "/etc/passwd"}, "leads out of the project"),
        ({"config_path": "quick/train.py"}, "no YAML file"),
        ({"config": "include: /etc/passwd"}, "cannot include"),
        ({"config": "include: [data/raw/x.yaml]"}, "cannot include"),
        ({"config": "train: {output_dir: elsewhere/run}"}, "lie in outputs/"),
        ({"config": "a", "config_path": "b"}, "both set"),
        ({}, "no config is named"),
        ({"config_pth": "configs/mine.yaml"}, "did you mean `config_path`?"),
        ({"config_path": "configs/mine.yaml", "gqu": 1}, "unknown key `gqu`"),
        ({"config_path": "configs/mine.yaml", "resume_from_checkpoint": "/etc"}, "leads out of the project"),
        ({"config_path": "configs/mine.yaml", "resume_from_checkpoint": "outputs/none"}, "no run or checkpoint"),
    ],
)
def test_a_config_that_comes_by_http_stays_inside_the_project(client: TestClient, body: Any, what: str) -> None:
    answer = client.post(f"{PREFIX}/train", json=body)
    assert answer.status_code == 422 and what in answer.text and ".server" not in answer.text, answer.text
    assert client.get(f"{PREFIX}/jobs").json()["jobs"] == []


def test_a_body_that_is_not_sent_as_json_is_named_with_the_option_that_does(client: TestClient) -> None:
    body = '{"config_path": "configs/mine.yaml"}'
    answer = client.post(f"{PREFIX}/train", content=body, headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert answer.status_code == 422 and "curl --json" in answer.json()["fix"]
    assert "curl --json" in client.post(f"{PREFIX}/train").json()["fix"]


def test_only_this_machine_calls_and_no_other_page(client: TestClient) -> None:
    url = f"{PREFIX}/jobs"
    for headers in ({"Host": "token.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        answer = client.get(url, headers=headers)
        assert answer.status_code == 403 and answer.json()["where"] in ("Host", "Origin")
    for host in ("127.0.0.1:8000", "[::1]:8000", "192.168.1.5", "localhost"):
        assert client.get(url, headers={"Host": host}).status_code == 200
    assert client.get(url, headers={"Origin": "http://localhost:8000"}).status_code == 200
    too_long = client.post(f"{PREFIX}/configs/validate", content=b"x" * (MAX_BODY + 1))
    assert too_long.status_code == 413
    in_chunks = client.post(f"{PREFIX}/configs/validate", content=(b"x" * 65536 for _ in range(20)))
    assert in_chunks.status_code == 413
    assert "default-src 'self'" in client.get("/docs").headers["content-security-policy"]


def test_answers_do_not_wait_for_the_other_side_s_acknowledgement() -> None:
    with serve.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_token_is_needed_where_the_server_has_one(tmp_path: Path) -> None:
    app = create_app(Settings(tmp_path, token="a-long-secret-token"))
    with TestClient(app, base_url="http://localhost:8000") as client:
        url = f"{PREFIX}/jobs"
        assert client.get(url).status_code == 401
        assert client.get(url, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get(url, headers={"Authorization": "Bearer a-long-secret-token"}).status_code == 200
        assert client.get("/", params={"token": "wrong"}).status_code == 401
        opened = client.get("/", params={"token": "a-long-secret-token"}, follow_redirects=False)
        assert opened.status_code == 303 and "HttpOnly" in opened.headers["set-cookie"]
        assert client.get(url).status_code == 200  # by the cookie


def test_uploads_are_processed_bounded_and_have_the_name_of_a_data_file(client: TestClient, tmp_path: Path) -> None:
    for name in ("../x.jsonl", "x.yaml", ".jsonl", "a/b.csv", "x\0.csv"):
        assert client.post(f"{PREFIX}/data", params={"name": name}, content=b"{}").status_code == 422
    form = client.post(f"{PREFIX}/data", params={"name": "rows.jsonl"}, files={"file": ("rows.jsonl", b"{}")})
    assert form.status_code == 422 and "curl --data-binary" in form.json()["fix"]
    with TestClient(create_app(Settings(tmp_path / "small", max_upload=10)), base_url="http://localhost") as small:
        answer = small.post(f"{PREFIX}/data", params={"name": "rows.jsonl"}, content=b"x" * 11)
        assert answer.status_code == 422 and "--max-upload" in answer.json()["fix"]
        assert not list((tmp_path / "small" / "data").rglob("*.jsonl"))


def test_an_upload_replaces_no_rows_that_a_job_may_use(tmp_path: Path) -> None:
    def upload(name: str, rows: str) -> str:
        (tmp_path / ".incoming").write_text(rows)
        path = api.place(tmp_path / ".incoming", name)
        assert path.name == name and path.read_text() == rows and not (tmp_path / ".incoming").exists()
        return path.parent.name

    assert upload("my rows.jsonl", "broken") == upload("my rows.jsonl", "a") == "my-rows"
    (tmp_path / "my-rows" / "processed").mkdir()
    assert upload("my rows.jsonl", "a") == "my-rows"
    assert upload("my rows.jsonl", "b") == upload("my rows.csv", "b") == "my-rows-2"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Iterator[tuple[httpx.Client, Path]]:
    """`python scripts/serve.py` on a port that is free, in a project with rows and a tiny model."""
    root = project.make(tmp_path_factory.mktemp("project"), tiny_qwen2)
    (root / "configs").mkdir()
    (root / "config.yaml").rename(root / "configs" / "run_bnb.yaml")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "serve.py"), "--port", "0"], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "SFT_ROOT": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout
    address = process.stdout.readline().split()[0]
    with httpx.Client(base_url=address, timeout=120) as client:
        yield client, root
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


def done(client: httpx.Client, job: str) -> bool:
    status = client.get(f"{PREFIX}/jobs/{job}").json()
    assert status["status"] != "failed", status["error"]
    return bool(status["status"] == "completed")


def test_from_an_upload_to_a_trained_and_evaluated_model(server: tuple[httpx.Client, Path]) -> None:
    client, root = server
    rows = [{"user": f"Name: N{index}", "assistant": f"N{index}"} for index in range(40)]
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    data = client.post(f"{PREFIX}/data", params={"name": "my rows.jsonl"}, content=body).json()
    assert "ledger" in data, data
    assert data["ledger"]["rows_read"] == 40, data
    config = {"config_path": "configs/run_bnb.yaml", "overrides": {**data["overrides"], "train.max_steps": 3}}
    preview = client.post(f"{PREFIX}/templates/preview", json={**config, "limit": 2}).json()["rows"]
    assert len(preview) == 2 and "labelled" in {state for _, state in preview[0]["tokens"]}
    answer = client.post(f"{PREFIX}/train", json=config)
    assert answer.status_code == 201, answer.text
    job = answer.json()["job_id"]
    wait_for(lambda: done(client, job), 200)
    status = client.get(f"{PREFIX}/jobs/{job}").json()
    assert (status["run"], status["current_step"], status["progress"]) == ("t", 3, 1.0)
    assert min(status["metrics"]["train/loss"], status["metrics"]["eval/loss"], status["tokens_per_second"]) > 0
    assert "t is finished" in (root / "outputs/.server" / job / "log.txt").read_text()
    (model,) = client.get(f"{PREFIX}/models").json()["models"]
    assert (model["id"], model["has_samples"]) == ("t", False)
    evaluation = client.post(f"{PREFIX}/models/t/evaluate", json={"limit": 2}).json()["job_id"]
    wait_for(lambda: done(client, evaluation), 200)
    assert len(client.get(f"{PREFIX}/models/t/samples").json()["samples"]) == 2
    assert client.get(f"{PREFIX}/jobs/{evaluation}").json()["result"]["rows"] == 2
    info = client.get(f"{PREFIX}/models/t/info").json()
    assert info["config"]["train"]["max_steps"] == 3 and info["metrics"]["base"] and info["bytes"] > 0


def test_a_plan_is_for_the_card_that_is_named(server: tuple[httpx.Client, Path]) -> None:
    client, _ = server
    plan = client.post(f"{PREFIX}/plan", json={"config_path": "configs/run_bnb.yaml", "gpu": "8GiB"}).json()
    assert plan["fits"] and plan["device"]["kind"] == "cuda"
    wrong = client.post(f"{PREFIX}/plan", json={"config_path": "configs/run_bnb.yaml", "gpu": "no such card"})
    assert wrong.status_code == 422 and wrong.json()["fix"]


def test_what_does_not_fit_is_refused_unless_forced_and_settings_are_copied(client: TestClient, tmp_path: Path) -> None:
    remedy = {"setting": "model.max_seq_len=256", "saves_gib": 1.25}
    plan = {"fits": False, "peak_gib": 9.5, "device": {"name": "RTX 4060", "gib": 8.0}, "remedies": [remedy]}
    (tmp_path / "quick" / "plan.py").write_text(f"print({json.dumps(plan)!r})")
    body = {"config_path": "configs/mine.yaml", "overrides": {"train.epochs": 2}}
    refused = client.post(f"{PREFIX}/train", json=body)
    assert refused.status_code == 409 and refused.json()["plan"] == plan
    assert refused.json()["error"] == "it does not fit: 9.5 GiB are needed, RTX 4060 has 8.0"
    assert refused.json()["fix"] == "model.max_seq_len=256 (saves 1.25 GiB)"
    job = client.post(f"{PREFIX}/train", json={**body, "force": True}).json()
    assert (job["kind"], job["error"]) == ("train", None)
    copied = (tmp_path / "outputs" / ".server" / job["job_id"] / "config.yaml").read_text()
    assert copied == "model:\n  name: models/tiny\ntrain:\n  output_dir: outputs/t\n  epochs: 2\n"


def test_texts_that_are_no_unicode_and_endless_nesting_are_refused(client: TestClient) -> None:
    for overrides in ('{"data.system_prompt": "\\ud800"}', '{"data.template_options": ' + "[" * 900 + "]" * 900 + "}"):
        answer = client.post(
            f"{PREFIX}/configs/validate", content='{"config_path": "configs/mine.yaml", "overrides": ' + overrides + "}"
        )
        assert answer.status_code in (200, 400, 422), answer.text
    assert client.get(f"{PREFIX}/jobs", headers={"Origin": "http://["}).status_code == 403


def test_a_port_in_use_is_an_error_at_once(server: tuple[httpx.Client, Path], command: Any, tmp_path: Path) -> None:
    client, root = server
    refused = command("serve", "--port", client.base_url.port, SFT_ROOT=str(tmp_path))
    assert refused.returncode == 2 and f"--port {client.base_url.port + 1}" in refused.stderr  # type: ignore[operator]
    with pytest.raises(EnvironmentProblem, match="cannot be listened on") as no_host:
        serve.listen("nowhere.invalid", 8000)
    with pytest.raises(EnvironmentProblem, match="must be 0-65535") as no_port:
        serve.listen("127.0.0.1", 99999)
    assert (no_host.value.where, no_port.value.where) == ("--host", "--port")
    second = command("serve", "--port", 0, SFT_ROOT=str(root))
    assert second.returncode == 2 and "another server of this project" in second.stderr
