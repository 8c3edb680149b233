"""What a name means: looked up through definitions, imports, re-exports and star imports, across files."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorapatch.lora.support.source import Definition, SourceFile, parse_file
from lorapatch.lora.support.trainer_file import installed_package

__all__ = ["External", "Found", "Lookup", "Target", "Value", "library_class"]


@dataclass(frozen=True)
class Found:
    """A class or function, and the file it is in."""

    source: SourceFile
    node: Definition


@dataclass(frozen=True)
class External:
    """Something a library defines, by its full dotted name."""

    name: str


@dataclass(frozen=True)
class Value:
    """What a file's top level assigns to a name, the last time it does."""

    source: SourceFile
    node: ast.expr


Target = Found | External | Value | SourceFile | None


class Lookup:
    """Names over a set of files; a subclass says how ``file`` gets one."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = list(roots)
        self.packages: dict[str, Path] = {}  # installed ones that count as the project's own, with their folder
        self._module_files: dict[tuple[Path, int, str], Path | None] = {}
        self._resolved: dict[tuple[int, str], Target] = {}

    def file(self, path: Path) -> SourceFile | None:
        raise NotImplementedError

    def module_file(self, source: SourceFile, level: int, module: str) -> Path | None:
        """The file of a module as ``source`` would import it, None if it is not under the roots."""
        folder = source.path.parents[min(level, len(source.path.parents)) - 1] if level else Path()
        key = (folder, level, module)
        if key not in self._module_files:
            self._module_files[key] = self._find_module(folder, level, module.split(".") if module else [])
        return self._module_files[key]

    def _find_module(self, folder: Path, level: int, parts: list[str]) -> Path | None:
        if level:
            return _file_under(folder, parts)
        if not parts or parts[0] in sys.stdlib_module_names:
            return None
        for root in self.roots:
            path = _file_under(root, parts)
            if path:
                return path
            if (root / parts[0] / "__init__.py").is_file():
                return None  # the package is here: Python would not look further
        return _file_under(self.packages[parts[0]].parent, parts) if parts[0] in self.packages else None

    def resolve(self, source: SourceFile, name: str) -> Target:
        """What a dotted name means in a file: a definition, a module, or a library's name.

        To be asked when all files are there: answers are kept.
        """
        key = (id(source), name)
        if key not in self._resolved:
            self._resolved[key] = self._resolve(source, name)
        return self._resolved[key]

    def _resolve(self, source: SourceFile, name: str) -> Target:
        head, _, rest = name.partition(".")
        target = self._lookup(source, head, set())
        for part in rest.split(".") if rest else []:
            if isinstance(target, External):
                target = External(f"{target.name}.{part}")
            elif isinstance(target, SourceFile):
                target = self.member(target, part)
            else:
                return None
        return target

    def member(self, module: SourceFile, name: str) -> Target:
        """``module.name``: what the module defines or imports, or its submodule."""
        return self._lookup(module, name, set()) or self._submodule(module, name)

    def _lookup(self, source: SourceFile, name: str, seen: set[tuple[Path, str]]) -> Target:
        if (source.path, name) in seen:
            return None
        seen.add((source.path, name))
        if name in source.definitions:
            return Found(source, source.definitions[name])
        if name in source.imports:
            return self._imported(source, *source.imports[name], seen)
        if name in source.top.assignments:
            return Value(source, source.top.assignments[name][-1])
        guess: External | None = None
        for level, module in source.stars:
            path = self.module_file(source, level, module)
            if path is None:
                guess = guess or (External(f"{module}.{name}") if level == 0 else None)
            elif (star := self.file(path)) and (found := self._lookup(star, name, seen)):
                return found
        return guess

    def _imported(
        self, source: SourceFile, level: int, module: str, attribute: str | None, seen: set[tuple[Path, str]]
    ) -> Target:
        path = self.module_file(source, level, module)
        if path is None:
            inner = self.module_file(source, level, f"{module}.{attribute}".lstrip(".")) if attribute else None
            if inner:
                return self.file(inner)
            return None if level else External(f"{module}.{attribute}" if attribute else module)
        target = self.file(path)
        if target is None or attribute is None:
            return target
        return self._lookup(target, attribute, seen) or self._submodule(target, attribute)

    def _submodule(self, package: SourceFile, name: str) -> SourceFile | None:
        if package.path.name != "__init__.py":
            return None
        path = _file_under(package.path.parent, [name])
        return self.file(path) if path else None


class _Library(Lookup):
    """An installed package: files are parsed one by one, as a name leads to them."""

    def __init__(self, folder: Path) -> None:
        super().__init__([folder.parent])
        self._folder = folder

    def module_file(self, source: SourceFile, level: int, module: str) -> Path | None:
        path = super().module_file(source, level, module)
        return path if path and self._folder in path.parents else None

    def file(self, path: Path) -> SourceFile | None:
        try:
            parsed = parse_file(path)
        except OSError:
            return None
        return parsed if isinstance(parsed, SourceFile) else None


def library_class(name: str) -> tuple[Lookup, Found] | None:
    """A class of an installed library by its dotted name, read from the library's files."""
    top, _, rest = name.partition(".")
    folder = installed_package(top)
    if folder is None or not rest:
        return None
    library = _Library(folder)
    target: Target = library.file(folder / "__init__.py")
    for part in rest.split("."):
        if not isinstance(target, SourceFile):
            return None
        target = library.member(target, part)
    return (library, target) if isinstance(target, Found) else None


def _file_under(base: Path, parts: Sequence[str]) -> Path | None:
    target = base.joinpath(*parts)
    candidates = [target / "__init__.py"]
    if parts:
        candidates.append(target.with_name(f"{target.name}.py"))
    return next((path for path in candidates if path.is_file()), None)
