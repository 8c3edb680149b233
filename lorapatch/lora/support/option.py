"""One command-line option that a trainer declares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorapatch.lora.support.source import Place

__all__ = ["Kind", "Option"]

# bool: takes True or False (HfArgumentParser also takes it bare). switch: stands alone. list: several words behind the
# flag. repeat: the flag again for each value. literal: a Python literal.
Kind = Literal["bool", "switch", "off-switch", "int", "float", "str", "list", "repeat", "literal"]


@dataclass(frozen=True)
class Option:
    """``spellings`` as the command line has them (``--lora_r``, ``--lora-r``); ``dest`` is the attribute it becomes.

    ``declared_in`` is the dataclass, ``argparse``, ``click``, ``typer`` or ``fire``. ``library`` is the dotted name of
    the library class that declares it, else None: what a library does with its own option is not looked into.
    ``default`` is its source text, None if there is none.
    """

    spellings: tuple[str, ...]
    dest: str
    kind: Kind
    place: Place
    declared_in: str
    default: str | None = None
    choices: tuple[str, ...] = ()
    library: str | None = None

    @property
    def name(self) -> str:
        return self.spellings[0]
