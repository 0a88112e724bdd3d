"""The console: the only place that prints, and the frame in which every command runs.

A command's file builds its parser and calls `run(parser, main)`; `main(args)` imports what is heavy, does the work and
returns what `--json` prints. Under --json logs, tables and progress go to stderr, so that stdout stays one JSON value.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sft import files
from sft.errors import ConfigError, EnvironmentProblem, RunError, SftError, Stopped, one_line, redact

if TYPE_CHECKING:
    from rich.console import Console

    from sft.config.load import Loaded

DEFAULT_CONFIG = "configs/run_bnb.yaml"
LOCAL_CONFIG = "configs/local.yaml"
ERROR_LINES = 60  # of earlier errors in outputs/last_error.txt
SECONDS_PER_LINE = 30.0  # of progress if there is no terminal
KERNELS_STORED = "128"  # a micro-batch uses about 60 shapes; torch's default of 1,024 grows to over half a GiB
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
        result.add_argument("--run", metavar="NAME", help="an earlier run: its own settings, and its adapter or model")
        result.add_argument(
            "--set", metavar="KEY=VALUE", action="append", default=[], help="override keys, repeatable: 'a.b=1 c.d=2'"
        )
    result.add_argument("--json", action="store_true", help="machine-readable result on stdout, logs on stderr")
    return result


def load_config(args: argparse.Namespace) -> Loaded:
    """The settings of --config (or --run) and --set, after a line that says which file they come from."""
    from sft.config.load import display_path, load

    loaded = load(args.config, args.set, root=project_root())
    if os.environ.get("RANK", "0") == "0":
        sets = f" with {', '.join(args.set)}" if args.set else ""
        say(f"config: {display_path(Path(args.config), project_root())}{sets}")
    return loaded


def use_run(args: argparse.Namespace) -> None:
    """--run: the config is the run's own; the adapter or model is its own, in commands that take one."""
    from sft import runs

    run = runs.named(args.run, project_root())
    if args.config or getattr(args, "adapters", None) or getattr(args, "merged", None):
        raise ConfigError("--run cannot be combined with --config, --adapters or --merged", fix="leave out one of them")
    args.config = str(run.settings)
    if hasattr(args, "adapters"):
        where = run.model_dir if run.model_dir.is_dir() else run.adapter_dir
        if not where.is_dir():
            what = f"the run {run.name} has not finished, so it has no adapter yet"
            raise RunError(what, where=str(run.folder), fix=f"make resume RUN={run.name}")
        if where == run.model_dir and hasattr(args, "merged"):
            args.merged = where
        else:
            args.adapters = [where] if isinstance(args.adapters, list) else where


# --- what the user types: flags, or the variables of make (whose recipes set SFT_MAKE to the target)

_VARIABLES = {
    "set": "SET", "allow-change": "ALLOW", "resume": "RESUME", "adapters": "ADAPTERS", "run": "RUN", "config": "CONFIG",
    "style": "STYLE", "raw_path": "RAW", "user_col": "USER_COL", "answer_col": "ANSWER_COL", "gpu": "GPU",
    "nproc": "NPROC", "shard": "SHARD", "out": "OUT", "type": "TYPE", "format": "FORMAT", "converter": "CONVERTER",
    "to": "TO", "host": "HOST", "port": "PORT",
}  # fmt: skip
_VALUE = r"""((?:'[^']*'|"[^"]*"|[^\s'"])+?)(?=[),;:?]*(?:\s|$))"""


def as_typed(text: str) -> str:
    """A text with the Python of this process in its commands, and make's variables for flags if make was called."""
    text = text.replace("python scripts/", f"{_python()} scripts/")
    if not os.environ.get("SFT_MAKE") or " scripts/" in text:
        return text
    if name := _VARIABLES.get(text.removeprefix("--")) if text.startswith("--") else None:
        return f"{name}="

    def variable(flags: re.Match[str]) -> str:
        values = [re.sub('^"|"$|\'', "", value) for value in re.findall(rf"--[\w-]+ {_VALUE}", flags[0])]
        return f'{_VARIABLES[flags[1]]}="{" ".join(values)}"'

    text = re.sub(rf"--({'|'.join(_VARIABLES)}) {_VALUE}(?: --\1 {_VALUE})*", variable, text)
    return re.sub(r"--(force|base)\b", lambda flag: f"{flag[1].upper()}=1", text)


def continue_command(run: str) -> str:
    """What continues the training run of this process: the same command, or the run by its name after a --resume."""
    target = os.environ.get("SFT_MAKE")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return os.environ.get("SFT_AGAIN", "the same command")  # set by training/launch.py
    if Path(sys.argv[0]).suffix != ".py" or "ipykernel" in sys.argv[0]:  # a notebook, or Python itself
        return f"the same call, or make resume RUN={_quoted(run)}"
    by_name = any(word.startswith(("--resume", "--run")) for word in sys.argv)
    if target:
        if target != "train-multi" and (by_name or not target.startswith("train")):
            return f"make resume RUN={_quoted(run)}"
        words = re.findall(r"(?:\\.|\S)+", os.environ.get("MAKEFLAGS", "").partition("-- ")[2])  # make escapes with \
        typed = [re.sub(r"\\(.)", r"\1", word).replace("$$", "$").partition("=") for word in words]
        variables = (f"{name}={_quoted(value)}" for name, _, value in reversed(typed) if name != "RESUME")
        return " ".join(["make", target, *variables])
    if by_name and not any(word.startswith(("--nproc", "--shard")) for word in sys.argv):
        return shlex.join([_python(), sys.argv[0], "--run", run])
    return re.sub(" --resume[= ]never", "", shlex.join([_python(), *sys.argv]))


def _quoted(value: str) -> str:
    if re.fullmatch(r"[\w.,:/=-]*", value):
        return value
    return shlex.quote(value) if set(value) & set('"$`\\') else f'"{value}"'


def _python() -> str:
    """How the user can call this Python: by its path if that lies below the working folder."""
    path = os.path.relpath(sys.executable)
    return "python" if path.startswith("..") else path


# --- printing


def out() -> Console:
    """A rich console on stdout, or on stderr under --json; colours only on a terminal."""
    from rich.console import Console

    return Console(file=sys.stderr if _json_mode else sys.stdout, highlight=False, soft_wrap=True)


def say(text: str, *, wrap: bool = False) -> None:
    """Prints one plain line; no markup is read in it. wrap: between words where a terminal is narrower."""
    stream = sys.stderr if _json_mode else sys.stdout
    if wrap and stream.isatty():
        columns, indent = shutil.get_terminal_size().columns, " " * 8
        text = textwrap.fill(text, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    print(redact(text), file=stream, flush=True)


def write(piece: str) -> None:
    """Prints a piece of streamed text, without a line end."""
    print(piece, end="", file=sys.stderr if _json_mode else sys.stdout, flush=True)


def emit(value: Any) -> None:
    """Prints one JSON value as a line on stdout, for commands whose --json is one line a row."""
    print(redact(json.dumps(value, ensure_ascii=False)), flush=True)


def confirmed(question: str, force: bool, fix: str) -> bool:
    """Whether the user agrees. Raises EnvironmentProblem without a terminal to ask on; force: without asking."""
    if force:
        return True
    if not sys.stdin.isatty():
        raise EnvironmentProblem(f"{question} Nobody can answer here", fix=fix)
    return input(f"{question} [y/N] ").strip().lower() == "y"


def warn(text: str) -> None:
    """Prints a warning on stderr."""
    _print_marked("warning", 33, redact(as_typed(text)))


def _print_marked(label: str, colour: int, text: str) -> None:
    coloured = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    mark = f"\033[{colour}m{label}:\033[0m" if coloured else f"{label}:"
    print(f"{mark} {text}", file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, text: bool = False) -> None:
    """Prints a table; the caller formats the numbers. text: the cells are texts, in columns of equal width."""
    from rich.table import Table
    from rich.text import Text

    result = Table(title=title, title_justify="left", title_style="bold", show_lines=text)
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if text or index == 0 else "right"
        result.add_column(column, justify=justify, overflow="fold", ratio=1 if text else None)
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
                if total and done >= 0.01 * total:
                    share += f", {duration((now - started) * (total - done) / done)} left"
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
    quiet_libraries()
    show_logs()
    try:
        if "set" in args:  # several settings in one text, as make passes them
            args.set = [item for text in args.set for item in re.split(r"\s+(?=[a-z_]+\.[\w.]+\s*=)", text.strip())]
            if args.run:
                use_run(args)
            args.config = args.config or default_config()
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
        if error.problems:
            entry["problems"] = [each.entry() for each in error.problems]
        emit(entry)
    if isinstance(error, Stopped):
        print(redact(error.what + (f" Continue with: {error.fix}" if error.fix else "")), file=sys.stderr)
        return error.exit_code
    for each in [error, *error.problems]:
        each.where, each.fix = (as_typed(text) if text else None for text in (each.where, each.fix))
    message = redact(str(error))
    _print_marked("error", 31, message)
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
    """Writes the error before the earlier ones in outputs/last_error.txt, for `make doctor`, if that can be written."""
    path = project_root() / "outputs" / "last_error.txt"
    if make_folder or path.parent.is_dir():
        with suppress(SftError, OSError):
            entry = redact(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {shlex.join(sys.argv)}\n{text}\n")
            earlier = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
            files.write_text(path, entry + "".join(f"{line}\n" for line in earlier[:ERROR_LINES]))
    return path


def quiet_libraries() -> None:
    """Switches off the libraries' advice lines, telemetry and welcome messages, and long waiting by spinning; sets what
    torch reads at its import about memory on a CPU (figures: docs/decisions/0018-faster-layers.md).
    """
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "BITSANDBYTES_NOWELCOME": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": KERNELS_STORED,
        "LRU_CACHE_CAPACITY": KERNELS_STORED,  # torch's own cache above oneDNN's
        "THP_MEM_ALLOC_ENABLE": "1",  # tensors from 2 MiB on in huge pages: half of the page faults
    }.items():
        os.environ.setdefault(name, value)
    if "OMP_WAIT_POLICY" not in os.environ:  # long spinning slows everything down beside other work, none costs speed
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


class _ConsoleHandler(logging.Handler):
    """Prints what the packages log: warnings marked as such, the rest as plain lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            (warn if record.levelno >= logging.WARNING else say)(as_typed(record.getMessage()))
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
