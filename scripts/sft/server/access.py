"""Who may call the server, and which configs it takes from them.

Paths stay inside the project, bodies are bounded, and code that comes with a model runs only where the server was
started with it.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

from fastapi import Response
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sft.config.load import Loaded, Node, Problems, display_path, dump_yaml, load, parse, plain, resolve_path
from sft.errors import ConfigError, EnvironmentProblem, SftError, nearest, redact

PREFIX = "/api/v1/sft"
MAX_BODY = 2**20  # bytes of a request that is no upload
MAX_UPLOAD = 2 * 2**30
COOKIE = "sft_token"
FREE_TEXT = (  # keys whose values are never a path
    "experiment.", "generation.", "logging.", "tuning.freeze", "tuning.lora.", "model.add_tokens", "data.system_prompt",
    "data.template_options", "data.columns.", "data.weight_field", "data.split.", "eval.format",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How the server was started.

    token: what every request must carry; None on a loopback address. trust_remote_code, outside: what a config that
    comes by HTTP may do besides. max_upload: bytes.
    """

    root: Path
    token: str | None = None
    trust_remote_code: bool = False
    outside: bool = False
    max_upload: int = MAX_UPLOAD


class StrictModel(BaseModel):
    """A request body without unknown keys."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def name_unknown_keys(cls, value: Any) -> Any:
        for key in value if isinstance(value, dict) else ():
            if key not in cls.model_fields:
                close = nearest(key, cls.model_fields)
                known = f"did you mean `{close}`?" if close else f"it takes {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown key `{key}`: {known}")
        return value


class ConfigRequest(StrictModel):
    """A config: a file of the project, or its YAML text, and keys to set over it."""

    config_path: Annotated[str, Field(max_length=300, examples=["configs/run_bnb.yaml"])] | None = None
    config: Annotated[str, Field(max_length=200_000, description="YAML, instead of config_path")] | None = None
    overrides: Annotated[dict[str, Any], Field(examples=[{"train.epochs": 2}])] = {}


class Configs:
    """Reads the config of a request, under the rules for those that come by HTTP."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.root = settings, settings.root

    def load(self, request: ConfigRequest, default: Path | None = None) -> Loaded:
        """The config of a request, or of the file `default`. Raises ConfigError with every mistake."""
        if request.config_path and request.config is not None:
            raise ConfigError("config_path and config are both set", where="config", fix="send one of them")
        sets = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in request.overrides.items()]
        if request.config is not None:
            self._check_includes(request.config)
            with self.text_file(request.config, ".yaml") as path, renamed(path, self.root, "config"):
                return self._check(load(path, sets, root=self.root), by_http=True)
        if request.config_path:
            default = self.inside(request.config_path, "config_path")
        if default is None or default.suffix not in (".yaml", ".yml"):
            fix = "GET /api/v1/sft/configs lists them"
            raise ConfigError("no config is named, or it is no YAML file", where="config_path", fix=fix)
        return self._check(load(default, sets, root=self.root), by_http=False)

    def inside(self, text: str, key: str) -> Path:
        """The path in the project that `text` means. Raises ConfigError for any other."""
        if self.settings.outside:
            return resolve_path(self.root, text, inside=False)
        if leaves(text, self.root):
            fix = "name a path inside the project, or start the server with --allow-outside"
            raise ConfigError(f"{text!r} leads out of the project", where=key, fix=fix)
        return resolve_path(self.root, text)

    @contextmanager
    def text_file(self, text: str, ending: str) -> Iterator[Path]:
        """A file that holds `text` during the block."""
        folder = self.root / "outputs" / ".server"
        with tempfile.NamedTemporaryFile("w", suffix=ending, dir=folder, encoding="utf-8") as file:
            file.write(text)
            file.flush()
            yield Path(file.name)

    def _check_includes(self, text: str) -> None:
        """Raises ConfigError for an include of anything but the project's configs/: an error would quote the file."""
        node = parse(text, "config", Problems())
        include = node.value.get("include") if node and isinstance(node.value, dict) else None
        values = include.value if include and isinstance(include.value, list) else [include] if include else []
        for each in values:
            path = Path(os.path.normpath(self.root / str(each.value)))
            if not self.settings.outside and each.value is not None and not path.is_relative_to(self.root / "configs"):
                fix = "include files of configs/, such as configs/config_base.yaml"
                raise ConfigError(f"a config that comes by HTTP cannot include {each.value}", where=each.where, fix=fix)

    def _check(self, loaded: Loaded, *, by_http: bool) -> Loaded:
        problems = Problems()
        for key, value in leaf_values(loaded.config.model_dump()):
            origin = str(loaded.origin(re.sub(r"\[\d+\].*", "", key)))
            if not by_http and not origin.startswith("--set"):
                continue  # the user's own file
            if key == "model.trust_remote_code" and value and not self.settings.trust_remote_code:
                what = "a config that comes by HTTP cannot set model.trust_remote_code"
                problems.add(what, origin, "start the server with --allow-remote-code")
            is_path = isinstance(value, str) and not key.startswith(FREE_TEXT) and not self.settings.outside
            if is_path and leaves(value, self.root):
                what, fix = f"`{key}`: {value!r} leads out of the project", "start the server with --allow-outside"
                problems.add(what, origin, fix)
        problems.raise_all(Path("the request"))
        return loaded


def leaf_values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings and lists."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaf_values(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaf_values(inner, f"{key}[{index}]")
    else:
        yield key, value


def leaves(text: str, root: Path) -> bool:
    """Whether a text, read as a path, lies outside `root`. A URL does (it may name the local network), a hub id not."""
    is_url = "://" in text or "::" in text or text.lower().startswith("file:")
    if "\0" in text or text.startswith("~") or (is_url and not re.fullmatch(r"hf://[^:]*", text)):
        return True
    return not Path(os.path.normpath(root / text)).is_relative_to(root)


@contextmanager
def renamed(path: Path, root: Path, name: str) -> Iterator[None]:
    """Has an error name the request's `name` where it names the temporary file."""
    try:
        yield
    except SftError as error:
        for each in (error, *error.problems):
            for shown in (str(path), display_path(path, root)):
                each.what = each.what.replace(shown, name)
                each.where = each.where.replace(shown, name) if each.where else None
                each.fix = each.fix.replace(shown, name) if each.fix else None
        raise


def snapshot(loaded: Loaded) -> str:
    """YAML of the keys that a config sets, includes and overrides merged."""
    return dump_yaml(plain(Node(loaded.tree, "")))


class Guard:
    """Lets in who may call: Host, Origin and token checked, bodies bounded, pages without foreign scripts."""

    def __init__(self, app: ASGIApp, settings: Settings, hosts: tuple[str, ...]) -> None:
        self.app, self.token, self.hosts = app, settings.token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        is_upload = scope["method"] == "POST" and scope["path"] == f"{PREFIX}/data"
        refusal = self._refusal(scope, headers, is_upload)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY and not is_upload:
                raise HTTPException(413, f"a request may have {MAX_BODY} bytes")
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                inline = " 'unsafe-inline'; sandbox allow-scripts" if "/report" in scope["path"] else ""
                policy = f"default-src 'self' data:{inline}; frame-ancestors 'self'"
                message["headers"] += [
                    (b"content-security-policy", policy.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self.app(scope, bounded, with_headers)

    def _refusal(self, scope: Scope, headers: dict[str, str], is_upload: bool) -> Response | None:
        host = headers.get("host", "")
        if not self._is_our_host(host):
            what = f"the host {host[:100]!r} is not this server's"  # DNS rebinding: a foreign name that leads here
            return refuse(403, what, "Host", "use its IP address, or start it with --allow-host NAME")
        if headers.get("origin", f"http://{host}") not in (f"http://{host}", f"https://{host}"):
            return refuse(403, "the request comes from another page", "Origin")
        length = headers.get("content-length", "0")
        if not is_upload and (not length.isdigit() or int(length) > MAX_BODY):
            return refuse(413, f"a request may have {MAX_BODY} bytes", "Content-Length")
        if self.token is None:
            return None
        query = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        if scope["method"] == "GET" and scope["path"] == "/" and query and self._is_token(query[0]):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict", max_age=30 * 86400)
            return answer
        cookies: SimpleCookie = SimpleCookie()
        with suppress(CookieError):
            cookies.load(headers.get("cookie", ""))
        bearer = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not self._is_token(bearer) and not (COOKIE in cookies and self._is_token(cookies[COOKIE].value)):
            fix = "send `Authorization: Bearer TOKEN`, or open /?token=TOKEN"
            return refuse(401, "a token is needed", "Authorization", fix)
        return None

    def _is_our_host(self, host: str) -> bool:
        """An IP address, localhost or a name that the server was started with, whatever the port."""
        with suppress(ValueError):
            name = urlsplit(f"//{host}").hostname or ""
            return name == "localhost" or name in self.hosts or bool(ipaddress.ip_address(name))
        return False

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), (self.token or "").encode())


def error_json(error: SftError) -> dict[str, Any]:
    """An error as clients see it, without secrets."""
    problems = [each.entry() for each in error.problems]
    text = json.dumps({**error.entry(), **error.details, "problems": problems}, default=str)
    return dict(json.loads(redact(text)))


def refuse(status: int, what: str, where: str, fix: str | None = None) -> Response:
    return JSONResponse(error_json(EnvironmentProblem(what, where=where, fix=fix)), status)
