"""`push` with the real client against a hub on loopback: what arrives, what is interrupted, and what is sent again."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sft.ship.push import upload_error

TOKEN = "hf_" + "testtoken0123456789"
SIGNED = "letsanybodyin"


class Hub:
    """A hub for uploads as huggingface_hub asks it (with xet switched off): repositories, large files, commits.

    repos: {name: private}. objects: large files by their hash. commits: {name: {path: bytes or hash}}.
    lose: requests whose path holds this are hung up on. refuse: those that get this status.
    """

    def __init__(self) -> None:
        self.repos: dict[str, bool] = {"lab/seen": False}
        self.objects: dict[str, bytes] = {}
        self.commits: dict[str, dict[str, bytes | str]] = {}
        self.requests: list[str] = []
        self.lose: str | None = None
        self.refuse: tuple[str, int] | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                """Logs nothing."""

            def do_GET(self) -> None:
                hub.answer(self, b"")

            def do_POST(self) -> None:
                hub.answer(self, self.rfile.read(int(self.headers["Content-Length"])))

            do_PUT = do_POST  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        path = request.path
        self.requests.append(f"{request.command} {path}")
        if self.lose and self.lose in path:
            self.lose = None
            request.close_connection = True
            return
        status, reply = self.reply(request, path, body)
        text = json.dumps(reply).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    def reply(self, request: BaseHTTPRequestHandler, path: str, body: bytes) -> tuple[int, object]:
        if not path.startswith("/store/") and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if self.refuse and self.refuse[0] in path:
            status, self.refuse = self.refuse[1], None
            return status, {"error": "no"}
        if path == "/api/repos/create":
            request_body = json.loads(body)
            name = f"{request_body['organization']}/{request_body['name']}"
            if name in self.repos:
                return 409, {"url": f"{self.address}/{name}"}
            self.repos[name] = request_body["visibility"] == "private"
            return 200, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"warnings": []}
        if path.startswith("/store/"):
            self.objects[path[7:].partition("?")[0]] = body
            return 200, {}
        if path.endswith("/objects/batch"):
            listed = json.loads(body)["objects"]
            for one in listed:
                if one["oid"] not in self.objects:
                    one["actions"] = {"upload": {"href": f"{self.address}/store/{one['oid']}?sig={SIGNED}"}}
            return 200, {"objects": listed, "transfer": "basic"}
        name = "/".join(path.split("/")[3:5]).partition("?")[0]
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".gguf") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return 200, {"files": [{**file, "shouldIgnore": False} for file in files]}
        if "/commit/" in path:
            rows = [json.loads(line) for line in body.splitlines()]
            self.commits[name] = {
                row["value"]["path"]: row["value"].get("oid") or base64.b64decode(row["value"]["content"])
                for row in rows if row["key"] != "header"
            }  # fmt: skip
            return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40}
        return 200, {"id": name, "private": self.repos[name], "siblings": []}


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.server.serve_forever, daemon=True).start()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "run-gguf"
    folder.mkdir()
    (folder / "export.json").write_text("{}")
    (folder / "parity.json").write_text('{"equal": true}')
    (folder / "README.md").write_text("---\nlibrary_name: gguf\n---\n\n# Run\n")
    (folder / "run[1]-f16.gguf").write_bytes(b"GGUF" * 5000)
    (folder / "run-q8_0.gguf").write_bytes(b"gguf" * 3000)
    return folder


def test_an_interrupted_upload_continues_and_no_token_is_shown(hub, export, command):
    env = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}

    def push(repo: str, *more: str, **other: str) -> tuple[int, str]:
        hub.requests.clear()
        done = command("push", "--repo", repo, "--folder", export, *more, **{**env, **other})
        assert "Traceback" not in done.stderr
        assert TOKEN not in done.stdout + done.stderr and SIGNED not in done.stdout + done.stderr
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    hub.refuse = ("/store/", 403)
    code, output = push("lab/run")
    assert code == 2
    assert "the hub refused: Error while uploading 'run" in output
    assert "push again: files that have arrived are not sent twice" in output
    assert len(hub.objects) == 1

    hub.lose = "/commit/"
    code, output = push("lab/run")
    assert (code, "the upload was interrupted" in output) == (2, True)
    assert len([line for line in hub.requests if line.startswith("PUT")]) == 1
    assert hub.commits == {}

    code, output = push("lab/run")
    assert (code, f"uploaded to {hub.address}/lab/run" in output) == (0, True)
    assert not [line for line in hub.requests if line.startswith("PUT")]
    assert hub.repos["lab/run"] is True
    sent = hub.commits["lab/run"]
    assert sent.keys() == {"README.md", "parity.json", "run-q8_0.gguf", "run[1]-f16.gguf"}
    for name, content in sent.items():
        assert (hub.objects[content] if isinstance(content, str) else content) == (export / name).read_bytes()

    assert "sent to lab/run (private)" in push("lab/run", "--public")[1]  # the repository's own
    (export / "notes.md").write_text("the key is opensesame-42")
    code, output = push("lab/run", HF_TOKEN="opensesame-42")
    assert (code, "seems to contain a token" in output, hub.requests) == (2, True, [])
    (export / "notes.md").unlink()
    code, output = push("lab/run", HF_TOKEN="hf_" + "revoked000000000")
    assert (code, "the token is not valid" in output) == (2, True)
    code, output = push("lab/seen")
    assert (code, "exists already and is public; nothing was sent" in output, "lab/seen" in hub.commits) == (
        2,
        True,
        False,
    )


def test_a_token_is_hidden_before_a_long_message_is_cut() -> None:
    message = str(upload_error(OSError("x " * 144 + f"Bearer {TOKEN}"), "lab/run"))
    assert "Bearer hf_" in message
    assert TOKEN[:4] not in message
    assert str(upload_error(RuntimeError("the store is full"), "lab/run")).count("the store is full") == 1
