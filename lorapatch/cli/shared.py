"""What the commands share: how an error is told, how NAME=VALUE is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

__all__ = ["ROOT", "SCRIPT", "fail", "pairs"]

SCRIPT = click.Path(path_type=Path)
ROOT = click.Path(path_type=Path, exists=True, file_okay=False)


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
