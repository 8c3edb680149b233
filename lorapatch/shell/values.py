"""What words are worth when bash runs them, as far as the text alone says: nothing is executed, nothing is guessed."""

from __future__ import annotations

import ast
import fnmatch
import operator
import os.path
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorapatch.shell.outline import Assignment, Context, Outline

__all__ = ["Unresolved", "Values"]


class Unresolved(Exception):
    """A value that only a run can tell; the message names the variable or command it hangs on."""


_ORDINARY = re.compile(r"[^\\'\"$`*?\[]+")
_NAME = re.compile(r"[A-Za-z_]\w*|[0-9@*#?$!-]")
_BRACED = re.compile(r"([A-Za-z_]\w*|[0-9@*])(?:\[(?:0|@|\*)\])?(?:(:?[-=+?])(.*)|(##?|%%?)(.*))?", re.DOTALL)
_DEFAULT = re.compile(rb"\$\{([A-Za-z_]\w*):?=([^}]*)\}")
_QUIETLY = r"(?:>\s*/dev/null\s*(?:2>&1)?\s*)?"
_CD_PWD = re.compile(rf"\s*cd\s+(?:--\s+)?(.+?)\s*{_QUIETLY}(?:&&|;)\s*pwd(?:\s+-[PL])?\s*", re.DOTALL)
_PWD = re.compile(r"\s*pwd(?:\s+-[PL])?\s*")
_PATH_COMMAND = re.compile(r"\s*(dirname|basename|realpath|readlink\s+-f)\s+(?:--\s+)?(.+?)\s*", re.DOTALL)
_OPERATIONS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    # bash truncates towards zero
    ast.Div: lambda a, b: int(a / b),
    ast.Mod: lambda a, b: a - b * int(a / b),
}
_READERS = {b"read", b"mapfile", b"readarray", b"getopts"}
_MOVERS = {b"cd", b"pushd", b"popd"}
_NO_LEAK = {"subshell", "substitution"}
_LOOPS = {"for", "while"}
_DEPTH = 40  # variables that refer to variables
_LONGEST = 1 << 20


@dataclass
class Values:
    """Values of words and variables of a script.

    ``environment`` holds what the user says the environment will hold; the real environment is not looked at.
    """

    outline: Outline
    path: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._assignments: dict[str, list[Assignment]] = {}
        self._set_in_loop: dict[str, dict[tuple[str, int], Assignment]] = {}  # the last in each loop
        for assignment in self.outline.assignments:
            self._assignments.setdefault(assignment.name, []).append(assignment)
            for part in assignment.context:
                if part[0] in _LOOPS:
                    self._set_in_loop.setdefault(assignment.name, {})[part] = assignment
        self._stays = True  # in the folder that it is started in
        self._unknown = {name for name, _ in self.outline.loop_variables}
        for command in self.outline.commands:
            program = self.outline.source[slice(*command.words[0])] if command.words else b""
            if program in _READERS:
                self._unknown.update(self.outline.source[slice(*span)].decode("latin-1") for span in command.words[1:])
            elif program in _MOVERS:
                self._stays &= bool(_NO_LEAK & {kind for kind, _ in command.context})
        self._defaults = {m[1].decode(): m for m in _DEFAULT.finditer(self.outline.source)}
        self._busy: set[str] = set()
        self._depth = 0
        self._known: dict[tuple[str, tuple[int, ...]], str] = {}

    def word(self, text: str, at: int, context: Context = ()) -> str:
        """The value of the word written ``text`` that stands at byte ``at``, inside ``context``.

        Raises Unresolved.
        """
        if _ORDINARY.fullmatch(text):
            return text
        out: list[str] = []
        i, quoted = 0, False
        while i < len(text):
            run = _ORDINARY.match(text, i)
            if run is not None:
                out.append(run[0])
                i = run.end()
                continue
            char = text[i]
            if char == "\\" and i + 1 < len(text):
                following = text[i + 1]
                if following != "\n":
                    out.append(following if not quoted or following in '$`"\\' else char + following)
                i += 2
            elif char == "'" and not quoted:
                end = text.find("'", i + 1)
                end = len(text) if end < 0 else end
                out.append(text[i + 1 : end])
                i = end + 1
            elif char == '"':
                quoted = not quoted
                i += 1
            elif char == "$" and i + 1 < len(text):
                value, i = self._dollar(text, i, at, context, quoted)
                out.append(value)
            elif char == "`":
                end = text.find("`", i + 1)
                end = len(text) if end < 0 else end
                out.append(self._substitution(text[i + 1 : end], at, context))
                i = end + 1
            elif char in "*?[" and not quoted:
                raise Unresolved(f"the pattern {text}")
            else:
                out.append(char)
                i += 1
        return "".join(out)

    def variable(self, name: str, at: int, context: Context = ()) -> str:
        """The value of the variable ``name`` at byte ``at``. Raises Unresolved."""
        if name == "0" or name == "BASH_SOURCE":
            if self.path is None:
                raise Unresolved("$0")
            return str(self.path)
        if name in self._busy or self._depth > _DEPTH:
            raise Unresolved(f"${name}, which refers to itself or to too many others")
        self._busy.add(name)
        self._depth += 1
        try:
            return self._variable(name, at, context)
        finally:
            self._depth -= 1
            self._busy.discard(name)

    def sure(self, assignment: Assignment, context: Context) -> bool:
        """Whether ``assignment`` has happened whenever a later command in ``context`` runs."""
        return _dominates(assignment.context, context)

    def pieces(self, name: str, at: int, context: Context = (), *, skip_appends: bool = False) -> list[Assignment]:
        """The assignments that make up ``name`` at ``at``: the last plain one, and the ``+=`` behind it.

        Raises Unresolved when an assignment may or may not have happened by then; with ``skip_appends`` a ``+=`` of
        that kind is part of the result instead.
        """
        self._check_loops(name, at, context)
        every = self._assignments.get(name, [])
        found: list[Assignment] = []
        for index in range(bisect_left(every, at, key=_start) - 1, -1, -1):
            assignment = every[index]
            if not _leaks(assignment.context, context):
                continue
            if not self.sure(assignment, context) and not (skip_appends and assignment.append):
                raise Unresolved(f"${name}, which line {self._line(assignment)} sets only in some cases")
            found.append(assignment)
            if not assignment.append:
                break
        found.reverse()
        return found

    def _check_loops(self, name: str, at: int, context: Context) -> None:
        """Raise Unresolved if ``name`` is set again further down in a loop around ``at``."""
        later = self._set_in_loop.get(name)
        for part in context if later else ():
            assignment = later.get(part) if later else None
            if assignment is not None and assignment.start >= at:
                raise Unresolved(f"${name}, which line {self._line(assignment)} changes inside a loop")

    def _line(self, assignment: Assignment) -> int:
        return self.outline.line(assignment.start)

    def _variable(self, name: str, at: int, context: Context) -> str:
        if name in self._unknown:
            raise Unresolved(f"${name}, which is set in a loop or read")
        found = self.pieces(name, at, context)
        key = (name, tuple(piece.start for piece in found))
        if found and key in self._known:
            return self._known[key]
        value = "" if found and not found[0].append else self._start_value(name, at, context)
        for piece in found:
            if piece.elements is not None:
                raise Unresolved(f"${name}, which is an array")
            text = self.outline.source[slice(*piece.value)].decode("utf-8", "surrogateescape")
            # What a piece refers to is what was known before it, an earlier value of its own name too.
            self._busy.discard(name)
            value += self.word(text, piece.start, piece.context)
            self._busy.add(name)
            if len(value) > _LONGEST:
                raise Unresolved(f"${name}, which is longer than 1 MiB")
        if found:
            self._known[key] = value
        return value

    def _start_value(self, name: str, at: int, context: Context) -> str:
        """The value before the script's own assignments: the environment's, or that of an earlier ``${NAME:=x}``.

        The folder that the script is started in, and stays in, is ``.`` to the paths that are made of it.
        """
        if name in self.environment:
            return self.environment[name]
        if name == "PWD" and self._stays:
            return "."
        default = self._defaults.get(name)
        if default is None or default.start() >= at:
            raise Unresolved(f"${name}, which the script does not set")
        return self.word(default[2].decode("utf-8", "replace"), at, context)

    def _dollar(self, text: str, i: int, at: int, context: Context, quoted: bool) -> tuple[str, int]:
        following = text[i + 1]
        if text.startswith("$((", i):
            end = text.find("))", i)
            if end < 0:
                raise Unresolved(text)
            return str(self._arithmetic(text[i + 3 : end], at, context)), end + 2
        if following == "(":
            end = _closing(text, i + 1)
            return self._substitution(text[i + 2 : end], at, context), end + 1
        if following == "{":
            end = _closing(text, i + 1)
            return self._braced(text[i + 2 : end], at, context), end + 1
        if following == "'" and not quoted:
            raise Unresolved(text[i:])
        if following == '"' and not quoted:
            return "", i + 1
        match = _NAME.match(text, i + 1)
        if match is None:
            return "$", i + 1
        return self.variable(match[0], at, context), match.end()

    def _braced(self, inner: str, at: int, context: Context) -> str:
        match = _BRACED.fullmatch(inner)
        if match is None:
            raise Unresolved(f"${{{inner}}}")
        name, default, word, trim, pattern = match.groups()
        if default:
            return self._with_default(name, default, word, at, context)
        value = self.variable(name, at, context)
        return _trimmed(value, trim, self.word(pattern.replace("*", "\\*").replace("?", "\\?"), at)) if trim else value

    def _with_default(self, name: str, operation: str, word: str, at: int, context: Context) -> str:
        try:
            value: str | None = self.variable(name, at, context)
        except Unresolved:
            if name in self._unknown or self._assignments.get(name):
                raise
            value = None
        kind = operation[-1]
        missing = value is None or (operation.startswith(":") and not value)
        if kind == "+":
            return "" if missing else self.word(word, at, context)
        if missing:
            if kind == "?":
                raise Unresolved(f"${name}, which the script does not set")
            return self.word(word, at, context)
        assert value is not None
        return value

    def _substitution(self, inner: str, at: int, context: Context) -> str:
        """The few commands that scripts find their own folder with."""
        if inner.lstrip().startswith("#"):
            return ""
        if _PWD.fullmatch(inner):
            return self.variable("PWD", at, context)
        if match := _CD_PWD.fullmatch(inner):
            return os.path.normpath(self.word(match[1], at, context))
        match = _PATH_COMMAND.fullmatch(inner)
        if match is None or _has_blank(match[2]):
            raise Unresolved(f"$({inner})")
        path = self.word(match[2], at, context)
        if match[1] == "dirname":
            return os.path.dirname(path.rstrip("/")) or ("/" if path.startswith("/") else ".")
        if match[1] == "basename":
            return os.path.basename(path.rstrip("/"))
        if not path.startswith("/"):
            raise Unresolved(f"$({inner})")
        return os.path.normpath(path)

    def _arithmetic(self, expression: str, at: int, context: Context) -> int:
        def evaluate(node: ast.AST) -> int:
            if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
                return _OPERATIONS[type(node.op)](evaluate(node.left), evaluate(node.right))
            if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
                return -evaluate(node.operand)
            if isinstance(node, ast.Constant) and type(node.value) is int:
                return node.value
            if isinstance(node, ast.Name):
                return int(self.variable(node.id, at, context))
            raise ValueError(expression)

        try:
            text = re.sub(r"\$\{?(\w+)\}?", r"\1", expression)
            return evaluate(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, OverflowError, MemoryError) as error:
            raise Unresolved(f"$(({expression}))") from error


def _closing(text: str, opening: int) -> int:
    """The index of the bracket that closes the one at ``opening``, quotes and nesting respected."""
    close = {"(": ")", "{": "}"}
    wanted: list[str] = []
    quote = ""
    i = opening
    while i < len(text):
        char = text[i]
        if char == "\\" and quote != "'":
            i += 2
            continue
        if quote == "'":
            quote = "" if char == "'" else quote
        elif char == '"':
            if wanted and wanted[-1] == '"':
                wanted.pop()
            else:
                wanted.append('"')
        elif char == "'" and not (wanted and wanted[-1] == '"'):
            quote = "'"
        elif char in close and (i == opening or text[i - 1] == "$" or char == "("):
            wanted.append(close[char])
        elif wanted and char == wanted[-1]:
            wanted.pop()
            if not wanted:
                return i
        i += 1
    raise Unresolved(text)


def _has_blank(word: str) -> bool:
    depth = 0
    quote = False
    for char in word:
        if char == '"':
            quote = not quote
        depth += char in "({"
        depth -= char in ")}"
        if char in " \t" and not quote and not depth:
            return True
    return False


def _trimmed(value: str, operation: str, pattern: str) -> str:
    """``${value#pattern}`` and its like; the shortest match for one sign, the longest for two."""
    regex = re.compile(fnmatch.translate(pattern))
    cuts = range(len(value) + 1)
    if operation.startswith("#"):
        for cut in cuts if operation == "#" else reversed(cuts):
            if regex.match(value[:cut]):
                return value[cut:]
    else:
        for cut in reversed(cuts) if operation == "%" else cuts:
            if regex.match(value[cut:]):
                return value[:cut]
    return value


def _dominates(setting: Context, use: Context) -> bool:
    """Whether what happens in ``setting`` has surely happened when a later command in ``use`` runs."""
    inside = tuple(part for part in setting if part[0] != "group")
    around = tuple(part for part in use if part[0] != "group")
    if inside != around[: len(inside)]:
        return False
    following = around[len(inside) : len(inside) + 1]
    return not (inside and following and inside[-1][0] == "if" and following[0][0] in ("elif", "else"))


def _leaks(setting: Context, use: Context) -> bool:
    """Whether an assignment in ``setting`` can be seen in ``use``: not out of a subshell."""
    return all(part in use for part in setting if part[0] in _NO_LEAK)


def _start(assignment: Assignment) -> int:
    return assignment.start
