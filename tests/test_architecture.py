"""The house rules that keep the kit readable: who may import whom, who may print, how soon help answers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
ROOMS = ROOT / "scripts" / "sft"
ANYONE = {"errors", "files"}
MAY_IMPORT = {  # room -> rooms it may import, besides itself and ANYONE; transitive ones are written out
    "errors": set(),
    "files": set(),
    "console": set(),
    "config": set(),
    "data": {"config"},
    "chat": {"data", "config"},
    "model": {"config"},
    "step": {"model", "config"},
    "memory": {"step", "model", "config"},
    "metrics": set(),
    "runs": {"config"},
    "generation": {"chat", "data", "model", "step", "config", "runs", "metrics"},
    "training": {
        "config", "data", "chat", "model", "step", "generation", "metrics", "runs",
    },
    "ship": {"chat", "data", "model", "generation", "runs", "config", "step"},
    "report": {"metrics", "runs", "config", "data", "chat", "model", "generation"},
    "preflight": {"config", "data", "chat", "model", "memory", "report", "runs"},
}  # fmt: skip
LIGHT = {"config", "data", "metrics", "errors", "files", "console", "runs"}
HEAVY = {"torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets"}
OPTIONAL = {"bitsandbytes", "unsloth", "liger_kernel"}


def imports(path: Path, *, top_only: bool = False) -> Iterator[tuple[str, int]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if top_only else ast.walk(tree):
        if id(node) in guarded and top_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "sft":
                yield from ((f"sft.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def room_of(path: Path) -> str:
    return path.relative_to(ROOMS).parts[0].removesuffix(".py")


def room_files() -> list[Path]:
    return [path for path in sorted(ROOMS.rglob("*.py")) if path != ROOMS / "__init__.py"]


def test_every_room_imports_only_what_it_may() -> None:
    wrong = []
    for path in room_files():
        room = room_of(path)
        allowed = MAY_IMPORT[room] | ANYONE | {room}
        for name, line in imports(path):
            if name.startswith("sft.") and name.split(".")[1] not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_light_rooms_never_import_torch_or_transformers() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in room_files()
        if room_of(path) in LIGHT
        for name, line in imports(path)
        if name.split(".")[0] in HEAVY - {"datasets"}
    ]
    assert not wrong, "\n".join(wrong)


def test_optional_libraries_appear_in_the_model_room_alone() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in [*room_files(), *SCRIPTS]
        if path in SCRIPTS or room_of(path) != "model"
        for name, line in imports(path)
        if name.split(".")[0] in OPTIONAL
    ]
    assert not wrong, "\n".join(wrong)


def test_scripts_never_import_scripts() -> None:
    names = {path.stem for path in SCRIPTS}
    wrong = [f"{path.name}:{line}" for path in SCRIPTS for name, line in imports(path) if name.split(".")[0] in names]
    assert not wrong, wrong


def test_only_the_console_prints() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [*room_files(), *SCRIPTS]
        if path != ROOMS / "console.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert not wrong, wrong


CORE = {"config", "data", "chat", "model", "step", "training", "generation", "metrics"}
PRIVATE_NAMES = {  # underscore names of other libraries that the core reads (none is written), and why
    "_attn_implementation": "transformers: the attention that a model runs, of which the config has no public name",
    "_base": "torch: the tensor that a view belongs to",
    "_replace": "collections.namedtuple: public, named so to avoid fields' names",
    "_supports_attention_backend": "transformers: whether a family takes its attention from the registry",
    "_supports_sdpa": "transformers: whether a family has SDPA attention",
    "_tokenizer": "transformers: the tokenizers.Tokenizer of a fast tokenizer",
    "_version": "torch: how often a tensor was changed in place",
}


def private_attributes(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(name, line, written) of underscore attributes of objects other than `self`, defined nowhere in the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("self", "cls")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") not in ("self", "cls"):
            name, written = node.attr, not isinstance(node.ctx, ast.Load)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            name = getattr(node.args[1], "value", "")
            written = getattr(node.func, "id", "") == "setattr"
        else:
            continue
        if isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name not in own:
            yield name, node.lineno, written


def core_files() -> list[Path]:
    return [path for path in room_files() if room_of(path) in CORE]


def test_the_core_uses_no_private_name_of_a_library_but_the_listed_ones() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {'writes' if written else 'reads'} {name}"
        for path in core_files()
        for name, line, written in private_attributes(path)
        if written or name not in PRIVATE_NAMES
    ]
    assert not wrong, "\n".join(wrong)


def test_the_core_subclasses_no_trainer_and_no_callback() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(base)}"
        for path in core_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if ast.unparse(base).endswith(("Trainer", "TrainerCallback"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_shows_examples_before_anything_heavy_is_imported(script: Path) -> None:
    assert not [name for name, _ in imports(script, top_only=True) if name.split(".")[0] in HEAVY]
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']; sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: print('code', stop.code, 'heavy', sorted({'torch', 'transformers', 'pydantic',"
        " 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("code 0 heavy []"), done.stdout[-300:] + done.stderr
    assert "examples:" in done.stdout and "--json" in done.stdout
