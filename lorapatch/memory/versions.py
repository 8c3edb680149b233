"""Which versions of the training libraries an interpreter has, asked without loading one of them."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

__all__ = ["LIBRARIES", "versions_of"]

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")


@lru_cache(maxsize=32)
def versions_of(python: str | None) -> Mapping[str, str]:
    """Library to version for ``python`` (None: the one that runs lorapatch); empty when it cannot be asked."""
    if python is None or Path(python).absolute() == Path(sys.executable).absolute():
        found = {}
        for name in LIBRARIES:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found
    from lorapatch.run.versions import library_versions

    return {name: version for name, version in library_versions(python).items() if name in LIBRARIES}
