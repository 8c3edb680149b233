"""What estimates keep for the next one, below the user's cache folder: traces, measurements of the card, history."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import lorapatch
from lorapatch.memory.model import Breakdown, RunSetup, Tensor

__all__ = ["as_dict", "breakdown_dict", "cache_folder", "load", "remembered", "store"]

_IN_PROCESS: dict[str, Breakdown] = {}


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/lorapatch``, ``~/.cache/lorapatch`` without it."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lorapatch"


def load(name: str) -> dict[str, Any]:
    """The JSON object kept as ``name``; empty where there is none, or it is damaged."""
    try:
        found = json.loads((cache_folder() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def store(name: str, data: Mapping[str, Any]) -> bool:
    """Keep a JSON object, whole or not at all; False where the folder cannot be written: a cache is no need."""
    path = cache_folder() / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(data, file, indent=1)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError:
        return False
    return True


def remembered(setup: RunSetup, versions: Mapping[str, str], make: Callable[[], Breakdown]) -> Breakdown:
    """``make()``, or what it gave for the same setup, model configuration and library versions before."""
    key = _key(setup, versions)
    if key in _IN_PROCESS:
        return _IN_PROCESS[key]
    name = f"traces/{key}.json"
    found = _breakdown(load(name))
    if found is None:
        found = make()
        store(name, breakdown_dict(found))
    _IN_PROCESS[key] = found
    return found


def _key(setup: RunSetup, versions: Mapping[str, str]) -> str:
    """Everything that the answer hangs on: the code of the estimate itself, too."""
    folders = (setup.model, setup.vision_tower, setup.vision_tower_aux)
    configurations = [_content(folder / name) for folder in folders if folder is not None for name in _CONFIGURATIONS]
    told = [as_dict(setup), sorted(versions.items()), configurations, lorapatch.__version__, _code()]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]


_CONFIGURATIONS = ("config.json", "open_clip_config.json")


def _content(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


@lru_cache(maxsize=1)
def _code() -> list[tuple[str, int]]:
    """The sources of what estimates, by size: a newer estimate does not answer from an older one's cache."""
    return [(str(p.relative_to(_HERE)), p.stat().st_size) for p in sorted(_HERE.rglob("*.py"))]


_HERE = Path(__file__).parent


def as_dict(setup: RunSetup) -> dict[str, Any]:
    """A setup for JSON."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(setup).items()}


def breakdown_dict(breakdown: Breakdown) -> dict[str, Any]:
    """A breakdown for JSON."""
    found = {f.name: getattr(breakdown, f.name) for f in fields(breakdown)}
    found["biggest"] = [tensor._asdict() for tensor in breakdown.biggest]
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items()}


def _breakdown(data: Mapping[str, Any]) -> Breakdown | None:
    try:
        tensors = tuple(Tensor(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in data["biggest"])
        lists = {name: tuple(data[name]) for name in ("assumed", "not_modelled", "advice")}
        return Breakdown(**{**data, "biggest": tensors, **lists})
    except (KeyError, TypeError):
        return None
