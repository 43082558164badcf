"""The rules of the house, read from the sources: who may import whom, and how long things are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnx_attnround

PACKAGE = Path(onnx_attnround.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A folder, or a module beside the folders, imports only from those of a lower level.
_NAMES = (
    "errors numerics version",
    "settings",
    "goals targets presets",
    "records config",
    "ops graph samples",
    "qdq runtime run_file",
    "simplify plan calibrate rounding shadow check",
    "checkpoint smooth verify",
    "context",
    "reconstruct report",
    "pipeline",
    "sweep",
    "__init__",
    "cli",
    "__main__",
)
LEVELS = {name: level for level, names in enumerate(_NAMES) for name in names.split()}
TORCH = {"runtime.device", "pipeline.from_torch", "rounding", "shadow", "smooth", "reconstruct"}
MAX_FILE, MAX_FUNCTION = 500, 60


def module_of(path: Path) -> str:
    """The folder that a file lies in, or its own name beside the folders."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def has_torch(name: str) -> bool:
    """Whether the module, by its full name, may import torch."""
    return any(f"{name}.".startswith(f"onnx_attnround.{known}.") for known in TORCH)


def full_name(path: Path) -> str:
    """The name that a file is imported by."""
    return ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts))


def imports(path: Path, *, whole: bool) -> Iterator[str]:
    """What a file imports, by full name; with ``whole`` that in functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if whole else at_import(tree.body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The statements that run when the module is imported."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            for block in ("body", "orelse", "handlers", "finalbody"):
                yield from at_import(getattr(node, block, []))


def parts_of_package(path: Path, *, whole: bool) -> set[str]:
    return {
        name.split(".")[1]
        for name in imports(path, whole=whole)
        if name.startswith("onnx_attnround.")
    }


def test_the_map_of_the_docs_is_that_of_the_code() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE)
    shown = [name for name in LEVELS if not name.startswith("__")]
    assert [name for _, name in rows] == shown
    numbers = {level: number for number, level in enumerate(sorted({LEVELS[n] for n in shown}))}
    assert [int(level) for level, _ in rows] == [numbers[LEVELS[name]] for name in shown]
    for named in re.findall(r"`(?:onnx_attnround/)?((?:[a-z_]+/)+[a-z_]*(?:\.py)?)`", text):
        places = PACKAGE / named, PACKAGE.parent / named
        assert any(place.exists() for place in places), f"docs/architecture.md names {named}"


def test_every_module_has_a_level() -> None:
    assert {module_of(path) for path in FILES} - set(LEVELS) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_lower_levels(path: Path) -> None:
    own = module_of(path)
    for used in parts_of_package(path, whole=False) - {own}:
        assert LEVELS[used] < LEVELS[own], f"{own} imports {used}"


def test_imports_inside_functions_keep_to_the_levels_too() -> None:
    for path in FILES:
        own = module_of(path)
        for used in parts_of_package(path, whole=True) - {own}:
            assert LEVELS[used] < LEVELS[own], f"{own} imports {used}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_some_modules_import_torch(path: Path) -> None:
    if not has_torch(full_name(path)):
        for name in imports(path, whole=False):
            assert name.split(".")[0] != "torch" and not has_torch(name), f"imports {name}"


def test_functions_import_torch_in_the_op_table_alone() -> None:
    lazily = {
        full_name(path)
        for path in FILES
        if any(name.split(".")[0] == "torch" for name in imports(path, whole=True))
    }
    assert {name for name in lazily if not has_torch(name)} <= {"onnx_attnround.ops"}


def code_lines(node: ast.FunctionDef) -> int:
    """The lines of a function behind its docstring."""
    first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
    return (node.body[-1].end_lineno or 0) - first.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert code_lines(node) <= MAX_FUNCTION, f"{node.name} has {code_lines(node)} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_assert_no_bare_except_no_print(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno}: assert"
        bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not bare, f"{path.name}: except without a type"
        called = node.func if isinstance(node, ast.Call) else None
        assert not (isinstance(called, ast.Name) and called.id == "print"), f"{path.name}: print"
