"""What a script launches, as data: launches with their trainer, flags, stage, and the bytes each stands at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lorapatch.shell.outline import Command, Outline, Span
from lorapatch.shell.values import Unresolved, Values

__all__ = ["Flag", "Launch", "Script", "Stage", "Text", "Trainer", "Word", "script_span"]


_ACTIVATION = re.compile(
    rb"\b(?:conda|mamba|micromamba)\s+activate|\bmodule\s+load|/activate\b|^\s*(?:source|\.)\s|\bPATH=", re.MULTILINE
)


class Word(NamedTuple):
    """A word of a launch as bash passes it (unless it expands to several).

    ``text`` is how it is written, quotes and ``$`` included; ``span`` its bytes in the script, which for a launch kept
    in a string lie inside that string; ``where`` is "command", "string" or "array".
    """

    text: str
    span: Span
    where: str = "command"
    value: str | None = None  # None: only a run can tell, ``reason`` says why
    reason: str = ""

    def __str__(self) -> str:
        return self.text if self.value is None else self.value


class Flag(NamedTuple):
    """``--name value…``, ``--name=value`` or ``--name`` alone. ``name`` has its dashes."""

    name: str
    word: Word  # the word that holds the name
    values: tuple[Word, ...]
    equals: bool  # written --name=value
    line: int

    @property
    def value(self) -> str | None:
        """The flag's values joined by a blank; None if one of them is unresolved; "" for a flag alone."""
        if any(word.value is None for word in self.values):
            return None
        return " ".join(word.value or "" for word in self.values)

    @property
    def text(self) -> str:
        """The values as they are written."""
        return " ".join(word.text for word in self.values)


class Trainer(NamedTuple):
    """The Python that a launch runs: ``name`` as written, ``module`` for ``-m name``, ``path`` when it is known."""

    name: str
    module: bool
    word: Word
    path: Path | None = None


class Stage(NamedTuple):
    """What a launch is for: "pretrain", "finetune", "evaluation", "inference", "preprocessing" or None, and why."""

    name: str | None
    training: bool
    reasons: tuple[str, ...]


def script_span(offsets: tuple[int, ...], span: Span) -> Span:
    """From the first to the last byte of ``span`` that stands in the script; (-1, -1) if none does."""
    inside = [offset for offset in offsets[span[0] : span[1]] if offset >= 0]
    return (inside[0], inside[-1] + 1) if inside else (-1, -1)


class Text(NamedTuple):
    """A text that bash reads commands from: the script, or a string or an array kept in it.

    ``offsets[i]`` is where byte i of the text stands in the script (-1: nowhere); None for the script itself.
    ``paths[i]`` are the references that lead to it, outermost first: for a variable used in a string, where it is used.
    """

    outline: Outline
    where: str = "command"
    offsets: tuple[int, ...] | None = None
    paths: tuple[tuple[Span, ...], ...] = ()

    def span(self, span: Span) -> Span:
        """The bytes of the script that ``span`` of this text stands for."""
        return span if self.offsets is None else script_span(self.offsets, span)

    def path(self, span: Span) -> tuple[Span, ...]:
        """The references that lead to the end of ``span``."""
        return self.paths[span[1] - 1] if self.paths else ()


@dataclass(frozen=True, slots=True)
class Launch:
    """One command that runs a Python program, through a launcher or by python itself."""

    number: int  # from 1, in the order of the script
    line: int  # of the command that runs it
    launcher: str  # deepspeed, torchrun, accelerate, torch.distributed.run, torch.distributed.launch, python
    prefix: tuple[Word, ...]  # wrappers before the launcher: srun, nohup, env …
    launcher_words: tuple[Word, ...]  # the launcher itself, e.g. `python $(which deepspeed)`
    launcher_options: tuple[Word, ...]
    trainer: Trainer
    arguments: tuple[Word, ...]  # all words behind the trainer
    flags: tuple[Flag, ...]
    environment: tuple[tuple[str, Word], ...]  # A=b before the command
    command: Command  # in ``text``; spans there are of that text
    text: Text
    use: Command  # the command of the script that runs it (another than ``command`` for eval "$CMD")
    start: int  # of ``use`` in the script
    end: int
    piped: bool  # into another command, `| tee log`
    redirects: tuple[str, ...]
    insert_at: int  # the script's byte behind the last argument; -1: no safe place, ``obstacle`` says why
    insert_where: str  # command, string or array
    obstacle: str = ""
    conditional_pieces: tuple[Span, ...] = ()  # `OPTS+=…` inside an if: may add flags
    stage: Stage = field(default=Stage(None, False, ()))
    attach: tuple[Word, ...] = ()  # `lorapatch.attach`, or `lorapatch.attach -m`, between the options and the trainer

    @property
    def words(self) -> tuple[Word, ...]:
        """All words in order: wrappers, launcher, its options, lorapatch.attach, trainer, arguments."""
        return (*self.prefix, *self.launcher_words, *self.launcher_options, *self.program, *self.arguments)

    @property
    def program(self) -> tuple[Word, ...]:
        """The words that name what the launcher runs: the trainer, behind lorapatch.attach if it goes through that."""
        return (*self.attach, self.trainer.word)

    @property
    def runs_module(self) -> bool:
        """Whether the launcher is told that ``program`` begins with a module's name, not a file's."""
        return not str(self.attach[0]).endswith(".py") if self.attach else self.trainer.module

    @property
    def attached(self) -> bool:
        """Whether it goes through lorapatch.attach, which brings LoRA to any trainer."""
        return bool(self.attach)

    @property
    def context(self) -> tuple[str, ...]:
        """The syntax it is wrapped in: "if", "for", "function" …, outermost first."""
        return tuple(kind for kind, _ in self.use.context)

    def flag(self, *names: str) -> Flag | None:
        """The last flag with one of these names (without dashes, ``-`` and ``_`` alike): the one that counts."""
        found = list(self.all_flags(*names))
        return found[-1] if found else None

    def all_flags(self, *names: str) -> Iterator[Flag]:
        """Every flag with one of these names, in order."""
        wanted = {name.lstrip("-").replace("-", "_") for name in names}
        for flag in self.flags:
            if flag.name.lstrip("-").replace("-", "_") in wanted:
                yield flag


@dataclass(frozen=True, slots=True)
class Script:
    """A script that was read: its bytes, its launches, its variables."""

    path: Path | None
    source: bytes
    outline: Outline
    values: Values
    launches: tuple[Launch, ...]
    notes: tuple[str, ...] = ()  # what could not be read, in words

    def line(self, offset: int) -> int:
        """The line number, from 1, of the byte at ``offset``."""
        return self.outline.line(offset)

    def value(self, text: str, at: int) -> str | None:
        """The value of a word written ``text`` at byte ``at``; None if only a run can tell."""
        try:
            return self.values.word(text, at)
        except Unresolved:
            return None

    def activates_environment(self, before: int) -> bool:
        """Whether something before the byte ``before`` may bring other programs than those found on PATH now."""
        return _ACTIVATION.search(self.source[:before]) is not None

    def as_dict(self) -> dict[str, Any]:
        """The whole of it for JSON (schema 1)."""
        from lorapatch.launch.describe import script_dict

        return script_dict(self)
