"""A launch with flags changed, as data: what its trainer would be told, without writing a script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lorapatch.errors import Refused
from lorapatch.launch.model import Flag, Launch, Word
from lorapatch.lora.dialect import flags_for
from lorapatch.lora.flags import PatchOptions, wanted_flags
from lorapatch.lora.lint.facts import LaunchFacts

__all__ = ["patched_facts", "with_flags"]

_NOWHERE = (-1, -1)


def with_flags(launch: Launch, flags: Mapping[str, object]) -> Launch:
    """``launch`` with ``flags`` (name, with or without dashes, to value) in place of its own; None takes a flag out."""
    names = {name.lstrip("-").replace("-", "_") for name in flags}
    kept = [flag for flag in launch.flags if flag.name.lstrip("-").replace("-", "_") not in names]
    added = tuple(
        Flag(
            f"--{name.lstrip('-')}", Word(f"--{name.lstrip('-')}", _NOWHERE, value=f"--{name.lstrip('-')}"),
            tuple(Word(word, _NOWHERE, value=word) for word in str(value).split(" ")), False, launch.line,
        )
        for name, value in flags.items()
        if value is not None
    )  # fmt: skip
    return replace(launch, flags=(*kept, *added))


def patched_facts(
    launch: Launch,
    options: PatchOptions,
    *,
    folder: Path,
    roots: Sequence[Path],
    own_flags: bool,
) -> tuple[LaunchFacts, list[str]]:
    """The launch as `patch` would write it, and notes.

    ``own_flags``: the trainer is known to have the usual flags, so its source need not be read; else it is, for the names
    of its flags. A trainer that takes none is looked at as if LoRA was attached to it.
    """
    before = LaunchFacts(launch, folder, roots)
    notes: list[str] = []
    flags: Mapping[str, object]
    try:
        said, notes = flags_for(None if own_flags else before.support, options)
        flags = {name: " ".join(words) or "True" for name, words in said.items()}
    except Refused as refusal:
        notes = [f"{refusal}; predicted as if lorapatch put it there"]
        flags = wanted_flags(options)
    return LaunchFacts(with_flags(launch, flags), folder, roots), notes
