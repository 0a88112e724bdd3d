"""The page in a real Chromium: from a file of rows to a chat with the tuned model beside its base.

axe-core checks every view where SFT_AXE names its axe.min.js (npm install axe-core).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server's packages are not installed")

from starlette.testclient import TestClient

from sft.server.access import Settings
from sft.server.api import create_app
from tests.generation import tiny_runs
from tests.report.browser import chromium
from tests.server.serving import serving

AXE = os.environ.get("SFT_AXE")
MINUTES = 60_000  # milliseconds


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Iterator[str]:
    root = tiny_runs.project(tmp_path_factory.mktemp("page"), tiny_qwen2)
    with serving(create_app(Settings(root))) as server:
        yield f"{server}/"


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """The page; at the end it must have logged no error."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    errors: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(3 * MINUTES)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda line: (
                errors.append(line.text) if line.type == "error" and "Failed to load" not in line.text else None
            ),
        )
        page.goto(address)
        yield page
        browser.close()
    assert not errors


def check_view(page: Any) -> None:
    """No finding of axe-core, in the dark neither, and nothing beyond the edge of a phone."""
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.set_viewport_size({"width": 1200, "height": 900})
    for scheme in ("light", "dark") if AXE else ():
        page.emulate_media(color_scheme=scheme)
        page.evaluate(Path(AXE or "").read_text(encoding="utf-8"))
        findings = page.evaluate("axe.run().then(result => result.violations)")
        serious = [
            (each["id"], each["nodes"][0]["html"]) for each in findings if each["impact"] in ("serious", "critical")
        ]
        assert not serious
    page.emulate_media(color_scheme="light")


def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    with TestClient(create_app(Settings(tmp_path)), base_url="http://localhost") as client:
        answer = client.get("/")
        files = re.findall(r'(?:href|src)="([^#"]+)"', answer.text)
        assert {"report.css", "page.css", "page.js"} <= set(files) and "style=" not in answer.text
        for name in files:
            assert name == "data:," or client.get(f"/{name}").status_code == 200, name
        assert "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.slow
def test_from_a_file_to_a_chat_beside_the_base(page: Any, tmp_path: Path) -> None:
    rows = [{"frage": row["user"], "antwort": row["assistant"]} for row in tiny_runs.rows(40)]
    (tmp_path / "sums (1).jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"frage": "2 + 2?"}]))
    page.get_by_text("There is no run yet").wait_for()
    check_view(page)
    page.get_by_role("link", name="Choose a file").press("Enter")
    page.get_by_role("link", name="Skip to the content").press("Enter")
    assert page.url.endswith("#/new")

    page.set_input_files("input[type=file]", tmp_path / "sums (1).jsonl")
    page.get_by_role("button", name="Take frage as the question, antwort as the answer").click()
    page.get_by_text("40 of 41 rows are used").wait_for()
    page.locator(".tokens mark").first.wait_for()
    assert page.get_by_text("It fits:").is_visible()
    page.get_by_text("all settings").click()
    page.get_by_label("find a setting").fill("max_steps")
    steps = page.get_by_label("train.max_steps")
    steps.fill("three")
    steps.press("Tab")
    page.get_by_text("The settings cannot be used").wait_for()
    assert steps.get_attribute("aria-invalid") == "true"
    steps.fill("3")
    steps.press("Enter")
    page.get_by_text("It fits:").wait_for()
    assert steps.get_attribute("aria-invalid") == "false"
    page.get_by_label("name", exact=False).first.fill("sums")
    check_view(page)
    page.get_by_role("button", name="Start training").click()

    page.get_by_role("link", name="Chat", exact=True).nth(1).wait_for()  # the first is the header's
    assert page.locator("h1").inner_text() == "sums"
    assert "step 3 of 3" in page.locator(".lead").inner_text()
    captions = page.locator("figcaption b").all_inner_texts()
    assert captions == ["Loss", "Memory (GiB)", "Learning rate", "Speed (tokens/s)"]
    check_view(page)
    page.get_by_role("link", name="Chat", exact=True).nth(1).click()

    page.get_by_label("Question").fill("What is 2 + 2?")
    page.get_by_label("Question").press("Enter")
    page.locator(".side small").filter(has_text="12 tokens").nth(1).wait_for()
    tuned, base = page.locator(".side").all()
    assert (tuned.locator("h3").inner_text(), base.locator("h3").inner_text()) == ("sums", "its base")
    assert tuned.locator("div").inner_text() and base.locator("div").inner_text()
    check_view(page)

    page.go_back()
    page.get_by_role("button", name="Evaluate").click()
    page.get_by_role("heading", name="Scores").wait_for()
    page.get_by_role("heading", name="Answers of the last evaluation").wait_for()
    page.get_by_role("button", name="Compare with its base").click()
    report = page.get_by_role("link", name="Open the comparison")
    report.wait_for()
    page.get_by_label("Export as").select_option("hf")
    page.get_by_role("button", name="Export").click()
    page.locator("tr", has_text="export").get_by_text("done").wait_for()
    check_view(page)
    with page.context.expect_page() as opened:
        report.click()
    assert "sums" in opened.value.locator("h1").inner_text()
    page.locator("tr", has_text="export").get_by_role("link").click()
    page.get_by_text("outputs/export/sums-hf").first.wait_for()
    check_view(page)


@pytest.mark.slow
def test_a_server_that_is_gone_is_named(page: Any, address: str) -> None:
    page.route("**/api/**", lambda route: route.abort())
    page.get_by_text("The server does not answer").wait_for()
    assert page.get_by_text("make serve").is_visible()
