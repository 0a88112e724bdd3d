"""A hub on loopback for the real client: one public model, one gated, everything else unknown."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_" + "testtoken0123456789"


def handler(folder: Path, requests: list[str]) -> type[BaseHTTPRequestHandler]:
    files = {path.name: path for path in folder.iterdir() if path.is_file()}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())

        def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def refuse(self) -> bool:
            if "/lab/gated" in self.path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
                return True
            if "/lab/tiny" not in self.path and "/lab/gated" not in self.path:
                self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
                return True
            return False

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if self.path == "/":
                return self.reply(200)
            if self.refuse():
                return None
            if "/tree/" in self.path:
                listed = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": digest(p)} for n, p in files.items()
                ]
                return self.reply(200, json.dumps(listed).encode())
            if self.path.startswith("/api/models/"):
                siblings = [{"rfilename": n, "size": p.stat().st_size, "blobId": digest(p)} for n, p in files.items()]
                body = {"id": "lab/tiny", "modelId": "lab/tiny", "sha": COMMIT, "siblings": siblings}
                return self.reply(200, json.dumps(body).encode())
            path = files.get(self.path.rsplit("/", 1)[1].partition("?")[0])
            if path is None:
                return self.reply(404, X_Error_Code="EntryNotFound")
            return self.file(path)

        def file(self, path: Path) -> None:
            body = path.read_bytes()
            begin = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
            part = body[int(begin or 0) :]
            headers = {"ETag": f'"{digest(path)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
            self.reply(206 if "Range" in self.headers else 200, part, **headers)

    return Hub


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(address, list of requests): a hub that holds the files of `folder`."""
    requests: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(folder, requests))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
