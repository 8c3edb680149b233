"""Find the launches of a script: which commands run a Python program, with which launcher, trainer and flags."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lorapatch.launch.embed import Embedded, Embedder, as_text, parse_words, plain, variable_in
from lorapatch.launch.model import Flag, Launch, Script, Text, Trainer, Word
from lorapatch.launch.options import ALONE, is_attach, launcher_of
from lorapatch.launch.stage import decide_stage
from lorapatch.shell.outline import Command, Span, outline
from lorapatch.shell.values import Unresolved, Values

__all__ = ["read_source"]

# Programs that run the program named behind them; their own options are skipped up to a launcher's name.
_WRAPPERS = frozenset(
    "exec nohup time command builtin env sudo srun mpirun mpiexec timeout nice ionice numactl taskset stdbuf unbuffer"
    " setsid script conda mamba micromamba poetry uv pipenv singularity apptainer docker podman enroot xvfb-run nsys"
    " ncu py-spy coproc ssh pdsh chronic systemd-run torchx ! xargs tsp".split()
)
_SHELLS = {"bash", "sh", "zsh", "dash"}
_RUNNERS = {"eval", *_SHELLS, *_WRAPPERS}
_WHICH = re.compile(r"""["']?(?:\$\(|`)\s*(?:which|command\s+-v|type\s+-P)\s+["']?([\w.-]+)["']?\s*(?:\)|`)["']?""")
_NAMED = re.compile(r'"?\$\{?(\w+)\}?"?')
_REST = re.compile(r'"?\$(?:[@*]|\{[@*](?::\d+)?\})"?')
_PLAIN = re.compile(rb"[\w./,:=+@%-]+")  # as it is written, so it is passed
_FLAG = re.compile(r"-{1,2}[A-Za-z]")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_LAUNCHER = re.compile(rb"\b(?:deepspeed|torchrun|accelerate\s+launch|python3?\s+\S+\.py|torch\.distributed)\b")
_PIPE = re.compile(rb"(?:[ \t]|\\\n)*\|&?(?!\|)")
_DEEPEST = 3  # bash -c "eval '…'"


def read_source(source: bytes, path: Path | None = None, environment: Mapping[str, str] | None = None) -> Script:
    """Read a script's text. ``path`` (absolute) is what ``$0`` stands for; nothing is executed.

    ``environment`` holds values that the script will find in its environment.
    """
    whole = outline(source)
    finder = _Finder(Values(whole, path, dict(environment or {})))
    launches = finder.find()
    return Script(path, source, whole, finder.values, tuple(launches), tuple(finder.notes))


class _Item(NamedTuple):
    """A word, the number of the command's word that it came from, and the references that lead to it."""

    word: Word
    top: int
    path: tuple[Span, ...]

    @property
    def name(self) -> str:
        return str(self.word)


class _Site(NamedTuple):
    """A command in the text that it stands in, and the command of the script that runs it."""

    command: Command
    text: Text
    use: Command


class _Finder:
    def __init__(self, values: Values) -> None:
        self.values = values
        self.embedder = Embedder(values)
        self.notes: list[str] = []
        self.launches: list[Launch] = []
        self._skipped: list[Span] = []

    def find(self) -> list[Launch]:
        whole = self.values.outline
        for command in whole.commands:
            self._visit(_Site(command, Text(whole), command), 0)
        return self.launches

    def _visit(self, site: _Site, depth: int) -> None:
        if _runs_nothing(site):
            return None
        self._skipped = []
        items = self._flatten(site)
        index = 0
        while index < len(items):
            name = items[index].name
            program = name.rsplit("/", 1)[-1]
            if program == "eval" and depth < _DEEPEST:
                return self._visit_string(site, items[index + 1 :], depth, quoted=None)
            if program in _SHELLS and depth < _DEEPEST:
                following = self._dash_c(items, index)
                return (
                    self._visit_string(site, items[following : following + 1], depth, quoted=True)
                    if following
                    else None
                )
            if self._launcher(items[index].word):
                return self._add(site, items, index)
            if index == 0 and program not in _WRAPPERS and not self._is_wrapped(items[0]):
                return None
            index += 1
        return self._note_conditional(site, items[:1])

    def _is_wrapped(self, item: _Item) -> bool:
        """A first word such as ``$LAUNCH_PREFIX`` may stand for a wrapper."""
        return item.word.value is None and variable_in(item.word.text.encode("utf-8", "surrogateescape")) is not None

    def _dash_c(self, items: Sequence[_Item], index: int) -> int | None:
        for position in range(index + 1, len(items)):
            name = items[position].name
            if not name.startswith("-"):
                return None
            if name.startswith("-") and not name.startswith("--") and "c" in name:
                return position + 1 if position + 1 < len(items) else None
        return None

    def _visit_string(self, site: _Site, items: Sequence[_Item], depth: int, quoted: bool | None) -> None:
        """Read the words as commands once more, as ``eval`` and ``bash -c`` do."""
        if site.text.offsets is not None and any(item.word.where != site.text.where for item in items):
            return
        text = plain(b"", (), "string")
        source = site.text.outline.source
        seen: set[int] = set()
        try:
            for item in items:
                if item.top in seen:
                    continue
                seen.add(item.top)
                span = site.command.words[item.top]
                written = source[span[0] : span[1]]
                if site.text.offsets is None:
                    piece = self._word_text(span, written, site.use)
                else:
                    piece = _inner_text(site.text, span)
                text = text + piece + plain(b" ", (-1,), "string")
        except Unresolved:
            return self._note_conditional(site, items)
        inner = as_text(text)
        for command in inner.outline.commands:
            self._visit(_Site(command, inner, site.use), depth + 1)
        return None

    def _word_text(self, span: Span, written: bytes, use: Command) -> Embedded:
        variable = variable_in(written)
        if variable is not None and variable[2]:
            return self.embedder.array_text(variable[0], use.start, use.context).behind(span)
        if variable is not None:
            text = self.embedder.variable_text(variable[0], use.start, use.context).behind(span)
            return text if variable[1] else replace(text, text=text.text.replace(b"\n", b" "))
        return self.embedder.string_text(span, use.start, use.context)

    def _note_conditional(self, site: _Site, items: Sequence[_Item]) -> None:
        """Say so if a variable that is run here holds a launch only in some cases."""
        for item in items:
            variable = variable_in(item.word.text.encode("utf-8", "surrogateescape"))
            if variable is None or site.text.offsets is not None:
                continue
            for assignment in self.values.outline.assignments:
                text = self.values.outline.source[slice(*assignment.value)]
                if assignment.name == variable[0] and _LAUNCHER.search(text):
                    line = self.values.outline.line(assignment.start)
                    self.notes.append(
                        f"line {line}: the launch in ${variable[0]} is put together in a way that cannot be followed;"
                        " set it in one place, outside of if, for and functions"
                    )

    # -- one command ------------------------------------------------------------------------------------------------

    def _flatten(self, site: _Site) -> list[_Item]:
        """The words of the command, with variables and arrays that hold several words put in their place."""
        items: list[_Item] = []
        command, text = site.command, site.text
        source = text.outline.source
        for top, span in enumerate(command.words):
            raw = source[span[0] : span[1]]
            if text.offsets is None and _PLAIN.fullmatch(raw):  # most words are
                plain_word = raw.decode("ascii")
                items.append(_Item(Word(plain_word, span, text.where, plain_word), top, ()))
                continue
            own = text.span(span)
            variable = variable_in(raw)
            inner = self._expansion(variable, site, top) if variable is not None else None
            if inner is None:
                items.append(_Item(self._word(raw, own, text.where, site.use), top, text.path(span)))
                continue
            self._skipped += inner.skipped
            for inside in parse_words(inner.text) or ():
                written = inner.text[slice(*inside)]
                word = self._word(written, inner.span(inside), inner.where, site.use)
                if word.value is None and (nested := variable_in(written)) is not None:
                    self._skip_conditional(nested[0])
                items.append(_Item(word, top, (*text.path(span), own, *inner.paths[inside[1] - 1])))
        return items

    def _expansion(self, variable: tuple[str, bool, bool], site: _Site, top: int) -> Embedded | None:
        name, quoted, array = variable
        at, context = site.use.start, site.use.context
        try:
            if array:
                found = self.embedder.array_text(name, at, context)
            elif quoted:
                return None
            else:
                found = self.embedder.variable_text(name, at, context)
                if b"\n" in found.text:
                    found = replace(found, text=found.text.replace(b"\n", b" "))
        except Unresolved:
            self._skip_conditional(name)
            return None
        several = array or len(found.text.split()) > 1 or found.text.startswith(b"-")
        return found if several and parse_words(found.text) is not None else None

    def _skip_conditional(self, name: str) -> None:
        for assignment in self.values.outline.assignments:
            if assignment.name == name:
                self._skipped.append((assignment.start, assignment.end))

    def _word(self, raw: bytes, span: Span, where: str, use: Command) -> Word:
        text = raw.decode("utf-8", "surrogateescape")
        try:
            return Word(text, span, where, self.values.word(text, use.start, use.context))
        except Unresolved as reason:
            return Word(text, span, where, None, str(reason))

    def _launcher(self, word: Word) -> str | None:
        which = _WHICH.fullmatch(word.text)
        if which:
            return launcher_of(which[1])
        if word.value is not None:
            return launcher_of(word.value)
        named = _NAMED.fullmatch(word.text)
        if named is None:
            return launcher_of(word.text.strip("\"'"))
        name = named[1].lower()
        return next((known for known in ("deepspeed", "torchrun", "accelerate", "python") if known in name), None)

    def _add(self, site: _Site, items: list[_Item], first: int) -> None:
        found = self._find_trainer(items, first)
        if found is None:
            return
        launcher, options_from, program, module = found
        position, module = _behind_attach(items, program, module)
        trainer = items[position].word
        arguments = tuple(item.word for item in items[position + 1 :])
        command, text = site.command, site.text
        insert_at, where, obstacle = self._insertion(items, position, text)
        environment = [
            self._word(text.outline.source[slice(*span)], text.span(span), text.where, site.use)
            for span in command.assignments
        ]
        environment += [item.word for item in items[:first] if _ASSIGNMENT.match(item.word.text)]
        launch = Launch(
            number=len(self.launches) + 1,
            line=self.values.outline.line(site.use.start),
            launcher=launcher,
            prefix=tuple(item.word for item in items[:first]),
            launcher_words=tuple(item.word for item in items[first:options_from]),
            launcher_options=tuple(item.word for item in items[options_from:program]),
            attach=tuple(item.word for item in items[program:position]),
            trainer=Trainer(str(trainer), module, trainer, _trainer_path(trainer, module)),
            arguments=arguments,
            flags=tuple(self._flags(arguments)),
            environment=tuple(_split_assignment(word) for word in environment),
            command=command,
            text=text,
            use=site.use,
            start=site.use.start,
            end=site.use.end,
            piped=bool(_PIPE.match(text.outline.source, command.end)),
            redirects=tuple(_decode(text.outline.source[slice(*span)]) for span in command.redirects),
            insert_at=insert_at,
            insert_where=where,
            obstacle=obstacle,
            conditional_pieces=tuple(self._skipped),
        )
        self.launches.append(replace(launch, stage=decide_stage(launch, self.values.outline)))

    def _find_trainer(self, items: Sequence[_Item], first: int) -> tuple[str, int, int, bool] | None:
        """(launcher, index of its first option, index of the trainer, whether it is a module)."""
        launcher = self._launcher(items[first].word)
        assert launcher is not None
        index = options_from = first + 1
        if launcher == "accelerate" and not items[first].name.endswith("accelerate-launch"):
            if index >= len(items) or items[index].name != "launch":
                return None
            index = options_from = first + 2
        module = False
        while index < len(items):
            name = items[index].name
            if _REST.fullmatch(items[index].word.text):
                line = self.values.outline.line(items[index].word.span[0])
                self.notes.append(
                    f"line {line}: the trainer of this {launcher} launch comes from {items[index].word.text}"
                )
                return None
            if name in ("-c", "-"):
                return None
            if not name.startswith("-"):
                nested = self._nested_launcher(items[index].word, launcher, module)
                if nested is None:
                    return self._checked(launcher, options_from, index, module, items)
                launcher, module, options_from = nested, False, index + 1
            elif name in ("-m", "--module"):
                module = True
            elif "=" not in name and name.lstrip("-") not in ALONE[launcher]:
                following = items[index + 1].name if index + 1 < len(items) else ""
                index += 0 if following.startswith("-") or following.endswith(".py") else 1
            index += 1
        return None

    def _nested_launcher(self, word: Word, launcher: str, module: bool) -> str | None:
        """``python $(which deepspeed)``, ``python -m torch.distributed.run``: the launcher that python runs."""
        if launcher != "python":
            return None
        if not module:
            inner = self._launcher(word)
            return inner if inner != "python" else None
        modules = {
            "torch.distributed.run": "torch.distributed.run",
            "torch.distributed.launch": "torch.distributed.launch",
            "torch.distributed.launcher": "torch.distributed.launch",
            "deepspeed": "deepspeed",
            "deepspeed.launcher.runner": "deepspeed",
            "accelerate.commands.launch": "accelerate",
        }
        return modules.get(str(word))

    def _checked(
        self, launcher: str, options_from: int, index: int, module: bool, items: Sequence[_Item]
    ) -> tuple[str, int, int, bool] | None:
        """A python command is a launch only with a ``.py``, a module, or a variable that may be one."""
        word = items[index].word
        if launcher == "python" and not module:
            name = str(word).strip("\"'")
            if not (name.endswith(".py") or (word.value is None and _NAMED.fullmatch(word.text))):
                return None
        return launcher, options_from, index, module

    def _insertion(self, items: Sequence[_Item], trainer: int, text: Text) -> tuple[int, str, str]:
        """Where new flags go: behind the last argument, before a trailing ``"$@"``."""
        last = len(items) - 1
        while last > trainer and _REST.fullmatch(items[last].word.text):
            last -= 1
        item, home = items[last], items[trainer]
        shared = 0
        for one, other in zip(item.path, home.path):
            shared += one == other
        if len(item.path) == shared:
            span, where = item.word.span, item.word.where
        else:  # the last argument comes from a variable that the trainer does not stand in
            span, where = item.path[shared], text.where if shared == len(home.path) == 0 else "string"
        if len(home.path) > shared:  # the trainer stands in a variable, and more words follow it
            where = text.where if not shared else where
        if span[1] < 0:
            return -1, where, "the last argument is put together from several places"
        return span[1], where, ""

    def _flags(self, arguments: Sequence[Word]) -> list[Flag]:
        flags: list[Flag] = []
        index = 0
        line = self.values.outline.line
        begins = [_FLAG.match(word.text.lstrip("\"'")) is not None for word in arguments]
        while index < len(arguments):
            word = arguments[index]
            index += 1
            if not begins[index - 1]:
                continue
            written = word.text.lstrip("\"'")
            name, equals, _ = written.partition("=")
            if equals:
                cut = word.text.index("=") + 1
                value = _behind(word, cut)
                flags.append(Flag(name.strip("\"'"), word, (value,), True, line(word.span[0])))
                continue
            values: list[Word] = []
            while index < len(arguments) and not begins[index]:
                if not _REST.fullmatch(arguments[index].text):
                    values.append(arguments[index])
                index += 1
            flags.append(Flag(name.strip("\"'"), word, tuple(values), False, line(word.span[0])))
        return flags


def _runs_nothing(site: _Site) -> bool:
    """Whether the program is named outright and neither launches anything nor runs other programs, like most commands."""
    words = site.command.words
    first = site.text.outline.source[words[0][0] : words[0][1]] if words else b""
    if not _PLAIN.fullmatch(first):
        return False
    name = first.decode("ascii")
    return launcher_of(name) is None and name.rsplit("/", 1)[-1] not in _RUNNERS


def _behind_attach(items: Sequence[_Item], program: int, module: bool) -> tuple[int, bool]:
    """Where the trainer stands that lorapatch.attach runs, and whether it is a module; any other program is the trainer."""
    if not is_attach(items[program].name, module):
        return program, module
    behind = program + 1
    named = behind < len(items) and items[behind].name == "-m"
    behind += named
    return (behind, named) if behind < len(items) else (program, module)


def _inner_text(text: Text, span: Span) -> Embedded:
    """A quoted word inside a string: what it holds, less its quotes."""
    assert text.offsets is not None
    written = text.outline.source[slice(*span)]
    cut = 1 if len(written) > 1 and written[:1] in (b'"', b"'") and written[-1:] == written[:1] else 0
    start, end = span[0] + cut, span[1] - cut
    return Embedded(written[cut : len(written) - cut], text.offsets[start:end], text.paths[start:end], "string")


def _behind(word: Word, cut: int) -> Word:
    """The part of a ``--name=value`` word behind its ``=``."""
    value = None if word.value is None else word.value.partition("=")[2]
    before = len(word.text[:cut].encode("utf-8", "surrogateescape"))
    return word._replace(text=word.text[cut:], span=(word.span[0] + before, word.span[1]), value=value)


def _split_assignment(word: Word) -> tuple[str, Word]:
    return word.text.partition("=")[0], _behind(word, word.text.index("=") + 1)


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _trainer_path(word: Word, module: bool) -> Path | None:
    return None if module or word.value is None else Path(word.value)
