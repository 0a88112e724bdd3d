"""The commands as functions, for a notebook or a program; the whole way is five lines (docs/notebook.ipynb):

    from sft import load_config, prepare, train, evaluate, generate
    config = load_config("configs/demo_cpu.yaml", {"train.epochs": 2})
    prepare(config, "my_rows.csv")
    train(config)
    evaluate(config)
    print(generate(config, ["Where is my order?"]))

Each runs its command's own code in this process, so files, results and errors (SftError, with a fix) are the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sft import console, runs
from sft.config.load import load, resolve_path
from sft.config.schema import Config
from sft.errors import RunError, nearest

if TYPE_CHECKING:
    from sft.generation.engine import LoadedModel

SCRIPTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Settings:
    """A config file and the values that are set over it. config: both together, e.g. `settings.config.train.epochs`."""

    file: Path
    sets: tuple[str, ...]
    config: Config


def load_config(file: str | Path | None = None, values: Mapping[str, Any] | None = None) -> Settings:
    """The settings of a config file; without one, those that the commands use by default. Raises ConfigError.

    file: counts from the working folder, else from the project. values: by dotted key, e.g. {"train.epochs": 2}.
    """
    root = console.project_root()
    path = Path(file or console.default_config())
    path = path if path.exists() else resolve_path(root, path, inside=False)
    sets = tuple(f"{key}={json.dumps(value)}" for key, value in (values or {}).items())
    return Settings(path, sets, load(path, sets, root=root).config)


def prepare(settings: Settings, raw: str | Path | None = None) -> dict[str, Any]:
    """`make process`: raw rows (a file, folder, URL or hub data set) to rows to train on. Returns the ledger."""
    return run_command("process_data", settings, **({"raw_path": str(raw)} if raw else {}))


def train(settings: Settings, resume: str = "auto") -> dict[str, Any]:
    """`make train`: an adapter or a model. Returns the summary: run, losses, tokens a second, peak memory, ..."""
    return run_command("train", settings, resume=resume)


def evaluate(settings: Settings, split: str = "val", *, run: str | None = None, **flags: Any) -> dict[str, Any]:
    """`make eval`: scores a run, by default the newest finished one of these settings. flags: limit, base, both, ..."""
    return run_command("eval", settings, run=_finished(settings, run), split=split, **flags)


def generate(settings: Settings, questions: Sequence[Any], *, run: str | None = None, base: bool = False) -> list[str]:
    """Answers of a run, as evaluate chooses it, or of its base; see `Model.answer`. Loads the model at each call."""
    return open_model(settings, run=run, base=base).answer(questions)


def open_model(settings: Settings, *, run: str | None = None, base: bool = False) -> Model:
    """A run's model (or its base), loaded to be used several times."""
    from sft.generation import load as models

    root = console.project_root()
    args = _arguments("infer", _command("infer"), settings, {"run": _finished(settings, run), "base": base})
    target = models.resolve_model(
        Path(args.config), args.set, adapters=args.adapters, merged=args.merged, base=base, root=root
    )
    system = models.system_text(target.config, target.folder, root)
    adapter, merged = (None, None) if base else (target.adapter, target.merged)
    return Model(models.open_model(target.config, adapter=adapter, merged=merged, root=root), target.config, system)


@dataclass(frozen=True)
class Model:
    """A loaded model with the settings and the system text that it was trained with."""

    loaded: LoadedModel
    config: Config
    system: str | None

    def answer(self, questions: Sequence[Any]) -> list[str]:
        """An answer to each question: a text, or a conversation as a list of {"role", "content"}."""
        from sft.generation.load import answer_all

        rows = []
        for question in questions:
            turns = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
            own = any(turn["role"] == "system" for turn in turns)
            first = [{"role": "system", "content": self.system}] if self.system and not own else []
            rows.append({"messages": [*first, *turns]})
        return [answer.text if answer else "" for answer in answer_all(self.loaded, rows, self.config)]


def run_command(name: str, settings: Settings, **flags: Any) -> dict[str, Any]:
    """`python scripts/NAME.py` in this process, with its flags by name; returns what its --json prints.

    Raises SftError, TypeError for a flag that the command does not have.
    """
    command = _command(name)
    result = command.main(_arguments(name, command, settings, flags))
    return dict(result or {})


def _command(name: str) -> Any:
    """The module of a command. Raises TypeError if there is none."""
    spec = importlib.util.spec_from_file_location(f"sft_commands.{name}", SCRIPTS / f"{name}.py")
    if spec is None or spec.loader is None or not (SCRIPTS / f"{name}.py").exists():
        close = nearest(name, [path.stem for path in SCRIPTS.glob("*.py")])
        raise TypeError(f"there is no command {name}" + (f": did you mean {close}?" if close else ""))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _arguments(name: str, command: Any, settings: Settings, flags: Mapping[str, Any]) -> argparse.Namespace:
    """The command's arguments, as its parser reads them from a command line. Raises TypeError."""

    def refuse(message: str) -> NoReturn:
        raise TypeError(f"{name}: {message}")

    parser: argparse.ArgumentParser = (getattr(command, "build_parser", None) or command.parser)()
    parser.error = refuse  # type: ignore[method-assign]
    usage = re.findall(r"--[\w-]+", parser.format_usage())
    line = [word for one in settings.sets for word in ("--set", one)]
    for flag, value in flags.items():
        option = next((one for one in usage if one.replace("-", "_") == f"__{flag}".replace("-", "_")), f"--{flag}")
        words = value if isinstance(value, list | tuple) else [value]
        line += [] if value in (None, False) else [option, *(str(word) for word in words if word is not True)]
    args = parser.parse_args(line)
    console.quiet_libraries()
    console.show_logs()
    if args.run:
        console.use_run(args)
    args.config = args.config or str(settings.file)
    return args


def _finished(settings: Settings, run: str | None) -> str:
    """The run that is named, else the newest finished one of the settings' `train.output_dir`. Raises RunError."""
    if run:
        return run
    root, name = console.project_root(), Path(settings.config.train.output_dir).name
    for one in runs.newest_first(root):
        if one.finished and re.fullmatch(re.escape(name) + r"(-\d+)?", one.name):
            return one.name
    raise RunError(f"no run called {name} has finished yet", where="train.output_dir", fix="train(config)")
