"""Edits of a text: replace the bytes from start to end by others, leave every other byte alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Edit", "apply_edits"]


class Edit(NamedTuple):
    """Replace ``source[start:end]`` by ``text``; an insertion has ``start == end``."""

    start: int
    end: int
    text: bytes


def apply_edits(source: bytes, edits: Iterable[Edit]) -> bytes:
    """``source`` with all edits made. Raises ValueError if two overlap or one lies outside."""
    out: list[bytes] = []
    done = 0
    for edit in sorted(edits):
        if edit.start < done or not edit.start <= edit.end <= len(source):
            raise ValueError(f"edit {edit.start}:{edit.end} overlaps another or lies outside the text")
        out += [source[done : edit.start], edit.text]
        done = edit.end
    out.append(source[done:])
    return b"".join(out)
