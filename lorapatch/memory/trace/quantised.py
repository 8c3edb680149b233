"""Linear layers of 8 or 4 bits as bitsandbytes stores and runs them."""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

from lorapatch.memory.model import RunSetup

__all__ = ["replace"]


def replace(model: Any, setup: RunSetup, *, skip: tuple[str, ...]) -> None:
    """Swap ``model``'s linear layers for quantised ones, but for modules whose path contains a name in ``skip``."""
    if setup.bits == 16:
        return
    raise NotImplementedError
