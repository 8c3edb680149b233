"""Imports only go down the floors of the house, and what stands alone stands alone."""

from __future__ import annotations

import ast
from pathlib import Path

import lorapatch

PACKAGE = Path(lorapatch.__file__).parent
FLOORS = {
    "errors": 0,
    "resources": 0,
    "shell": 1,
    "launch": 2,
    "lora": 3,
    "adapter": 3,
    "run": 4,
    "memory": 5,
    "tune": 6,
    "report": 6,
    "cli": 7,
    "__init__": 8,
}
ALONE = {"trainer": set(), "demo": {"errors", "resources", "trainer"}, "attach": set()}
HEAVY = {"torch", "transformers", "peft", "deepspeed", "accelerate", "bashlex", "tree_sitter", "tree_sitter_bash"}
# Runs in a process of its own, under the interpreter whose libraries are traced; its front does not.
TRACED = PACKAGE / "memory/trace"
TRACE_FRONT = {TRACED / "__init__.py", TRACED / "__main__.py", TRACED / "exchange.py"}


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """The modules that a file imports; only those loaded with it for ``top_level``."""
    tree = ast.parse(path.read_text())
    nodes = list(tree.body) if top_level else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name"
            names = [f"{node.module}.{name.name}" for name in node.names] if node.module == "lorapatch" else []
            found.update(names or [node.module or ""])
    return found


def own_parts(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("lorapatch.")}


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def test_imports_only_go_down() -> None:
    for path in PACKAGE.rglob("*.py"):
        part = part_of(path)
        for used in own_parts(imports(path)) - {part} - {"__version__"}:
            if part in ALONE:
                assert used in ALONE[part], f"{path} stands alone but imports lorapatch.{used}"
            elif used in FLOORS:
                assert FLOORS[used] < FLOORS[part], f"{path} imports lorapatch.{used}, which is not below it"


def test_no_file_of_the_patching_half_loads_a_heavy_library_with_itself() -> None:
    for part in (
        "errors.py",
        "resources.py",
        "shell",
        "launch",
        "lora",
        "adapter",
        "memory",
        "run",
        "cli",
        "__init__.py",
    ):
        top = PACKAGE / part
        for path in [top] if top.is_file() else top.rglob("*.py"):
            if TRACED in path.parents and path not in TRACE_FRONT:
                continue
            roots = {name.split(".")[0] for name in imports(path, top_level=True)}
            assert not roots & HEAVY, f"{path} imports {roots & HEAVY} at its top"


def test_only_the_command_line_prints_or_exits() -> None:
    for part in ("shell", "launch", "lora", "memory", "adapter"):
        for path in (PACKAGE / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in ("print", "exit"), f"{path}:{node.lineno}"


def test_the_shell_floor_never_speaks_of_lora() -> None:
    for path in (PACKAGE / "shell").rglob("*.py"):
        text = path.read_text().replace("lorapatch", "")
        assert "lora" not in text.lower(), path
