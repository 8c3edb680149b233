"""One Python file of a trainer, parsed: its imports, definitions, and the pieces of code that run separately."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

__all__ = ["Definition", "Place", "SourceFile", "Unit", "dotted_name", "last_name", "parse_file", "string_of"]

MAX_FILE_BYTES = 4 * 2**20
# A file can be read long before it can be run: these are the ways in which Python's own parser gives up.
_PARSER_GIVES_UP = (SyntaxError, ValueError, RecursionError, MemoryError)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@dataclass(frozen=True, order=True)
class Place:
    """A line of a file; ``str()`` of it is ``file:line``."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(eq=False)
class Unit:
    """Code that runs together: a file's top level, its ``__main__`` block, or a function with what is nested in it."""

    source: SourceFile
    name: str
    nodes: list[ast.AST] = field(default_factory=list)
    function: Function | None = None
    owner: str | None = None

    def place(self, node: ast.AST) -> Place:
        return Place(self.source.path, getattr(node, "lineno", 1))

    @cached_property
    def calls(self) -> list[ast.Call]:
        return [node for node in self.nodes if isinstance(node, ast.Call)]

    @cached_property
    def name_loads(self) -> set[str]:
        return {n.id for n in self.nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}

    @cached_property
    def attribute_loads(self) -> set[str]:
        return {n.attr for n in self.nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}

    @cached_property
    def strings(self) -> set[str]:
        return {n.value for n in self.nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}

    @cached_property
    def assignments(self) -> dict[str, list[ast.expr]]:
        """Every value given to a plain name in this unit, in order."""
        found: dict[str, list[ast.expr]] = {}
        for node in self.nodes:
            if isinstance(node, ast.Assign):
                pairs = [(target, node.value) for target in node.targets]
            elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                pairs = [(node.target, node.value)]
            else:
                continue
            for target, value in pairs:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(value)
        return found

    @property
    def parameters(self) -> list[ast.arg]:
        if self.function is None:
            return []
        arguments = self.function.args
        return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]

    @cached_property
    def defaults(self) -> dict[str, ast.expr]:
        """The default of each parameter that has one."""
        if self.function is None:
            return {}
        arguments = self.function.args
        positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        with_default = positional[len(positional) - len(arguments.defaults) :]
        found = dict(zip(with_default, arguments.defaults, strict=True))
        found.update(
            {a.arg: d for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None}
        )
        return found


@dataclass(eq=False)
class SourceFile:
    """A parsed file. ``imports`` maps a local name to (level, module, attribute or None for the module itself)."""

    path: Path
    tree: ast.Module
    imports: dict[str, tuple[int, str, str | None]] = field(default_factory=dict)
    stars: list[tuple[int, str]] = field(default_factory=list)
    definitions: dict[str, Definition] = field(default_factory=dict)
    top: Unit = field(init=False)
    main: Unit = field(init=False)
    functions: dict[int, Unit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.top = Unit(self, "<module>")
        self.main = Unit(self, "__main__")
        for statement in self.tree.body:
            self._split(statement, self.main if _is_main_block(statement) else self.top, None)
        for node in self.import_nodes:
            if isinstance(node, ast.Import):
                self._note_import(node)
            else:
                self._note_import_from(node)

    @property
    def units(self) -> Iterator[Unit]:
        yield self.top
        yield self.main
        yield from self.functions.values()

    @cached_property
    def parents(self) -> dict[int, ast.AST]:
        """The node around each node, by ``id()``."""
        return {id(child): node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    @cached_property
    def import_nodes(self) -> list[ast.Import | ast.ImportFrom]:
        return [n for unit in self.units for n in unit.nodes if isinstance(n, (ast.Import, ast.ImportFrom))]

    def methods(self, owner: str) -> list[Unit]:
        return [unit for unit in self.functions.values() if unit.owner == owner]

    def _split(self, node: ast.AST, unit: Unit, owner: str | None) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self._split_function(node, unit, owner)
            return
        unit.nodes.append(node)
        if isinstance(node, ast.ClassDef):
            self.definitions.setdefault(node.name, node)
            owner = node.name
        for child in ast.iter_child_nodes(node):
            self._split(child, unit, owner)

    def _split_function(self, node: Function, unit: Unit, owner: str | None) -> None:
        """Decorators and defaults run where the function stands, its body only when it is called."""
        if owner is None:
            self.definitions[node.name] = node
        inner = Unit(self, node.name, function=node, owner=owner)
        self.functions[id(node)] = inner
        for statement in node.body:
            inner.nodes.extend(ast.walk(statement))
        outside: list[ast.expr | None] = [*node.decorator_list, *node.args.defaults, *node.args.kw_defaults]
        for expression in outside:
            if expression is not None:
                unit.nodes.extend(ast.walk(expression))

    def _note_import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.asname:
                self.imports[alias.asname] = (0, alias.name, None)
            else:
                top = alias.name.partition(".")[0]
                self.imports.setdefault(top, (0, top, None))

    def _note_import_from(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        for alias in node.names:
            if alias.name == "*":
                self.stars.append((node.level, module))
            else:
                self.imports.setdefault(alias.asname or alias.name, (node.level, module, alias.name))


def parse_file(path: Path) -> SourceFile | str:
    """The file parsed, or one sentence (``file:line: what is wrong``) if Python cannot read it.

    Raises OSError when the file itself cannot be read.
    """
    status = path.stat()
    if status.st_size > MAX_FILE_BYTES:
        return f"{path}:1: not read, it is larger than {MAX_FILE_BYTES // 2**20} MiB"
    return _parse(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)
def _parse(path: Path, _mtime_ns: int, _size: int) -> SourceFile | str:
    content = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are the trainer's business
            return SourceFile(path, ast.parse(content, filename=str(path)))
    except _PARSER_GIVES_UP as error:
        line = getattr(error, "lineno", None) or 1
        reason = getattr(error, "msg", None) or str(error) or type(error).__name__
        return f"{path}:{line}: Python cannot read this file ({reason})"


def _is_main_block(node: ast.stmt) -> bool:
    if not (isinstance(node, ast.If) and isinstance(node.test, ast.Compare)):
        return False
    return "__name__" in {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}


def dotted_name(node: ast.AST) -> str | None:
    """``a.b.c`` of a chain of attributes on a name; None for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return ".".join([node.id, *reversed(parts)])


def last_name(node: ast.AST) -> str:
    """``c`` of ``a.b.c`` and of ``f(x).c``, the name itself of a plain name, "" for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def string_of(node: ast.AST | None) -> str | None:
    """The value of a string literal, None for anything else."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
