"""A page in a real Chromium, with a script of the test's own beside the page's, and the console's output."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-3d-apis", "--disable-gpu", "--virtual-time-budget=20000")


def chromium() -> str:
    """The browser; the test is skipped with a message if there is none."""
    path = next((path for name in NAMES if (path := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium here: the pages were not opened")
    return path


def tried(page: Path, script: str, folder: Path, *flags: str) -> tuple[Any, list[str]]:
    """What `script` (the body of a function) returns on the page, and the lines on the console.

    The page's own policy stays in force; the script of the test is allowed by its hash.
    """
    body = f"""addEventListener("load", () => {{ let result; try {{ result = (() => {{ {script} }})(); }}
        catch (error) {{ result = {{error: String(error)}}; }}
        const out = document.createElement("pre"); out.id = "result"; out.textContent = JSON.stringify(result);
        document.body.append(out); }});"""
    digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    html = page.read_text(encoding="utf-8")
    assert html.count("script-src '") == 1
    html = html.replace("script-src '", f"script-src 'sha256-{digest}' '")
    copy = folder / "page.html"
    copy.write_text(html.replace("</body>", f"<script>{body}</script></body>"), encoding="utf-8")
    profile = folder / "profile"
    done = subprocess.run(
        [chromium(), *FLAGS, "--enable-logging=stderr", f"--user-data-dir={profile}", *flags, "--dump-dom", str(copy)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    shutil.rmtree(profile, ignore_errors=True)
    match = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stdout[-500:] + done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(unescape(match[1])), console
