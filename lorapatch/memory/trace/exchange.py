"""A run and what its trace says, as JSON: the front and the traced process have nothing else in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorapatch.memory.model import Breakdown, LoraSetup, RunSetup, Tensor, Zero

__all__ = ["breakdown_from", "breakdown_to", "setup_from", "setup_to"]

_PATHS = ("model", "vision_tower", "vision_tower_aux")


def setup_to(setup: RunSetup) -> dict[str, Any]:
    """What :func:`setup_from` reads."""
    written = dataclasses.asdict(setup)
    for name in _PATHS:
        if written[name] is not None:
            written[name] = str(written[name])
    return written


def setup_from(written: Mapping[str, Any]) -> RunSetup:
    """The run that :func:`setup_to` wrote."""
    values = dict(written)
    for name in _PATHS:
        if values[name] is not None:
            values[name] = Path(values[name])
    for name, kind in (("lora", LoraSetup), ("zero", Zero)):
        if values[name] is not None:
            values[name] = kind(**values[name])
    values["lengths"] = tuple(values["lengths"])
    return RunSetup(**values)


def breakdown_to(breakdown: Breakdown) -> dict[str, Any]:
    """What :func:`breakdown_from` reads."""
    return dataclasses.asdict(breakdown)


def breakdown_from(written: Mapping[str, Any]) -> Breakdown:
    """The breakdown that :func:`breakdown_to` wrote."""
    values = dict(written)
    values["biggest"] = tuple(Tensor(n, tuple(shape), *rest) for n, shape, *rest in values["biggest"])
    for name in ("assumed", "not_modelled", "advice"):
        values[name] = tuple(values[name])
    return Breakdown(**values)
