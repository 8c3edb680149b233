"""Which file a launch starts, from the words of its command; and the folders that imports may start from."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

__all__ = ["find_trainer", "guess_roots", "installed_package"]

MAX_CLIMB = 6
_ROOT_MARKERS = (".git", "pyproject.toml", "setup.py", "setup.cfg")


def find_trainer(name: str, *, module: bool, script_dir: Path, roots: Sequence[Path] = ()) -> Path | None:
    """The file of ``name``, a path or with ``module`` a dotted name (``-m``), None if it is not found.

    Looked for under ``roots``, then in the script's folder and those above it, since scripts are often started from
    their project's root. Last, the end of the path is tried under ``roots``: a script that stands elsewhere than its
    toolkit, or a variable that only a run can tell, does not hide a trainer whose folder was given. Behind such a
    variable (``$PWD/llava/train/train_mem.py``) the whole rest of the path is looked for in the other folders too,
    unless it is a file's name alone.
    """
    given = [Path(root).absolute() for root in roots]
    folders = list(dict.fromkeys([*given, *guess_roots(Path(script_dir).absolute())]))
    if module:
        return _module_file(name, folders)
    if name and "$" not in name and "`" not in name:
        candidates = [Path(name)] if Path(name).is_absolute() else [folder / name for folder in folders]
        found = next((path for path in candidates if path.is_file()), None)
        if found:
            return found
    return _by_its_end(name, given) or _behind_variables(name, folders)


def _by_its_end(name: str, roots: Sequence[Path]) -> Path | None:
    """``mgm/train/train_mem.py`` of ``$TOP/training/mgm/train/train_mem.py``, under the folders that were given."""
    parts = _known_parts(name)
    for start in range(len(parts)):
        for root in roots:
            path = root.joinpath(*parts[start:])
            if path.suffix == ".py" and path.is_file():
                return path
    return None


def _behind_variables(name: str, folders: Sequence[Path]) -> Path | None:
    parts = _known_parts(name)
    if len(parts) < 2 or not ("$" in name or "`" in name):
        return None
    return next((path for folder in folders if (path := folder.joinpath(*parts)).is_file()), None)


def _known_parts(name: str) -> list[str]:
    """The parts of a path behind the last one that only a run can tell."""
    parts = [part for part in name.split("/") if part]
    return parts[max((i + 1 for i, part in enumerate(parts) if "$" in part or "`" in part), default=0) :]


def _module_file(name: str, folders: Sequence[Path]) -> Path | None:
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    package = installed_package(parts[0])
    for folder in [*folders, *([package.parent] if package else [])]:
        target = folder.joinpath(*parts)
        for candidate in (target.with_name(f"{target.name}.py"), target / "__main__.py"):
            if candidate.is_file():
                return candidate
    return None


def guess_roots(folder: Path) -> list[Path]:
    """Where ``import`` may start from: the folder, those above it up to the project's own, and their ``src``."""
    roots: list[Path] = []
    for candidate in [folder, *folder.parents][: MAX_CLIMB + 1]:
        if candidate == candidate.parent:
            break
        roots.append(candidate)
        if (candidate / "src").is_dir():
            roots.append(candidate / "src")
        if any((candidate / marker).exists() for marker in _ROOT_MARKERS):
            break
    return roots


@lru_cache(maxsize=32)
def installed_package(name: str) -> Path | None:
    """The folder of an installed top-level package, found without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return next((Path(p) for p in spec.submodule_search_locations if Path(p, "__init__.py").is_file()), None)
