"""The files of a trainer, found by following its imports from the launched one. Nothing is run."""

from __future__ import annotations

import ast
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorapatch.errors import Refused
from lorapatch.lora.support.lookup import Lookup
from lorapatch.lora.support.source import SourceFile, Unit, last_name, parse_file, string_of
from lorapatch.lora.support.trainer_file import guess_roots, installed_package

__all__ = ["Project"]

MAX_FILES = 600
# Libraries that trainers use; none of them is a trainer.
_LIBRARIES = (
    "torch torchvision transformers peft deepspeed accelerate trl datasets numpy scipy pandas sklearn PIL cv2 tqdm"
    " wandb tokenizers safetensors bitsandbytes flash_attn xformers einops timm requests yaml rich click typer fire"
    " absl hydra"
    " omegaconf pydantic huggingface_hub sentencepiece evaluate tensorboard mlflow matplotlib psutil packaging"
)
# What these do is known by their names; in a checkout of theirs, an example's trainer is the project, they are not.
_KNOWN_BY_NAME = ("torch", "transformers", "peft", "deepspeed", "accelerate", "trl")
_IMPORT_ONE = ("import_module", "__import__")


class Project(Lookup):
    """Every file that the trainer's imports reach, breadth first; ``problems`` are sentences with file:line.

    ``complete`` is False where a module is imported by a computed name, a file could not be read, or the bound on
    the number of files was met: then what is not found may still be there.
    """

    def __init__(self, trainer: Path, roots: Sequence[Path] = (), *, installed: bool = False) -> None:
        """``installed``: packages that the trainer's own file imports count as the project's, if they are installed.

        Raises Refused if the trainer's file cannot be read.
        """
        given = [Path(root).absolute() for root in roots]
        super().__init__(list(dict.fromkeys([*given, *guess_roots(trainer.parent)])))
        self.problems: list[str] = []
        self.complete = True
        self.files: dict[Path, SourceFile] = {}
        self._seen: set[Path] = set()
        try:
            self.entry = self._load(trainer)
        except OSError as error:
            reason = error.strerror or str(error)
            raise Refused(
                f"{trainer}: the trainer cannot be read ({reason}): name its folder with --trainer-root"
            ) from error
        if installed and self.entry:
            self._add_packages(self.entry)
        self._follow()

    @property
    def units(self) -> Iterator[Unit]:
        for source in self.files.values():
            yield from source.units

    def file(self, path: Path) -> SourceFile | None:
        return self.files.get(path)

    def _find_module(self, folder: Path, level: int, parts: list[str]) -> Path | None:
        known = not level and parts and parts[0] in _KNOWN_BY_NAME
        return None if known else super()._find_module(folder, level, parts)

    def _add_packages(self, entry: SourceFile) -> None:
        """``from llava.train.train import train`` in a script that stands outside the llava that is installed."""
        names = {module.partition(".")[0] for level, module, _ in entry.imports.values() if level == 0}
        names |= {module.partition(".")[0] for level, module in entry.stars if level == 0}
        for name in sorted(names - sys.stdlib_module_names - set(_LIBRARIES.split())):
            folder = installed_package(name)
            if folder:
                self.packages[name] = folder

    def _load(self, path: Path) -> SourceFile | None:
        self._seen.add(path)
        parsed = parse_file(path)
        if isinstance(parsed, str):
            self.problems.append(parsed)
            self.complete = False
            return None
        self.files[path] = parsed
        return parsed

    def _follow(self) -> None:
        queue = deque(self.files.values())
        while queue:
            source = queue.popleft()
            for path in self._imported_files(source):
                if path in self._seen:
                    continue
                if len(self._seen) >= MAX_FILES:
                    self.problems.append(
                        f"{source.path}:1: more than {MAX_FILES} files are imported, the rest was not read"
                    )
                    self.complete = False
                    return
                try:
                    loaded = self._load(path)
                except OSError as error:
                    self.problems.append(f"{path}:1: cannot be read ({error.strerror or error})")
                    self.complete = False
                    continue
                if loaded:
                    queue.append(loaded)

    def _imported_files(self, source: SourceFile) -> Iterator[Path]:
        for node in source.import_nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield from self._module_chain(source, 0, alias.name)
                continue
            module = node.module or ""
            yield from self._module_chain(source, node.level, module)
            for alias in node.names:
                path = self.module_file(source, node.level, f"{module}.{alias.name}".lstrip("."))
                if path:
                    yield path
        for unit in source.units:
            for call in unit.calls:
                yield from self._imported_by_call(unit, call)

    def _module_chain(self, source: SourceFile, level: int, module: str) -> Iterator[Path]:
        """The module's file and those of the packages above it, which Python runs first."""
        parts = module.split(".") if module else []
        for end in range(1 if parts else 0, len(parts) + 1):
            path = self.module_file(source, level, ".".join(parts[:end]))
            if path:
                yield path

    def _imported_by_call(self, unit: Unit, call: ast.Call) -> Iterator[Path]:
        """``import_module("a.b")``, a project's own ``import_modules(…, "a.b")``, ``pkgutil.iter_modules``."""
        source, name = unit.source, last_name(call.func)
        if name in ("iter_modules", "walk_packages") and source.path.name == "__init__.py":
            yield from sorted(source.path.parent.glob("*.py"))
        if not _imports_modules(name):
            return
        texts = [text for text in map(string_of, call.args) if text]
        for text in texts:
            level = len(text) - len(text.lstrip("."))
            for path in self._module_chain(source, level, text.lstrip(".")):
                yield path
                if name not in _IMPORT_ONE and path.name == "__init__.py":
                    yield from sorted(path.parent.glob("*.py"))
        if name in _IMPORT_ONE and not texts and not _imports_modules(unit.name) and unit.name != "__getattr__":
            self.complete = False  # but inside such a function, its callers give the names


def _imports_modules(name: str) -> bool:
    return name in _IMPORT_ONE or ("import" in name and "module" in name)
