"""What the commands share: how an error is told, how NAME=VALUE and sizes are read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

__all__ = ["ROOT", "SCRIPT", "Size", "fail", "pairs"]

SCRIPT = click.Path(path_type=Path)
ROOT = click.Path(path_type=Path, exists=True, file_okay=False)
UNITS = {
    "": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


class Size(click.ParamType[int]):
    """A size such as 24GiB, in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value))
        units = {unit.lower(): factor for unit, factor in UNITS.items()}
        if match is None or match[2].lower() not in units:
            self.fail(f"{value!r} is not a size such as 24GiB", param, ctx)
        return int(float(match[1]) * units[match[2].lower()])


def fail(sentence: str) -> None:
    """Tell an error on standard error."""
    click.echo(f"lorapatch: {sentence}", err=True)


def pairs(items: Iterable[str], option: str) -> list[tuple[str, str]]:
    """The names and values of NAME=VALUE items. Raises click.UsageError."""
    found = []
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise click.UsageError(f"{option} wants NAME=VALUE, not {item!r}")
        found.append((name, value))
    return found
