"""10,000 random requests, drawn by schemathesis from the server's own description, and none fails inside the server."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sft.server.access import Settings
from sft.server.api import create_app
from tests.server import quick
from tests.server.serving import serving

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
EXAMPLES = int(os.environ.get("SFT_FUZZ_EXAMPLES", "300"))  # of each route, valid ones and invalid ones
ANSWERS = {"plan": '{"fits": true}', "preview": '{"id": "a", "text": "b"}', "process_data": '{"rows_read": 1}'}


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server whose commands answer at once, with a run that has finished and one that has not."""
    quick.install(tmp_path, monkeypatch)
    for name, answer in ANSWERS.items():
        (tmp_path / "quick" / f"{name}.py").write_text(f"print({answer!r})")
    for name in ("merge_lora", "export", "eval", "compare"):
        (tmp_path / "quick" / f"{name}.py").write_text("print('{}')")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run_bnb.yaml").write_text("model: {name: models/tiny}")
    for name in ("done", "paused"):
        folder = tmp_path / "outputs" / name
        folder.mkdir(parents=True)
        (folder / "config.resolved.yaml").write_text("model: {name: models/tiny}")
    (tmp_path / "outputs" / "done" / "finished.json").write_text("{}")
    with serving(create_app(Settings(tmp_path))) as server:
        yield server


@pytest.mark.slow
def test_no_random_request_fails_inside_the_server(address: str) -> None:
    import requests
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable

    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    session, answers = requests.Session(), Counter[int]()

    def send(case: Any) -> None:
        if "model_id" in case.path_parameters or "job_id" in case.path_parameters:  # every third one exists
            name = next(name for name in ("model_id", "job_id") if name in case.path_parameters)
            if len(str(case.path_parameters[name])) % 3 == 0:
                case.path_parameters[name] = "done"
        answer = case.call(session=session, timeout=60)
        answers[answer.status_code] += 1
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)

    for operation in (each.ok() for each in schema.get_all_operations()):
        for mode in schemathesis.GenerationMode:
            limits = settings(
                max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
            )
            with suppress(Unsatisfiable):  # a route that takes nothing has no invalid request
                limits(given(operation.as_strategy(generation_mode=mode))(send))()
    print(dict(answers))
    assert answers[200] and answers[201] and answers[404] and answers[422]
