"""The console: the only place that prints, and the frame in which every command runs.

A command's file builds its parser and calls `run(parser, main)`; `main(args)` imports what is heavy, does the work and
returns what `--json` prints. Under --json logs, tables and progress go to stderr, so that stdout stays one JSON value.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import files
from sft.errors import EnvironmentProblem, SftError, Stopped, one_line, redact

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_CONFIG = "configs/run_bnb.yaml"
LOCAL_CONFIG = "configs/local.yaml"
SECONDS_PER_LINE = 30.0  # of progress if there is no terminal
_json_mode = False


def project_root() -> Path:
    """The folder that paths inside a config count from: the one that holds scripts/, unless SFT_ROOT names another."""
    if named := os.environ.get("SFT_ROOT"):
        return Path(named).resolve()
    return Path(__file__).resolve().parents[2]


def default_config() -> str:
    """configs/local.yaml where the quick start has written it, else configs/run_bnb.yaml."""
    root = project_root()
    return str(root / (LOCAL_CONFIG if (root / LOCAL_CONFIG).exists() else DEFAULT_CONFIG))


def parser(doc: str | None, *, config: bool = True) -> argparse.ArgumentParser:
    """A parser with the flags that all commands share (--config, --set, --json). doc: the script's own, for --help."""
    result = argparse.ArgumentParser(
        description=(doc or "").strip().replace("%", "%%"), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if config:
        result.add_argument(
            "--config", metavar="FILE", help="the run's YAML (default: configs/local.yaml, else configs/run_bnb.yaml)"
        )
        result.add_argument(
            "--set", metavar="KEY=VALUE", action="append", default=[], help="override one key, repeatable"
        )
    result.add_argument("--json", action="store_true", help="machine-readable result on stdout, logs on stderr")
    return result


# --- printing


def out() -> Console:
    """A rich console on stdout, or on stderr under --json; colours only on a terminal."""
    from rich.console import Console

    return Console(file=sys.stderr if _json_mode else sys.stdout, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Prints one plain line; no markup is read in it."""
    print(redact(text), file=sys.stderr if _json_mode else sys.stdout, flush=True)


def write(piece: str) -> None:
    """Prints a piece of streamed text, without a line end."""
    print(piece, end="", file=sys.stderr if _json_mode else sys.stdout, flush=True)


def emit(value: Any) -> None:
    """Prints one JSON value as a line on stdout, for commands whose --json is one line a row."""
    print(redact(json.dumps(value, ensure_ascii=False)))


def confirmed(question: str, force: bool, fix: str) -> bool:
    """Whether the user agrees. Raises EnvironmentProblem without a terminal to ask on; force: without asking."""
    if force:
        return True
    if not sys.stdin.isatty():
        raise EnvironmentProblem(f"{question} Nobody can answer here", fix=fix)
    return input(f"{question} [y/N] ").strip().lower() == "y"


def warn(text: str) -> None:
    """Prints a warning on stderr."""
    _print_marked("warning", 33, redact(text))


def _print_marked(label: str, colour: int, text: str) -> None:
    coloured = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    mark = f"\033[{colour}m{label}:\033[0m" if coloured else f"{label}:"
    print(f"{mark} {text}", file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; the caller formats the numbers."""
    from rich.table import Table
    from rich.text import Text

    result = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        result.add_row(*[Text(str(cell)) for cell in row])
    out().print(result)


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 3 min, 2 h 10 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


@contextmanager
def progress(title: str, *, remaining: bool = True) -> Iterator[Callable[..., None]]:
    """Yields `advance(done, total, beside="")`: a bar on a terminal, else a line every half minute, with the time left.

    beside: text to show next to the title. remaining: False where it has the time left already; it replaces the title.
    """
    if not sys.stderr.isatty():
        started = last_line = time.monotonic()

        def advance(done: int, total: int | None, beside: str = "") -> None:
            nonlocal last_line
            now = time.monotonic()
            if now - last_line >= SECONDS_PER_LINE:
                last_line = now
                share = f" {done / total:.0%}" if total else ""
                share += f", {duration((now - started) * (total - done) / done)} left" if total and done else ""
                print(f"{title}{share}  {beside}".rstrip(), file=sys.stderr, flush=True)

        yield advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.percentage:>3.0f}%")]
    columns += [TimeRemainingColumn()] if remaining else []
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total, beside="": bars.update(
            task, completed=done, total=total, description=f"{title}  {beside}".rstrip() if remaining else beside
        )


# --- the frame of every command


def run(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], Any]) -> None:
    """Parses, runs `main(args)`, prints its result under --json, and exits.

    Exit codes: 0 done, 2 an error that the user can fix, 130 or 143 stopped by the user or the system, 1 a bug.
    """
    global _json_mode
    args = parser.parse_args()
    _json_mode = args.json
    if getattr(args, "config", "") is None:
        args.config = default_config()
    quiet_libraries()
    show_logs()
    try:
        result = main(args)
    except SftError as error:
        if os.environ.get("SFT_DEBUG"):
            raise
        sys.exit(_report_error(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("SFT_DEBUG"):
            raise
        sys.exit(_report_bug(error))
    if args.json and result is not None:
        emit(result)


def _report_error(error: SftError) -> int:
    if _json_mode:
        entry = {**error.entry(), **error.details}
        if problems := getattr(error, "problems", None):
            entry["problems"] = [each.entry() for each in problems]
        emit(entry)
    message = redact(str(error))
    _print_marked("error", 31, message)
    if not isinstance(error, Stopped):
        _save_error(message)
    return error.exit_code


def _report_bug(error: Exception) -> int:
    path = _save_error(traceback.format_exc(), make_folder=True)
    print(
        f"error: unexpected {type(error).__name__}: {one_line(error, 500)}\n"
        f"  this is a bug in sft-play, not your mistake: the traceback is in {path}\n"
        "  fix:   make doctor, and send its output with your report",
        file=sys.stderr,
    )
    return 1


def _save_error(text: str, *, make_folder: bool = False) -> Path:
    """Writes the last error to outputs/last_error.txt, for `make doctor`, if that can be written."""
    path = project_root() / "outputs" / "last_error.txt"
    if make_folder or path.parent.is_dir():
        with suppress(SftError, OSError):
            files.write_text(path, redact(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {shlex.join(sys.argv)}\n{text}\n"))
    return path


def quiet_libraries() -> None:
    """Switches off the libraries' advice lines, telemetry and welcome messages."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "BITSANDBYTES_NOWELCOME": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


class _ConsoleHandler(logging.Handler):
    """Prints what the packages log: warnings marked as such, the rest as plain lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            (warn if record.levelno >= logging.WARNING else say)(record.getMessage())
        except BrokenPipeError:
            raise
        except OSError:  # the terminal was closed; the work goes on
            return


def show_logs() -> None:
    """Prints what the "sft" logger gets, and keeps the libraries' loggers to errors."""
    logger = logging.getLogger("sft")
    if not logger.handlers:
        logger.addHandler(_ConsoleHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for noisy in ("bitsandbytes", "transformers", "datasets", "accelerate", "torch", "httpx", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
