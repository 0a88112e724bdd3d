"""The rules that keep the code readable: who imports whom, how large the core is, who prints, how fast help answers."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
PACKAGES = ROOT / "scripts" / "sft"
EVERYONE = {"errors", "files"}
MAY_IMPORT = {  # package -> packages it may import besides itself and EVERYONE; transitive ones are written out
    "errors": set(),
    "files": set(),
    "console": {"config", "runs"},
    "api": {"console", "config", "runs", "generation"},
    "config": set(),
    "metrics": set(),
    "runs": {"config"},
    "data": {"config"},
    "chat": {"data", "config"},
    "model": {"config"},
    "step": {"model", "config"},
    "generation": {"chat", "data", "model", "step", "metrics", "config", "runs"},
    "training": {"chat", "data", "model", "step", "generation", "metrics", "config", "runs"},
    "memory": {"step", "model", "config"},
    "ship": {"generation", "chat", "data", "model", "step", "config", "runs"},
    "report": {"generation", "chat", "data", "model", "step", "metrics", "config", "runs"},
    "server": {"config", "runs"},
    "preflight": {"report", "memory", "generation", "chat", "data", "model", "metrics", "config", "runs"},
}
CORE_COMMANDS = ("train", "eval", "infer")
AROUND_THE_CORE = {"api", "memory", "ship", "report", "preflight", "server"}
LIGHT = {"config", "data", "metrics", "errors", "files", "console", "runs", "server"}
HEAVY = {"torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes"}
OPTIONAL = {"bitsandbytes", "unsloth", "liger_kernel"}
CORE = {"config", "data", "chat", "model", "step", "training", "generation", "metrics"}
PRIVATE_NAMES = {  # underscore names of other libraries that the core reads (none is written), and why
    "_attn_implementation": "transformers: the attention that a model runs, of which the config has no public name",
    "_base": "torch: the tensor that a view belongs to",
    "_no_split_modules": "transformers: the classes of the layers, which FSDP shards one by one",
    "_replace": "collections.namedtuple: public, named so to avoid fields' names",
    "_supports_attention_backend": "transformers: whether a family takes its attention from the registry",
    "_supports_sdpa": "transformers: whether a family has SDPA attention",
    "_tokenizer": "transformers: the tokenizers.Tokenizer of a fast tokenizer",
    "_version": "torch: how often a tensor was changed in place",
}
# Upper limits, with the GGUF import (550 lines of core) and rehearsal (310). The aim: 8,000 in the core, 17,000 in all.
MOST = {"core files": 63, "core lines": 16_085, "files": 144, "lines": 31_425, "small modules with one importer": 10}


def imports(path: Path, *, top_only: bool = False) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import; those under TYPE_CHECKING only where functions are included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    type_checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if top_only else ast.walk(tree):
        if id(node) in type_checking and top_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGES).parts[0].removesuffix(".py")


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of everything under scripts/ that has a line in it."""
    paths = [path for path in sorted((ROOT / "scripts").rglob("*.py")) if path.read_text(encoding="utf-8").strip()]
    return {
        ".".join(path.relative_to(ROOT / "scripts").with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }


@cache
def imported_modules(name: str) -> frozenset[str]:
    return frozenset(module_targets(modules()[name]) - {name})


def module_targets(path: Path, *, top_only: bool = False) -> set[str]:
    """The modules of scripts/ that a file imports; `from package import module` is the module, not the package."""
    names = [name for name, _ in imports(path, top_only=top_only)]
    targets = {name for name in names if name in modules()}
    return {name for name in targets if not any(other.startswith(f"{name}.") for other in targets)}


def line_count(names: set[str] | dict[str, Path]) -> int:
    return sum(modules()[name].read_text(encoding="utf-8").count("\n") for name in names)


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


def package_files() -> list[Path]:
    return [path for name, path in modules().items() if name.startswith("sft.")]


def test_every_package_imports_only_what_it_may() -> None:
    wrong = {
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in package_files()
        for name, line in imports(path)
        if name.startswith("sft.")
        and name.split(".")[1] not in MAY_IMPORT[package_of(path)] | EVERYONE | {package_of(path)}
    }
    assert not wrong, "\n".join(sorted(wrong))


def core(command: str) -> set[str]:
    """What a command imports, directly or not; what the script itself takes from around the core is not followed."""
    seen, todo = set[str](), [command]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [target for target in imported_modules(name) if name != command or not around_the_core(target)]
    return seen


def around_the_core(name: str) -> bool:
    return name.startswith("sft.") and name.split(".")[1] in AROUND_THE_CORE


@pytest.mark.parametrize("command", CORE_COMMANDS)
def test_the_core_is_small_and_imports_nothing_around_it(command: str) -> None:
    names = core(command)
    assert not {name for name in names if around_the_core(name)}
    assert len(names) <= MOST["core files"] and line_count(names) <= MOST["core lines"], (len(names), line_count(names))


def test_scripts_stay_within_their_size() -> None:
    assert len(modules()) <= MOST["files"] and line_count(modules()) <= MOST["lines"], (
        len(modules()),
        line_count(modules()),
    )


def test_small_modules_with_one_importer_are_rare() -> None:
    importers = {name: sum(name in imported_modules(other) for other in modules()) for name in modules()}
    small = [name for name in modules() if name.startswith("sft.") and importers[name] == 1 and line_count({name}) < 60]
    assert len(small) <= MOST["small modules with one importer"], small


def test_no_import_cycles() -> None:
    """Of imports at the top of files: those in functions are there to keep `--help` fast."""
    top = {name: module_targets(path, top_only=True) - {name} for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in top[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


def test_light_packages_never_import_torch_or_transformers() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in package_files()
        if package_of(path) in LIGHT
        for name, line in imports(path)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_optional_libraries_appear_in_the_model_package_alone() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in [*package_files(), *SCRIPTS]
        if path in SCRIPTS or package_of(path) != "model"
        for name, line in imports(path)
        if name.split(".")[0] in OPTIONAL
    ]
    assert not wrong, "\n".join(wrong)


def core_files() -> list[Path]:
    return [path for path in package_files() if package_of(path) in CORE]


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


def test_scripts_never_import_scripts() -> None:
    names = {path.stem for path in SCRIPTS} - {"lm_eval"}  # whose library has the same name
    wrong = [f"{path.name}:{line}" for path in SCRIPTS for name, line in imports(path) if name.split(".")[0] in names]
    assert not wrong, wrong


def test_only_the_console_prints() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [*package_files(), *SCRIPTS]
        if path != PACKAGES / "console.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert not wrong, wrong


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
    assert f"scripts/{script.name}" in done.stdout and "--json" in done.stdout


def test_the_architecture_page_names_functions_that_exist() -> None:
    """docs/ARCHITECTURE.md follows a row and a step as lists of `file.py: function`."""
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    entries = re.findall(r"^\d+\. `([\w/]+\.py)`: `([\w.]+)`", page, re.MULTILINE)
    assert len(entries) >= 15
    for file, function in entries:
        path = ROOT / "scripts" / file
        assert path.is_file(), file
        defined = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                defined.add(node.name)
            elif isinstance(node, ast.ClassDef):
                methods = (inner.name for inner in node.body if isinstance(inner, ast.FunctionDef))
                defined |= {node.name, *(f"{node.name}.{method}" for method in methods)}
        assert function in defined, f"{file} has no {function}"
