"""The OpenAI-style endpoint: /v1/models, /v1/chat/completions and /v1/completions, with the runs of the project.

A process of its own answers (`infer --mode requests`): it starts with the first request, and ends after ten idle
minutes or when a training needs the memory. Without settings in a request, the answer is the one of `make infer`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sft import runs
from sft.errors import RunError, nearest

IDLE_SECONDS = 600.0
MOST_REQUESTS = 128  # at a time
MOST_CHOICES = 16
INFER = Path(__file__).resolve().parents[2] / "infer.py"
NAME = r"^\w[\w.+-]*(:base)?$"
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # what this server cannot do, and the values that do not ask for it
    "frequency_penalty": (0, None), "presence_penalty": (0, None), "logit_bias": ({}, None), "logprobs": (False, None),
    "top_logprobs": (0, None), "echo": (False, None), "suffix": ("", None), "best_of": (1, None),
    "tool_choice": ("auto", "none", None), "response_format": ({"type": "text"}, None), "functions": ([], None),
    "modalities": (["text"], None), "reasoning_effort": (None,),
}  # fmt: skip
Event = dict[str, Any]
log = logging.getLogger("sft.server")


class StreamOptions(BaseModel):
    include_usage: bool = False


class AnswerRequest(BaseModel):
    """What both routes take. top_k, repetition_penalty: as other local servers have them."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(pattern=NAME, max_length=120, description="a run, RUN:base, or base")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; default: the run's own settings")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    n: int | None = Field(1, ge=1, le=MOST_CHOICES)

    @model_validator(mode="after")
    def refuse_what_would_be_ignored(self) -> AnswerRequest:
        json.dumps(self.model_dump(), ensure_ascii=False).encode()  # half a character: a ValueError, here and not later
        for key, value in (self.model_extra or {}).items():
            if key in NEUTRAL and value not in NEUTRAL[key]:
                raise ValueError(f"{key} is not supported here: leave it out")
            if key not in NEUTRAL and key not in IGNORED:
                close = nearest(key, type(self).model_fields)
                raise ValueError(f"there is no parameter {key}" + (f": did you mean {close}?" if close else ""))
        return self

    def settings(self) -> dict[str, Any]:
        """Keys of `generation` that differ from the run's own."""
        drawn = {key: getattr(self, key) for key in ("temperature", "top_p", "top_k", "seed")}
        values = {key: value for key, value in drawn.items() if value is not None}
        if self.temperature == 0:
            values = {"do_sample": False}
        elif values:
            values = {"do_sample": True, "seed": secrets.randbelow(2**31), **values}
        values |= {"max_new_tokens": self.max_tokens} if self.max_tokens else {}
        values |= {"repetition_penalty": self.repetition_penalty} if self.repetition_penalty else {}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return values | ({"stop": stop} if stop else {})

    def entries(self, contents: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The lines for the worker: `n` for each content, each with a seed of its own."""
        settings, seed = self.settings(), self.settings().get("seed", 0)
        return [
            {"model": self.model, "settings": settings | ({"seed": seed + at} if at else {}), **content}
            for content in contents
            for at in range(self.n or 1)
        ]


class ChatRequest(AnswerRequest):
    messages: list[dict[str, Any]] = Field(min_length=1, examples=[[{"role": "user", "content": "Hello"}]])
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = None

    def lines(self) -> list[dict[str, Any]]:
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        for at, tool in enumerate(self.tools or []):
            function = tool.get("function", tool)
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise Refused(400, f"tools[{at}] has no function with a name", "tools")
        tools = self.tools if (self.model_extra or {}).get("tool_choice") != "none" else None
        return self.entries([{"messages": self.messages, "tools": tools}])


class CompletionRequest(AnswerRequest):
    """The text goes to the model as it is, without a chat template."""

    prompt: str | list[str] | list[int] | list[list[int]]

    def lines(self) -> list[dict[str, Any]]:
        several = isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int))
        prompts: list[Any] = list(self.prompt) if several else [self.prompt]
        if not 0 < len(prompts) * (self.n or 1) <= MOST_REQUESTS:
            raise Refused(400, f"1 to {MOST_REQUESTS} answers can be computed in one request", "prompt")
        return self.entries([{"prompt": prompt} for prompt in prompts])


class Refused(Exception):
    """An error as OpenAI's clients read it."""

    def __init__(self, status: int, what: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(what)
        self.status, self.param, self.code = status, param, code

    def json(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class OpenAIRoute(APIRoute):
    """A route whose errors have OpenAI's form."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await answer(request)
            except RequestValidationError as error:
                first = error.errors()[0]
                place = ".".join(str(part) for part in first["loc"][1:])
                what = str(first["msg"]).removeprefix("Value error, ")
                refused = Refused(400, f"{place}: {what}".removeprefix(": "), place or None)
            except Refused as error:
                refused = error
            return JSONResponse(refused.json(), refused.status)

        return handler


class Worker:
    """The process that answers, and who waits for what it says."""

    def __init__(self, root: Path) -> None:
        self.root, self.log_path = root, root / "outputs" / ".server" / "chat.log"
        self.process: asyncio.subprocess.Process | None = None
        self.waiting: dict[str, asyncio.Queue[Event]] = {}
        self.reader: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.starting = asyncio.Lock()

    async def ask(self, lines: list[dict[str, Any]]) -> AsyncIterator[tuple[int, Event]]:
        """(index of the line, event) until all are answered; those that are not are cancelled when the caller leaves.

        Raises Refused.
        """
        if len(self.waiting) + len(lines) > MOST_REQUESTS:
            raise Refused(429, f"{len(self.waiting)} requests are being answered: try again later")
        if self.timer is not None:
            self.timer.cancel()
        events: asyncio.Queue[Event] = asyncio.Queue()
        indices = {uuid4().hex: index for index in range(len(lines))}
        self.waiting |= dict.fromkeys(indices, events)
        try:
            for id_, line in zip(indices, lines, strict=True):
                await self._write({"id": id_, **line})
            while self.waiting.keys() & indices.keys():
                event = await events.get()
                if "error" in event:
                    error = event["error"]
                    what = error["error"] + (f"; fix: {error['fix']}" if error.get("fix") else "")
                    raise Refused(event["status"], what, error.get("where"))
                if "done" in event:
                    self.waiting.pop(event["id"], None)
                yield indices[event["id"]], event
        finally:
            for id_ in self.waiting.keys() & indices.keys():
                del self.waiting[id_]
                if self.process is not None and self.process.stdin is not None:  # no await: the caller may be gone
                    self.process.stdin.write(json.dumps({"cancel": id_}).encode() + b"\n")
            if not self.waiting:
                self.timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._idle)

    async def _write(self, line: dict[str, Any]) -> None:
        async with self.starting:
            if self.process is None or self.process.returncode is not None:
                await self._start()
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        await self.process.stdin.drain()

    async def _start(self) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "wb") as errors:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, str(INFER), "--mode", "requests", "--json",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors, limit=2**26,
                cwd=self.root, env={**os.environ, "SFT_ROOT": str(self.root)}, start_new_session=True,
            )  # fmt: skip
        self.reader = asyncio.create_task(self._read(self.process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        last: Event = {}
        async for line in process.stdout:
            event = json.loads(line)
            if (events := self.waiting.get(str(event.get("id")))) is not None:
                events.put_nowait(event)
            elif event.get("id") is None:
                last = event  # why it could not start
        code = await process.wait()
        if process is not self.process:
            return
        log_path = self.log_path.relative_to(self.root)
        what = {"error": f"the process that answers has ended with code {code}", "fix": f"its log is {log_path}"}
        for events in set(self.waiting.values()):
            events.put_nowait({"error": last if "error" in last else what, "status": 503})

    def _idle(self) -> None:
        process, self.process = self.process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()

    async def release(self) -> None:
        """Ends the process if it has nothing to answer, and frees its memory."""
        if not self.waiting:
            await self.close()

    async def close(self) -> None:
        """Ends the process."""
        process, self.process = self.process, None
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


def create_router(root: Path) -> APIRouter:
    """The routes; `release`, an attribute, frees the memory of an idle worker before a training starts."""
    worker = Worker(root)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await worker.close()

    router = APIRouter(prefix="/v1", route_class=OpenAIRoute, lifespan=lifespan)
    router.release = worker.release  # type: ignore[attr-defined]

    @router.get("/models")
    def list_models() -> dict[str, Any]:
        """The models that answer: every finished run, its base, and the newest run's base."""
        entries = [{"id": "base", "object": "model", "created": 0, "owned_by": "sft-play"}]
        for run in runs.newest_first(root):
            if run.finished and answers(run):
                created = int((run.folder / runs.FINISHED).stat().st_mtime)
                entries += [{**entries[0], "id": run.name + side, "created": created} for side in ("", ":base")]
        return {"object": "list", "data": entries}

    @router.get("/models/{model}")
    def get_model(model: str) -> dict[str, Any]:
        """One of the models that answer."""
        for each in list_models()["data"]:
            if each["id"] == model:
                return dict(each)
        check_name(model)
        raise Refused(404, f"there is no model {model}", "model", "model_not_found")

    @router.post("/chat/completions", response_model=None)
    async def chat_completions(request: ChatRequest) -> Response:
        """An answer to a conversation. Calls of tools are read from it; it is sent whole then, also as a stream."""
        return await respond(request, request.lines(), Form("chat.completion"))

    @router.post("/completions", response_model=None)
    async def completions(request: CompletionRequest) -> Response:
        """What the model writes after a text."""
        return await respond(request, request.lines(), Form("text_completion"))

    async def respond(request: AnswerRequest, lines: list[dict[str, Any]], form: Form) -> Response:
        check_name(request.model)
        form.model = request.model
        events = worker.ask(lines)
        if not request.stream:
            async with aclosing(events):  # type: ignore[type-var]
                return JSONResponse(form.whole([each async for each in events], len(lines)))
        first = await anext(events)  # an error before the first token has its own status
        usage = request.stream_options is not None and request.stream_options.include_usage
        return StreamingResponse(streamed(form, first, events, len(lines), usage), media_type="text/event-stream")

    def check_name(model: str) -> None:
        if model == "base":
            return
        try:
            run = runs.named(model.partition(":")[0], root)
        except RunError as error:
            what = f"there is no model {model}" + (f": {error.fix}" if error.fix else "")
            raise Refused(404, what, "model", "model_not_found") from None
        if not answers(run):
            raise Refused(404, f"the run {run.name} has not finished: it has no model yet", "model", "model_not_found")

    return router


def answers(run: runs.Run) -> bool:
    """Whether a run has left something that answers."""
    return run.adapter_dir.is_dir() or run.model_dir.is_dir()


async def streamed(
    form: Form, first: tuple[int, Event], events: AsyncIterator[tuple[int, Event]], count: int, usage: bool
) -> AsyncIterator[str]:
    """The answer as server-sent events."""

    def line(value: dict[str, Any]) -> str:
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

    async with aclosing(events):  # type: ignore[type-var]
        for opening in form.openings(count):
            yield line(opening)
        seen = [first]
        yield line(form.chunk(*first))
        try:
            async for index, event in events:
                seen.append((index, event))
                yield line(form.chunk(index, event))
        except Refused as error:
            yield line(error.json())
            return
        if usage:
            yield line({**form.envelope(".chunk"), "choices": [], "usage": usage_of(seen)})
        yield "data: [DONE]\n\n"


class Form:
    """Answers in the form of one of the two routes. kind: chat.completion or text_completion."""

    def __init__(self, kind: str) -> None:
        self.kind, self.model = kind, ""
        self.id, self.created = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid4().hex}", int(time.time())

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

    def envelope(self, ending: str = "") -> dict[str, Any]:
        kind = self.kind + ending if self.is_chat else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, events: list[tuple[int, Event]], count: int) -> dict[str, Any]:
        choices = []
        for index in range(count):
            own = [event for at, event in events if at == index]
            text, done = "".join(event.get("text", "") for event in own), own[-1]["done"]
            choice: dict[str, Any] = {"text": text}
            if self.is_chat:
                calls = {"tool_calls": tool_calls(done)} if done["tool_calls"] else {}
                choice = {"message": {"role": "assistant", "content": text or (None if calls else ""), **calls}}
            choices.append({"index": index, **choice, "logprobs": None, "finish_reason": done["finish"]})
        return {**self.envelope(), "choices": choices, "usage": usage_of(events)}

    def openings(self, count: int) -> list[dict[str, Any]]:
        """The chunks in front of a chat's answers, which name who speaks."""
        delta = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        chunks = [{**self.envelope(".chunk"), "choices": [{"index": index, **delta}]} for index in range(count)]
        return chunks if self.is_chat else []

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        text, done = event.get("text", ""), event.get("done", {})
        choice: dict[str, Any] = {"text": text}
        if self.is_chat:
            calls = [{"index": at, **call} for at, call in enumerate(tool_calls(done))]
            choice = {"delta": ({"content": text} if text else {}) | ({"tool_calls": calls} if calls else {})}
        finish = done.get("finish")
        choices = [{"index": index, **choice, "logprobs": None, "finish_reason": finish}]
        return {**self.envelope(".chunk"), "choices": choices}


def tool_calls(done: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of an answer, their arguments as JSON text."""
    calls = []
    for call in done.get("tool_calls", []):
        function = {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
        calls.append({"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": function})
    return calls


def usage_of(events: list[tuple[int, Event]]) -> dict[str, int]:
    """Tokens of all prompts and answers."""
    done = [event["done"] for _, event in events if "done" in event]
    prompt, answer = (sum(each[key] for each in done) for key in ("prompt_tokens", "completion_tokens"))
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
