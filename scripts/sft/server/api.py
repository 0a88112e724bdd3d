"""The server's routes under /api/v1/sft, each over what a command reads or writes.

Nothing here can do what the commands cannot. What a client sends is checked first (`sft.server.access`).
"""

from __future__ import annotations

import asyncio
import filecmp
import json
import logging
import re
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timezone
from html import escape
from itertools import count, islice
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Query, Request
from fastapi.concurrency import contextmanager_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from sft import files, runs
from sft.config.load import Loaded, display_path, load, resolve_path
from sft.config.reference import table
from sft.errors import ConfigError, DataError, SftError, one_line, redact
from sft.server.access import (
    PREFIX,
    ConfigRequest,
    Configs,
    Guard,
    Settings,
    StrictModel,
    error_json,
    renamed,
    snapshot,
)  # fmt: skip
from sft.server.chat_api import Refused, create_router
from sft.server.jobs import ENDED, Conflict, NotFound, Queue, run_command

MAX_PREVIEW = 50  # rows
MAX_COMMANDS = (2, 10)  # commands whose answers clients wait for: running, and together with those that wait
UPLOADS = "data/uploads"
PLACING = threading.Lock()  # of uploads
SEE_ROUTES = "GET /docs lists the routes, /openapi.json what each takes"
POLL_SECONDS = 1.0  # of a follower of a log
DATA_NAME = re.compile(
    r"[\w][\w .-]{0,80}\.(jsonl?|ndjson|csv|tsv|parquet|arrow|txt|xlsx)(\.(gz|zst|bz2|xz))?", re.IGNORECASE
)
FILE = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
CONFIG = {
    "application/json": {"schema": ConfigRequest.model_json_schema()},
    "application/yaml": {"schema": {"type": "string"}},
}
log = logging.getLogger("sft.server")
Name = Annotated[str, Path(pattern=r"^\w[\w.+-]{0,100}$", description="a job's id, or the name of a run")]


# -- what clients send and get


class TrainRequest(ConfigRequest):
    resume_from_checkpoint: Annotated[str, Field(max_length=300, examples=["outputs/run/checkpoint-200"])] | None = None
    force: Annotated[bool, Field(description="train even if the memory plan says that it does not fit")] = False


class PlanRequest(ConfigRequest):
    gpu: Annotated[str, Field(pattern=r"^[\w .]{1,40}$", examples=["RTX 4060", "8GiB", "cpu"])] | None = None


class PreviewRequest(ConfigRequest):
    rows: Annotated[list[dict[str, Any]], Field(max_length=MAX_PREVIEW)] | None = None
    split: Literal["train", "val", "test"] = "train"
    limit: Annotated[int, Field(ge=1, le=MAX_PREVIEW)] = 6
    template: Annotated[str, Field(pattern=r"^[\w-]{1,60}$")] | None = None


class MergeRequest(StrictModel):
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"


class ExportRequest(StrictModel):
    format: Literal["gguf", "ollama", "hf"] = "gguf"
    type: Literal["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "bf16", "f32"] = "f16"


class EvaluateRequest(StrictModel):
    split: Literal["val", "test"] = "test"
    limit: Annotated[int, Field(ge=0, le=10**6, description="only the first rows; 0: all")] = 0
    both: Annotated[bool, Field(description="score the base too")] = True


class ReportRequest(StrictModel):
    limit: Annotated[int, Field(ge=0, le=10**6, description="only the first rows; 0: all")] = 0


class JobError(BaseModel):
    error: str
    where: str | None = None
    fix: str | None = None


class ErrorAnswer(JobError):
    model_config = ConfigDict(extra="allow")
    problems: list[JobError] = []


class JobStatus(BaseModel):
    """A job, or a run that a command started."""

    model_config = ConfigDict(protected_namespaces=())

    job_id: str
    kind: Literal["train", "merge", "export", "evaluate", "report"]
    run: Annotated[str | None, Field(description="none before a training has started")]
    name: Annotated[str | None, Field(description="what the run is to be called; in use, it gets a number")] = None
    model: str | None
    status: Literal["queued", "running", "paused", "completed", "failed", "stopped"]
    phase: str | None
    requested: str | None
    progress: float
    current_step: int
    total_steps: int
    metrics: dict[str, float]
    tokens_per_second: float | None
    seconds_left: float | None
    error: JobError | None
    result: Annotated[dict[str, Any] | None, Field(description="of one completed job: what --json prints")] = None
    created_at: datetime
    updated_at: datetime


class JobList(BaseModel):
    jobs: list[JobStatus]


# -- the application


def create_app(settings: Settings, hosts: tuple[str, ...] = ()) -> FastAPI:
    """The application: the queue's thread runs as long as it does. hosts: further names that it is called by.

    Raises RunError if another server has the project.
    """
    root = settings.root
    chat: Any = create_router(root)
    queue = Queue(root)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def before_training() -> None:
            try:
                asyncio.run_coroutine_threadsafe(chat.release(), loop).result(60)
            except Exception as error:  # a training does not wait for a chat that does not end
                log.warning("the chat's model is still loaded: %s", one_line(error))

        queue.before_training = before_training
        thread = threading.Thread(target=queue.run, name="queue", daemon=True)
        thread.start()
        try:
            yield
        finally:
            await run_in_threadpool(queue.close)
            await run_in_threadpool(thread.join, 10)

    app = FastAPI(
        title="sft-play", description="Fine-tuning jobs on this machine. A job is a command of the kit.",
        lifespan=lifespan, docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.state.queue = queue
    app.add_middleware(Guard, settings=settings, hosts=hosts)  # type: ignore[arg-type]

    @app.exception_handler(SftError)
    async def refused(_: Request, error: SftError) -> JSONResponse:
        status = 404 if isinstance(error, NotFound) else 409 if isinstance(error, Conflict) else 422
        return JSONResponse(error_json(error), status)

    @app.exception_handler(RecursionError)
    @app.exception_handler(UnicodeError)
    async def no_text(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_json(SftError(f"a value is not a text or a plain value: {one_line(error)}")), 422)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = [mistake(each) for each in error.errors()]
        what = SftError(f"{len(problems)} mistakes in the request", fix=SEE_ROUTES, problems=problems)
        return JSONResponse(error_json(problems[0] if len(problems) == 1 else what), 422)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        method, path, status = request.method, request.url.path, error.status_code
        what = f"there is no route {method} {path}" if status in (404, 405) else one_line(error.detail)
        body = error_json(SftError(what, fix=SEE_ROUTES))
        if path.startswith("/v1/"):
            body = Refused(status, f"{what}; fix: {SEE_ROUTES}").json()
        return JSONResponse(body, status, headers=error.headers)

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    def docs() -> str:
        return docs_page(app.openapi())

    configs = Configs(settings)
    commands = Commands(root, configs)
    app.include_router(job_routes(settings, configs, commands))
    app.include_router(config_and_data_routes(settings, configs, commands))
    app.include_router(model_routes(settings))
    app.include_router(chat)
    sft = FilePath(__file__).parents[1]

    @app.get("/report.css", include_in_schema=False)
    def style() -> FileResponse:
        return FileResponse(sft / "report" / "templates" / "page.css")

    if (static := sft / "server" / "static").is_dir():
        app.mount("/", StaticFiles(directory=static, html=True), name="page")
    return app


def mistake(error: dict[str, Any]) -> SftError:
    """One of pydantic's errors as ours."""
    what, fix = str(error["msg"]).removeprefix("Value error, "), SEE_ROUTES
    if error["type"] == "json_invalid":
        what += f": {error['ctx']['error']}"
    if error["loc"] == ("body",) and error["type"] in ("missing", "model_attributes_type"):
        what, fix = "the body is no JSON object", "curl --json '{...}'; other clients: Content-Type: application/json"
    return SftError(what, where=".".join(map(str, error["loc"])) or None, fix=fix)


def docs_page(openapi: dict[str, Any]) -> str:
    """The routes as a plain page; openapi.json has them in full."""
    rows = [
        f"<tr><td><code>{method.upper()} {escape(path)}</code><td>{escape(str(entry.get('description', '')))}"
        for path, methods in openapi["paths"].items()
        for method, entry in methods.items()
    ]
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>sft-play: routes</title><h1>Routes</h1>'
    return f'{head}<p>In full: <a href="/openapi.json">openapi.json</a></p><table>{"".join(rows)}</table></html>'


def queue_of(request: Request) -> Queue:
    queue: Queue = request.app.state.queue
    return queue


Jobs = Annotated[Queue, Depends(queue_of)]


def new_router() -> APIRouter:
    return APIRouter(prefix=PREFIX, responses={"4XX": {"model": ErrorAnswer, "description": "what is wrong"}})


def status_of(queue: Queue, name: str) -> JobStatus:
    return JobStatus(**queue.view(name))


async def json_or_yaml(request: Request) -> ConfigRequest:
    """A request's body: JSON where its Content-Type says so, else the YAML of a config."""
    body, is_json = await request.body(), "json" in request.headers.get("content-type", "")
    try:
        return ConfigRequest.model_validate_json(body) if is_json else ConfigRequest(config=body.decode())
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


class Commands:
    """The commands whose answers clients wait for, a few at a time."""

    def __init__(self, root: FilePath, configs: Configs) -> None:
        self.root, self.configs = root, configs
        self.running, self.waiting = (threading.BoundedSemaphore(count) for count in MAX_COMMANDS)

    def run(self, name: str, *args: str, lines: bool = False) -> Any:
        """A command's JSON. Raises Conflict if too many others wait for theirs."""
        if not self.waiting.acquire(blocking=False):
            raise Conflict("too many plans and previews are being computed", where=name, fix="wait a few seconds")
        try:
            with self.running:
                return run_command(self.root, name, *args, lines=lines)
        finally:
            self.waiting.release()

    def plan(self, loaded: Loaded, gpu: str | None = None) -> dict[str, Any]:
        """The memory plan of a config, for this machine or another GPU."""
        with self.configs.text_file(snapshot(loaded), ".yaml") as path, renamed(path, self.root, "config"):
            return dict(self.run("plan", "--config", str(path), *(["--gpu", gpu] if gpu else [])))


def job_routes(settings: Settings, configs: Configs, commands: Commands) -> APIRouter:
    """Queue a training; watch, stop, pause and resume jobs."""
    root, router = settings.root, new_router()

    @router.post("/train", status_code=201)
    def train(request: TrainRequest, queue: Jobs) -> JobStatus:
        """Checks a config and its memory plan, and queues a training with it."""
        checkpoint, opened = request.resume_from_checkpoint, None
        if checkpoint is not None:
            folder = configs.inside(checkpoint, "resume_from_checkpoint")
            opened = runs.open_run("outputs/run", root, str(folder))
            if opened.run.folder.parent != root / "outputs" or queue.is_running(opened.run.name):
                what = f"{opened.run.name} is running, or lies outside of outputs/"
                raise Conflict(what, where="resume_from_checkpoint", fix="pause it first: POST /jobs/NAME/pause")
        loaded = configs.load(request, opened.run.settings if opened else None)
        output = resolve_path(root, loaded.config.train.output_dir)
        if output.parent != root / "outputs":
            what = f"train.output_dir is {loaded.config.train.output_dir}, but the server's runs lie in outputs/"
            raise ConfigError(what, where="train.output_dir", fix="train.output_dir: outputs/NAME")
        runs.check_place(loaded.config.train.output_dir, root)
        if not request.force:
            plan = commands.plan(loaded)
            if not plan["fits"]:
                what = f"it does not fit: {plan['peak_gib']} GiB are needed, {plan['device']['name']}"
                what += f" has {plan['device']['gib']}"
                hints = [f"{each['setting']} (saves {each['saves_gib']:.2f} GiB)" for each in plan["remedies"]]
                refusal = Conflict(what, where="the memory plan", fix="; ".join(hints) or "a smaller model")
                refusal.details = {"plan": plan}
                raise refusal
        args = [*(["--force"] if request.force else []), "--resume", str(folder) if opened else "auto"]
        place = {"run": opened.run.name} if opened else {"name": output.name}
        return status_of(queue, queue.add("train", args, **place, config=snapshot(loaded)))

    @router.get("/jobs")
    def list_jobs(queue: Jobs, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> JobList:
        """The newest jobs, and the runs that commands started; the last changed first."""
        return JobList(jobs=[JobStatus(**view) for view in queue.views(limit)])

    @router.get("/jobs/{job_id}")
    def get_job(job_id: Name, queue: Jobs) -> JobStatus:
        """One job, or the run of that name."""
        return status_of(queue, job_id)

    @router.delete("/jobs/{job_id}")
    def stop_job(job_id: Name, queue: Jobs, at_once: bool = False) -> JobStatus:
        """Stops a job after its step, with a checkpoint; at_once: kills it."""
        queue.stop(job_id, "stopped", at_once=at_once)
        return status_of(queue, job_id)

    @router.post("/jobs/{job_id}/pause")
    def pause_job(job_id: Name, queue: Jobs) -> JobStatus:
        """Stops a job after its step, with a checkpoint, to be resumed; the next one in the queue starts."""
        queue.stop(job_id, "paused")
        return status_of(queue, job_id)

    @router.post("/jobs/{job_id}/resume")
    def resume_job(job_id: Name, queue: Jobs) -> JobStatus:
        """Queues a job again that was paused or stopped, or has failed; a training goes on at its checkpoint."""
        return status_of(queue, queue.resume(job_id))

    @router.get("/jobs/{job_id}/metrics")
    def metrics(job_id: Name, queue: Jobs, after: Annotated[int, Query(ge=-1)] = -1) -> dict[str, Any]:
        """The history: what was logged after the step `after`, one entry each."""
        name = queue.view(job_id)["run"]
        path = root / "outputs" / name / "log.jsonl" if name else None
        return {"run": name, "history": [each for each in runs.read_log(path) if each["step"] > after] if path else []}

    @router.get("/jobs/{job_id}/logs", response_class=StreamingResponse)
    async def logs(
        job_id: Name, queue: Jobs, last_event_id: Annotated[str | None, Header(pattern=r"^\d{1,15}$")] = None
    ) -> StreamingResponse:
        """The log as server-sent events until the job ends, then the event `end`; ids are places in the file."""
        path = await run_in_threadpool(queue.log_path, job_id)
        stream = follow(path, int(last_event_id or 0), lambda: str(queue.view(job_id)["status"]))
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    return router


def config_and_data_routes(settings: Settings, configs: Configs, commands: Commands) -> APIRouter:
    """Configs, their plans, templates, and files of rows."""
    root, router = settings.root, new_router()

    @router.get("/configs")
    def list_configs() -> dict[str, Any]:
        """The config files of the project, and which one the commands take by default."""
        paths = sorted((root / "configs").glob("**/*.yaml"))
        local = root / "configs" / "local.yaml"
        default = local if local.is_file() else root / "configs" / "run_bnb.yaml"
        entries = [{"path": display_path(path, root), "description": first_comment(path)} for path in paths]
        return {"configs": entries, "default": display_path(default, root)}

    @router.get("/configs/schema")
    def schema() -> dict[str, Any]:
        """Every key of a config: what it takes, its default, its meaning."""
        return {"keys": [{**vars(field), "default": field.default} for field in table().values()]}

    @router.post("/configs/validate", openapi_extra={"requestBody": {"required": True, "content": CONFIG}})
    def validate(request: Annotated[ConfigRequest, Depends(json_or_yaml)]) -> dict[str, Any]:
        """Every mistake of a config, each with its place and the nearest name; without one, the whole config.

        The body is JSON as for /plan, or the YAML itself.
        """
        try:
            loaded = configs.load(request)
        except ConfigError as error:
            return {"valid": False, "errors": [each.entry() for each in error.problems or [error]]}
        return {"valid": True, "errors": [], "config": loaded.config.model_dump()}

    @router.post("/plan")
    def plan(request: PlanRequest) -> dict[str, Any]:
        """Whether it fits: the memory of every phase, and what would help."""
        return commands.plan(configs.load(request), request.gpu)

    @router.get("/templates")
    def templates() -> dict[str, Any]:
        """The chat templates of the project, by the name that data.template_path takes."""
        paths = sorted((root / "chat_templates").glob("*.jinja"))
        return {"templates": [{"name": path.stem, "description": first_comment(path)} for path in paths]}

    @router.post("/templates/preview")
    def preview(request: PreviewRequest) -> dict[str, Any]:
        """Rows as the model is trained on them: each token, and whether it is in the loss."""
        loaded = configs.load(request)
        args = ["--limit", str(request.limit), "--split", request.split, "--tokens"]
        args += ["--template", request.template] if request.template else []
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in request.rows or [])
        with (
            configs.text_file(snapshot(loaded), ".yaml") as config,
            configs.text_file(lines, ".jsonl") as rows,
            renamed(rows, root, "rows"),
        ):
            args += ["--in", str(rows)] if request.rows is not None else []
            return {"rows": commands.run("preview", "--config", str(config), *args, lines=True)}

    @router.post("/data", status_code=201, openapi_extra={"requestBody": {"required": True, "content": FILE}})
    async def upload(
        request: Request,
        name: Annotated[str, Query(max_length=100, examples=["rows.jsonl"])],
        user_col: Annotated[str | None, Query(max_length=100)] = None,
        answer_col: Annotated[str | None, Query(max_length=100)] = None,
    ) -> dict[str, Any]:
        """Takes a file of rows as the request's body and processes it; answers with the ledger of every row.

        `overrides` are the keys with which a training uses these rows.
        """
        if not DATA_NAME.fullmatch(name):
            fix = "a file that ends in .jsonl, .json, .csv, .tsv, .parquet, .arrow, .xlsx or .txt (or these with .gz)"
            raise DataError("this is not the name of a file of rows", where=name, fix=fix)
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise DataError(
                "the body is a form, not a file", where=name, fix="the file itself: curl --data-binary @FILE"
            )
        incoming, size = root / UPLOADS / f".{secrets.token_hex(8)}", 0
        await run_in_threadpool(files.make_folder, incoming.parent)
        async with contextmanager_in_threadpool(files.atomic_file(incoming)) as staged:
            async for chunk in request.stream():
                size += len(chunk)
                if size > settings.max_upload:
                    what = f"the file has more than {files.format_bytes(settings.max_upload)}"
                    raise DataError(what, where=name, fix="start the server with a larger --max-upload")
                await run_in_threadpool(append, staged, chunk)
        path = await run_in_threadpool(place, incoming, name)
        processed = display_path(path.parent / "processed", root)
        args = ["--raw_path", str(path), "--set", f"data.processed_dir={processed}"]
        args += [f"--user_col={user_col}"] if user_col else []
        args += [f"--answer_col={answer_col}"] if answer_col else []
        ledger = await run_in_threadpool(commands.run, "process_data", *args)
        overrides = {"data.processed_dir": processed, "data.stage": "processed"}
        return {"path": display_path(path, root), "bytes": size, "ledger": ledger, "overrides": overrides}

    return router


def model_routes(settings: Settings) -> APIRouter:
    """The finished runs, and what can be made of them."""
    root, router = settings.root, new_router()

    def finished(model_id: str) -> runs.Run:
        run = runs.at(root / "outputs" / model_id, root)
        if not run.finished or not (run.folder / runs.RESOLVED).is_file():
            fix = "GET /api/v1/sft/models lists them"
            raise NotFound(f"there is no model {model_id}: no run of that name has finished", where="model_id", fix=fix)
        return run

    def info(run: runs.Run) -> dict[str, Any]:
        summary, status = files.read_json(run.folder / runs.FINISHED), files.read_json(run.folder / runs.STATUS)
        return {
            "id": run.name,
            "base": status.get("model"),
            "finished_at": datetime.fromtimestamp((run.folder / runs.FINISHED).stat().st_mtime, timezone.utc),
            "loss": (summary.get("eval") or {}).get("loss", summary.get("train_loss_last")),
            "has_report": (run.folder / "report" / "index.html").is_file(),
            "has_samples": (run.folder / "samples.jsonl").is_file(),
        }

    @router.get("/models")
    def list_models() -> dict[str, Any]:
        """The finished runs, the newest first."""
        paths = (root / "outputs").glob(f"*/{runs.FINISHED}")
        folders = [path.parent for path in paths if not path.parent.is_symlink()]
        models = [info(runs.at(folder, root)) for folder in folders if (folder / runs.RESOLVED).is_file()]
        return {"models": sorted(models, key=lambda each: each["finished_at"], reverse=True)}

    @router.get("/models/{model_id}/info")
    def model_info(model_id: Name) -> dict[str, Any]:
        """A finished run: its summary, the metrics of its evaluations, its whole config, its files."""
        run = finished(model_id)
        place = run.model_dir if run.model_dir.is_dir() else run.adapter_dir
        return {
            **info(run),
            "summary": files.read_json(run.folder / runs.FINISHED),
            "metrics": files.read_json(run.folder / "metrics.json"),
            "config": load(run.folder / runs.RESOLVED, root=root).config.model_dump(),
            "folder": display_path(place, root),
            "bytes": files.size(place),
        }

    @router.get("/models/{model_id}/samples")
    def samples(model_id: Name, limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> dict[str, Any]:
        """Answers of the last evaluation, with their references and scores."""
        return {"samples": list(islice(read_lines(finished(model_id).folder / "samples.jsonl"), limit))}

    @router.get("/models/{model_id}/report", response_class=HTMLResponse)
    def report_page(model_id: Name) -> FileResponse:
        """The comparison of base and tuned model, as `make compare` wrote it."""
        page = finished(model_id).folder / "report" / "index.html"
        if not page.is_file():
            fix = f"POST {PREFIX}/models/{model_id}/report"
            raise NotFound(f"{model_id} has no report yet", where="model_id", fix=fix)
        return FileResponse(page, media_type="text/html")

    def queued(queue: Queue, kind: str, model_id: str, *args: str) -> JobStatus:
        run = finished(model_id)
        return status_of(queue, queue.add(kind, ["--run", run.name, *args], run=run.name))

    @router.post("/models/{model_id}/merge", status_code=201)
    def merge(model_id: Name, queue: Jobs, request: MergeRequest = MergeRequest()) -> JobStatus:  # noqa: B008
        """Queues the merge of an adapter into its base: outputs/<run>/merged_<dtype>."""
        out = root / "outputs" / model_id / f"merged_{request.dtype}"
        return queued(queue, "merge", model_id, "--dtype", request.dtype, "--out", str(out))

    @router.post("/models/{model_id}/export", status_code=201)
    def export(model_id: Name, queue: Jobs, request: ExportRequest = ExportRequest()) -> JobStatus:  # noqa: B008
        """Queues an export: outputs/export/<run>-<format>."""
        return queued(queue, "export", model_id, "--format", request.format, "--type", request.type)

    @router.post("/models/{model_id}/evaluate", status_code=201)
    def evaluate(model_id: Name, queue: Jobs, request: EvaluateRequest = EvaluateRequest()) -> JobStatus:  # noqa: B008
        """Queues an evaluation on held-out rows."""
        args = ["--split", request.split, "--limit", str(request.limit), *(["--both"] if request.both else [])]
        return queued(queue, "evaluate", model_id, *args)

    @router.post("/models/{model_id}/report", status_code=201)
    def report(model_id: Name, queue: Jobs, request: ReportRequest = ReportRequest()) -> JobStatus:  # noqa: B008
        """Queues the comparison of base and tuned model on the same rows."""
        return queued(queue, "report", model_id, "--limit", str(request.limit))

    return router


async def follow(path: FilePath, offset: int, status: Callable[[], str]) -> AsyncIterator[str]:
    """Server-sent events with the lines of a file from the byte `offset` on, until the job ends."""
    idle = 0.0
    while True:
        offset, chunk = read_from(path, offset, whole=False)
        state = "" if chunk else status()  # a fraction of a millisecond: cheaper than a thread
        if state in ENDED:
            offset, chunk = read_from(path, offset, whole=True)
        for line in chunk.splitlines(keepends=True):
            offset += len(line)
            text = redact(line.decode("utf-8", "replace").rstrip("\r\n").replace("\r", " "))
            yield f"id: {offset}\ndata: {text}\n\n"
        if state in ENDED and not chunk:
            yield f"event: end\ndata: {state}\n\n"
            return
        idle = 0.0 if chunk else idle + POLL_SECONDS
        if idle >= 15:  # tells proxies, and us, that the client is still there
            idle = 0.0
            yield ": waiting\n\n"
        await asyncio.sleep(0 if chunk else POLL_SECONDS)  # others have their turn, and a client that left is noticed


def read_from(path: FilePath, offset: int, whole: bool) -> tuple[int, bytes]:
    """(where it begins, at most 64 KiB of whole lines) from `offset` on; from 0 where that lies beyond the file's end.

    whole: the last line may lack its end, for no more will come.
    """
    with suppress(FileNotFoundError), open(path, "rb") as file:
        offset = file.seek(offset if offset <= path.stat().st_size else 0)
        chunk = file.read(2**16)
        return offset, chunk if whole or len(chunk) == 2**16 else chunk[: chunk.rfind(b"\n") + 1]
    return offset, b""


def place(incoming: FilePath, name: str) -> FilePath:
    """Moves an upload into a folder of its name, with a number where that has other rows, which a job may use."""
    folder = incoming.with_name(re.sub(r"[^\w-]+", "-", name.partition(".")[0]))
    with PLACING:
        places = (folder if number == 1 else folder.with_name(f"{folder.name}-{number}") for number in count(1))
        path = next(each / name for each in places if not has_other_rows(each, name, incoming))
        files.make_folder(path.parent)
        return incoming.replace(path)


def has_other_rows(folder: FilePath, name: str, incoming: FilePath) -> bool:
    same = (folder / name).is_file() and filecmp.cmp(folder / name, incoming, shallow=False)
    return (folder / "processed").exists() and not same


def append(path: FilePath, chunk: bytes) -> None:
    with open(path, "ab") as file:
        file.write(chunk)


def read_lines(path: FilePath) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, without a line that is still being written."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    yield entry


def first_comment(path: FilePath) -> str:
    """The comment with which a config or a template begins, without its marks."""
    with suppress(OSError, UnicodeDecodeError):
        line = path.read_text(encoding="utf-8").partition("\n")[0]
        if line.startswith(("#", "{#")):
            return line.strip("{}#- ")
    return ""
