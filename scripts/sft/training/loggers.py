"""Where a run's numbers go: outputs/<run>/log.jsonl, TensorBoard's event files, the terminal, and other trackers.

On a resume, lines of steps after the checkpoint are removed and TensorBoard purges those steps, so that no
curve overlaps itself. Trackers that cannot take numbers back are not sent them twice.
"""

from __future__ import annotations

import atexit
import importlib
import io
import json
import logging
import math
import netrc
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil

from sft import files, runs
from sft.errors import EnvironmentProblem, one_line, redact

if TYPE_CHECKING:
    from sft.config.schema import Config
    from sft.runs import Run
    from sft.training.checkpoint import Progress

log = logging.getLogger("sft.training")
# keys of the loop's history -> keys of log.jsonl and tags of TensorBoard
NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "epoch": "train/epoch",
    "ewc_penalty": "train/ewc_penalty",
    "windows_skipped": "train/windows_skipped",
}
SECONDS_PER_LINE = 30.0  # of progress where there is no bar
SECONDS_PER_STATUS = 1.0  # of status.json
Report = Callable[[int, int, str], None]  # steps done, steps in all, what to show beside them


def public_names(entry: Mapping[str, Any]) -> dict[str, float]:
    """An entry of the loop's history under the public names; `eval_x` is `eval/x`."""
    values = {NAMES[key]: value for key, value in entry.items() if key in NAMES}
    values |= {f"train/{key}": value for key, value in entry.items() if key.startswith(("rewards/", "logps/"))}
    values |= {f"eval/{key[5:]}": value for key, value in entry.items() if key.startswith("eval_")}
    return {key: float(value) for key, value in values.items()}


class Loggers:
    """Logs a run from the step after `after_step` on.

    path: its log.jsonl, one JSON object a line, in which a number that is not finite is null; None on other ranks than
    0, which log nothing. curves: the folder for TensorBoard, None for no curves. trackers: wandb and others. memory:
    whether to add `memory_gauges`. report: called after each step, for a progress bar; without one, lines
    are logged.
    """

    def __init__(
        self,
        path: Path | None = None,
        curves: Path | None = None,
        *,
        trackers: Trackers | None = None,
        after_step: int = 0,
        total_steps: int = 0,
        memory: bool = False,
        report: Report | None = None,
    ) -> None:
        self.path, self.total_steps, self.memory, self.report = path, total_steps, memory, report
        self.writer: Any = None
        self.trackers, self._after_step = trackers, after_step
        self._start = (time.monotonic(), 0, 0, 0.0)  # when this process began to train; steps, tokens, seconds before
        self._line = self._written = -math.inf  # when the last line of progress, and status.json, were written
        self._metrics: dict[str, float | None] = {}  # the last value of each
        if path is None:
            return
        files.write_text(
            path, "".join(_json_line(entry) for entry in runs.read_log(path) if entry["step"] <= after_step)
        )
        if curves is not None:
            from torch.utils.tensorboard import SummaryWriter

            try:
                self.writer = SummaryWriter(str(curves), purge_step=after_step + 1 if after_step else None)
            except OSError as error:
                log.warning("no TensorBoard curves (%s); log.jsonl has the numbers", error)

    def entry(self, step: int, entry: Mapping[str, Any]) -> None:
        """Logs an entry of the loop's history."""
        if self.path is None:
            return
        values = public_names(entry) | (memory_gauges() if self.memory and "loss" in entry else {})
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        files.append(self.path, _json_line({"step": step, **finite}))
        self._metrics |= finite
        if "loss" not in entry:  # an evaluation; figures of a step go with the step's own status
            self._status()
        self._to_tensorboard(step, lambda writer: [writer.add_scalar(name, values[name], step) for name in values])
        if self.trackers is not None:
            self.trackers.log(step, finite)
        log.debug("step %d: %s", step, "  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def text(self, step: int, name: str, text: str) -> None:
        """Logs sample answers, as Markdown."""
        if self.path is not None:
            files.append(self.path, _json_line({"step": step, name: text}))
            self._to_tensorboard(step, lambda writer: writer.add_text(name, text, step))
            if self.trackers is not None:
                self.trackers.log(step, {name: text})

    def begin(self, progress: Progress) -> None:
        """Training begins, or goes on, after `progress`: speed and time left count from here.

        Raises EnvironmentProblem, on every rank, if a tracker cannot start.
        """
        if (trackers := self.trackers) is not None:
            from sft.training import distributed

            distributed.on_rank0(lambda: trackers.start(resume=self._after_step > 0))
        self._start = (time.monotonic(), progress.global_step, progress.tokens, progress.seconds)
        self.busy(progress.global_step, "the first step")

    def busy(self, step: int, doing: str) -> None:
        """Shows on the progress bar, and in status.json, what takes longer than a step."""
        self._status(phase=doing, step=step)
        if self.report is not None:
            self.report(step, self.total_steps, f"step {step}/{self.total_steps}  {doing}")

    def step(self, progress: Progress) -> None:
        """A step has ended: moves the bar, or logs a line for the first step, the last one and now and then between."""
        now, step, (since, steps, tokens, seconds) = time.monotonic(), progress.global_step, self._start
        speed = (progress.tokens - tokens) / max(progress.seconds - seconds, 1e-9)
        left = (now - since) / (step - steps) * (self.total_steps - step)
        if step == self.total_steps or now - self._written >= SECONDS_PER_STATUS:
            self._written = now
            self._status(phase="training", step=step, tokens_per_second=round(speed, 1), seconds_left=round(left))
        shown = f"step {step}/{self.total_steps}  loss {progress.last_loss:.4f}  {speed:,.0f} tokens/s"
        shown += f"  {clock(left)} left"
        if self.report is not None:
            self.report(step, self.total_steps, shown)
        elif step == self.total_steps or now - self._line >= SECONDS_PER_LINE:
            self._line = now
            log.info(shown)

    def _status(self, **values: object) -> None:
        if self.path is not None:
            runs.update_status(self.path.parent, total_steps=self.total_steps, metrics=self._metrics, **values)

    def sync(self) -> None:
        """Called before a checkpoint is written: it must never know more than the log beside it."""
        if self.path is not None and self.path.exists():
            files.sync(self.path)

    def close(self, step: int, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """Writes TensorBoard's HParams tab, settings against results, and ends its file."""

        def end(writer: Any) -> None:
            writer.add_hparams(dict(settings), dict(results), run_name=".")
            writer.close()

        self._to_tensorboard(step, end)
        if self.trackers is not None:
            self.trackers.log(step, {f"final/{name.removeprefix('hparam/')}": value for name, value in results.items()})
            self.trackers.end()

    def _to_tensorboard(self, step: int, write: Callable[[Any], object]) -> None:
        """Writes to TensorBoard; its curves end where its disk refuses, while log.jsonl's refusal ends the run."""
        if self.writer is None:
            return
        try:
            write(self.writer)
            self.writer.flush()
        except OSError as error:
            self.writer = None
            log.warning("TensorBoard's curves end at step %d (%s); log.jsonl has the numbers", step, error)


class Trackers:
    """The runs of this training run in wandb, MLflow and trackio, through accelerate's trackers.

    outputs/<run>/trackers.json has their ids, so that a resumed run continues the same ones, and the last step that
    each has in full. Without a key or a server in the environment they write into outputs/<tracker> and send nothing.
    Only rank 0 starts them.
    """

    PROJECT = "sft-play"

    def __init__(self, names: Sequence[str], run: Run, config: Config) -> None:
        self.names, self.run, self.config = names, run, config
        self.path, self.folder = run.folder / "trackers.json", run.folder.parent
        self.started: dict[str, Any] = {}
        self.records: dict[str, dict[str, Any]] = {}

    def start(self, *, resume: bool) -> None:
        """Starts or continues every tracker's run. Raises EnvironmentProblem."""
        stored = files.read_json(self.path) if resume else {}
        for name in self.names:
            known = stored.get(name, {})
            try:
                with redirect_stdout(sys.stderr if name != "trackio" else io.StringIO()):
                    tracker, identity, place = getattr(self, f"_start_{name}")(known.get("id"))
                    if not known:
                        tracker.store_init_configuration(flat(self.config.model_dump()))
            except Exception as error:  # of a library that we do not know well: network, login, disk, versions
                raise EnvironmentProblem(
                    f"{name} cannot be used: {one_line(error, 300)}",
                    where="logging.backends",
                    fix="--set logging.backends=tensorboard",
                ) from error
            self.started[name] = tracker
            self.records[name] = {"id": identity, "has_steps_to": known.get("has_steps_to", -1), "at": place}
            log.info("%s: %s%s", name, "the same run as before, " if known else "", place)
        self._last = {name: record["has_steps_to"] for name, record in self.records.items()}
        files.write_json(self.path, self.records)
        atexit.register(self.end)  # a run that is stopped; before the libraries' own, which print on stdout

    def _start_wandb(self, identity: str | None) -> tuple[Any, str, str]:
        from accelerate.tracking import WandBTracker

        os.environ.setdefault("WANDB_SILENT", "true")
        identity = identity or uuid.uuid4().hex[:12]
        mode, has_key = os.environ.get("WANDB_MODE"), _has_wandb_key()
        if mode == "online" and not has_key:
            raise ValueError("WANDB_MODE is online, but there is no key (type `wandb login`, or set WANDB_API_KEY)")
        mode = mode or ("online" if has_key else "offline")
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", self.PROJECT),
            id=identity,
            name=self.run.name,
            dir=str(self.folder),
            mode=mode,
            resume="allow",
            settings={"console": "off"},
        )
        tracker.start()
        where = Path(tracker.tracker.dir).parent if mode != "online" else ""
        return tracker, identity, f"offline; to upload it: wandb sync {where}" if where else str(tracker.tracker.url)

    def _start_mlflow(self, identity: str | None) -> tuple[Any, str, str]:
        from accelerate.tracking import MLflowTracker

        place = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not place:
            folder = self.folder / "mlflow"
            files.make_folder(folder)
            has_database = find_spec("sqlalchemy") is not None  # mlflow-skinny comes without
            place = f"sqlite:///{folder}/mlflow.db" if has_database else folder.as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        importlib.import_module("mlflow").set_tracking_uri(place)
        tracker = MLflowTracker(self.PROJECT, run_name=self.run.name, run_id=identity)
        tracker.start()
        is_local = place.startswith(("file:", "sqlite:"))
        shown = f"to look at it: mlflow ui --backend-store-uri {place}" if is_local else place
        return tracker, str(tracker.tracker.info.run_id), shown

    def _start_trackio(self, identity: str | None) -> tuple[Any, str, str]:
        from accelerate.tracking import TrackioTracker

        folder = os.environ.setdefault("TRACKIO_DIR", str(self.folder / "trackio"))
        name = identity or f"{self.run.name}-{uuid.uuid4().hex[:6]}"
        tracker = TrackioTracker(self.PROJECT, name=name, resume="must" if identity else "never", embed=False)
        tracker.start()
        return tracker, name, f"to look at it: TRACKIO_DIR={folder} trackio show --project {self.PROJECT}"

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends what the trackers do not have yet; one that fails ends there, while the run goes on."""
        for name, tracker in list(self.started.items()):
            record = self.records[name]
            numbers = {key: value for key, value in values.items() if value is not None}
            if name == "mlflow":
                numbers = {key: value for key, value in numbers.items() if not isinstance(value, str)}
            if step <= self._last[name] or not numbers:
                continue
            try:
                tracker.log(numbers, step=step)
            except Exception as error:  # as above
                del self.started[name]
                log.warning("%s ends at step %d (%s); log.jsonl has the numbers", name, step, one_line(error, 300))
            else:
                record["has_steps_to"] = step - 1  # more numbers of this step may follow
        if self.started:
            files.write_json(self.path, self.records)

    def end(self) -> None:
        """Ends every tracker's run and waits until it has everything."""
        for name, tracker in list(self.started.items()):
            del self.started[name]
            with suppress(Exception), redirect_stdout(sys.stderr if name != "trackio" else io.StringIO()):
                if name == "trackio":  # whose tracker leaves its run open for a second end, at exit
                    importlib.import_module(name).finish()
                else:
                    tracker.finish()


def require_installed(backends: Sequence[str]) -> None:
    """Raises EnvironmentProblem for a tracker whose library is missing."""
    for name in backends:
        if find_spec(name) is None:
            raise EnvironmentProblem(
                f"{name} is not installed, and logging.backends names it",
                where="logging.backends",
                fix=f"{sys.executable} -m pip install {name}",
            )


def _has_wandb_key() -> bool:
    """Whether wandb would find a key without asking for one: WANDB_API_KEY, or the host's entry in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings with dotted keys, as trackers take them: plain values, secrets replaced."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            values |= flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, bool | int | float)
            values[prefix + key] = value if plain else redact(str(value))
    return values


def _json_line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    hours, minutes, rest = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def memory_gauges() -> dict[str, float]:
    """The GPU's utilisation and the peak of this process there, in GiB; without a GPU its peak and its memory now."""
    import torch

    from sft.training.result import peak_bytes

    peak = peak_bytes() / 2**30
    if not torch.cuda.is_available():
        return {"cpu/memory_gib": peak, "cpu/memory_now_gib": psutil.Process().memory_info().rss / 2**30}
    from sft.model.hardware import gpu_stats

    stats = gpu_stats() or {}
    values = {"memory_gib": peak, "utilisation": stats.get("utilisation")}
    values["memory_used_gib"] = stats["memory_used"] / 2**30 if stats else None
    return {f"gpu/{name}": value for name, value in values.items() if value is not None}
