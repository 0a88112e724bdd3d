"""The console layer: the only place that prints, and the frame that every command runs in.

A command's file builds its parser and calls `run(parser, main)`; `main(args)` imports what is heavy, does the work and
returns what `--json` prints. Logs, tables and progress go to stderr under --json, so that stdout stays one JSON value.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.credentials import redact
from sft.errors import SftError, Stopped

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_CONFIG = "configs/run_bnb.yaml"
LOCAL_CONFIG = "configs/local.yaml"
SECONDS_A_LINE = 30.0  # of progress where there is no terminal
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


def parser(description: str, examples: str, *, config: bool = True) -> argparse.ArgumentParser:
    """A parser with the flags that all commands share: --config, --set, --json, --help with examples."""
    made = argparse.ArgumentParser(
        description=description,
        epilog="examples:\n" + "\n".join("  " + line for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if config:
        made.add_argument(
            "--config", metavar="FILE", help="the run's YAML (default: configs/local.yaml, else configs/run_bnb.yaml)"
        )
        made.add_argument(
            "--set", metavar="KEY=VALUE", action="append", default=[], help="override one key, repeatable"
        )
    made.add_argument("--json", action="store_true", help="machine-readable result on stdout, logs on stderr")
    return made


def out() -> Console:
    """Where people read: stdout, or stderr under --json. Colours only on a terminal."""
    from rich.console import Console

    return Console(file=sys.stderr if _json_mode else sys.stdout, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One plain line, no markup read in it."""
    print(redact(text), file=sys.stderr if _json_mode else sys.stdout, flush=True)


def write(piece: str) -> None:
    """Text as it comes, without a line's end: answers that stream."""
    print(piece, end="", file=sys.stderr if _json_mode else sys.stdout, flush=True)


def emit(value: Any) -> None:
    """One JSON value as a line on stdout, for commands whose --json is a line a row."""
    print(json.dumps(value, ensure_ascii=False), flush=False)


def warn(text: str) -> None:
    """A warning, on stderr, marked as one."""
    text, colour = redact(text), sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\033[33mwarning:\033[0m {text}" if colour else f"warning: {text}", file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table for people; numbers are the caller's to format."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*[Text(str(cell)) for cell in row])
    out().print(made)


@contextmanager
def progress(title: str) -> Iterator[Callable[..., None]]:
    """Yields `advance(done, total, beside="")`: a bar with the time left on a terminal, else a line every half minute.

    beside: text to show next to the title, such as the loss.
    """
    if not sys.stderr.isatty():
        yield _progress_lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total, beside="": bars.update(
            task, completed=done, total=total, description=f"{title}  {beside}".rstrip()
        )


def _progress_lines(title: str) -> Callable[..., None]:
    import time

    said = time.monotonic()

    def advance(done: int, total: int | None, beside: str = "") -> None:
        nonlocal said
        if time.monotonic() - said >= SECONDS_A_LINE:
            said = time.monotonic()
            share = f" {done / total:.0%}" if total else ""
            print(f"{title}{share}  {beside}".rstrip(), file=sys.stderr, flush=True)

    return advance


def _fail(error: SftError) -> int:
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    if _json_mode:
        problems = getattr(error, "problems", [])
        told = [{"error": one.what, "where": one.where, "fix": one.fix} for one in (error, *problems)]
        told_all = json.dumps({**told[0], **({"problems": told[1:]} if problems else {}), **error.details})
        print(redact(told_all), flush=True)
    said = redact(str(error))
    print(f"\033[31merror:\033[0m {said}" if colour else f"error: {said}", file=sys.stderr, flush=True)
    if not isinstance(error, Stopped):
        _keep_error(said)
    return error.exit_code


def run(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], Any]) -> None:
    """Parses, runs `main(args)`, prints its result under --json, and exits 0, 2 (mendable), 130/143 (stopped) or 1."""
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
        sys.exit(_fail(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:  # a defect of ours or of a library: say so, keep the traceback for the report
        if os.environ.get("SFT_DEBUG"):
            raise
        sys.exit(_defect(error))
    if args.json and result is not None:
        print(json.dumps(result, ensure_ascii=False), flush=True)


def _defect(error: Exception) -> int:
    import traceback

    place = _keep_error(traceback.format_exc(), make_folder=True)
    kept = f"the traceback is in {place}" if place else "set SFT_DEBUG=1 for the traceback"
    said = redact(" ".join(str(error).split()))[:500]
    print(
        f"error: unexpected {type(error).__name__}: {said}\n  this is a bug in sft-play, not your mistake: {kept}\n"
        "  `make doctor` gathers what a report of it needs",
        file=sys.stderr,
    )
    return 1


def _keep_error(told: str, *, make_folder: bool = False) -> Path | None:
    """Keeps the last error in outputs/last_error.txt for `make doctor`; nothing where that cannot be written."""
    import shlex
    import time

    from sft import files

    path = project_root() / "outputs" / "last_error.txt"
    if not (make_folder or path.parent.is_dir()):
        return None
    try:
        files.write_text(path, redact(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {shlex.join(sys.argv)}\n{told}\n"))
    except (SftError, OSError):
        return None
    return path


def quiet_libraries() -> None:
    """Keeps libraries from talking over us: no advice lines, no telemetry, no progress bars of their own."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "BITSANDBYTES_NOWELCOME": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


class _ToConsole(logging.Handler):
    """Shows what the rooms log: warnings marked as such, the rest as plain lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            (warn if record.levelno >= logging.WARNING else say)(record.getMessage())
        except BrokenPipeError:
            raise
        except OSError:  # a terminal that was closed: nobody reads, and the work goes on
            return


def show_logs() -> None:
    """Wires the rooms' logger ("sft") to the console and keeps the libraries' ones to errors."""
    logger = logging.getLogger("sft")
    if not logger.handlers:
        logger.addHandler(_ToConsole())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for noisy in ("bitsandbytes", "transformers", "datasets", "accelerate", "torch", "httpx", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
