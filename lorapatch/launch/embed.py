"""Commands and flags kept in a string or an array: their text, and where each byte of it stands in the script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from lorapatch.launch.model import Text, script_span
from lorapatch.shell.outline import Assignment, Context, Span, outline
from lorapatch.shell.values import Unresolved, Values

__all__ = ["Embedded", "Embedder", "as_text", "parse_words", "plain", "variable_in"]

_PROGRAM = b"run "
_LIMIT = 1 << 20  # bytes of one text: `X="$X$X"` doubles
_DEPTH = 100
_VARIABLE = re.compile(rb"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
_ORDINARY = re.compile(rb"[^\\'\"$]+")
_QUOTED = re.compile(rb"[^']+")
_WORD = re.compile(rb'"?\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)((?:\[[@*]\])?)\})"?')


@dataclass(frozen=True)
class Embedded:
    """A text with, for each of its bytes, the script offset (-1 for glue) and the references that lead to it."""

    text: bytes
    offsets: tuple[int, ...]
    paths: tuple[tuple[Span, ...], ...]
    where: str  # "string" or "array"
    skipped: tuple[Span, ...] = ()  # pieces that are added only in some cases

    def __add__(self, other: Embedded) -> Embedded:
        if len(self.text) + len(other.text) > _LIMIT:
            raise Unresolved("a string longer than 1 MiB")
        return Embedded(
            self.text + other.text,
            self.offsets + other.offsets,
            self.paths + other.paths,
            self.where,
            self.skipped + other.skipped,
        )

    def span(self, span: Span) -> Span:
        """The bytes of the script that ``span`` of the text stands for; (-1, -1) if it stands nowhere."""
        return script_span(self.offsets, span)

    def behind(self, reference: Span) -> Embedded:
        """The same text, reached through ``reference``."""
        return replace(self, paths=tuple((reference, *path) for path in self.paths))


def as_text(embedded: Embedded) -> Text:
    """The commands of ``embedded``, read as bash would read them."""
    return Text(outline(embedded.text), embedded.where, embedded.offsets, embedded.paths)


def plain(text: bytes, offsets: Sequence[int], where: str) -> Embedded:
    """A text that stands in the script as it is."""
    return Embedded(text, tuple(offsets), ((),) * len(text), where)


def variable_in(word: bytes) -> tuple[str, bool, bool] | None:
    """For a word that is one variable: its name, whether it is quoted, whether it is ``[@]``. None for other words."""
    match = _WORD.fullmatch(word) if b"$" in word else None
    if match is None or (word[:1] == b'"') != (word[-1:] == b'"'):
        return None
    return (match[1] or match[2]).decode(), word[:1] == b'"', bool(match[3])


class Embedder:
    """Puts together the texts that a script keeps in variables."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self._known: dict[tuple[str, int], Embedded] = {}

    def string_text(self, word: Span, at: int, context: Context, depth: int = 0) -> Embedded:
        """What bash makes of the quoted or bare ``word`` of the script, when it is read once more as a command.

        Variables that hold several words are put in their place; others stay as ``$NAME``. Raises Unresolved.
        """
        source = self.values.outline.source
        out: list[Embedded] = []
        text, offsets = bytearray(), list[int]()
        i, quote = word[0], b""

        def take(start: int, end: int) -> None:
            text.extend(source[start:end])
            offsets.extend(range(start, end))

        while i < word[1]:
            run = (_QUOTED if quote == b"'" else _ORDINARY).match(source, i, word[1])
            if run is not None:
                take(i, run.end())
                i = run.end()
                continue
            char = source[i : i + 1]
            if quote == b"'":
                quote = b""
                i += 1
            elif char == b"\\" and i + 1 < word[1]:
                following = source[i + 1 : i + 2]
                if following != b"\n":
                    keep = quote and following not in b'$`"\\'
                    take(i if keep else i + 1, i + 2)
                i += 2
            elif char == b'"' or (char == b"'" and not quote):
                quote = b"" if quote else char
                i += 1
            elif char == b"$" and (match := _VARIABLE.match(source, i, word[1])):
                name = (match[1] or match[2]).decode()
                inner = self._several_words(name, at, context, depth)
                if inner is None:
                    take(i, match.end())
                else:
                    out += [plain(bytes(text), offsets, "string"), inner.behind(match.span())]
                    text, offsets = bytearray(), []
                i = match.end()
            else:
                take(i, i + 1)
                i += 1
        result = plain(b"", (), "string")
        for piece in (*out, plain(bytes(text), offsets, "string")):
            result += piece
        return result

    def variable_text(self, name: str, at: int, context: Context, depth: int = 0) -> Embedded:
        """The text of the string variable ``name`` at ``at``, put together from its assignments. Raises Unresolved."""
        if depth > _DEPTH:
            raise Unresolved(f"${name}, which refers to too many others")
        pieces, skipped = self._pieces(name, at, context)
        if not pieces:
            raise Unresolved(f"${name}, which the script does not set")
        key = (name, pieces[-1].start)
        if key in self._known:
            return self._known[key]
        result = replace(plain(b"", (), "string"), skipped=skipped)
        for piece in pieces:
            if piece.elements is not None:
                raise Unresolved(f"${name}, which is an array")
            result += self.string_text(piece.value, piece.start, piece.context, depth + 1)
        self._known[key] = result
        return result

    def array_text(self, name: str, at: int, context: Context, depth: int = 0) -> Embedded:
        """The elements of the array ``name`` as the words of one command. Raises Unresolved."""
        if depth > _DEPTH:
            raise Unresolved(f"${{{name}[@]}}, which refers to too many others")
        pieces, skipped = self._pieces(name, at, context)
        if not pieces or any(piece.elements is None for piece in pieces):
            raise Unresolved(f"${{{name}[@]}}, which is not an array that the script sets")
        result = replace(plain(b"", (), "array"), skipped=skipped)
        for piece in pieces:
            for element in piece.elements or ():
                result += self._element(element, piece, depth) + plain(b" ", (-1,), "array")
        return result

    def _element(self, element: Span, piece: Assignment, depth: int) -> Embedded:
        """An element of an array; a variable or another array is put in its place."""
        written = self.values.outline.source[slice(*element)]
        variable = variable_in(written)
        inner = None
        if variable is not None and variable[2]:
            inner = self.array_text(variable[0], piece.start, piece.context, depth + 1)
        elif variable is not None and not variable[1]:
            inner = self._several_words(variable[0], piece.start, piece.context, depth)
        return plain(written, range(*element), "array") if inner is None else inner.behind(element)

    def _pieces(self, name: str, at: int, context: Context) -> tuple[list[Assignment], tuple[Span, ...]]:
        """The sure pieces of a variable, and those that are appended only in some cases."""
        pieces = self.values.pieces(name, at, context, skip_appends=True)
        sure = [piece for piece in pieces if self.values.sure(piece, context)]
        return sure, tuple((piece.start, piece.end) for piece in pieces if not self.values.sure(piece, context))

    def _several_words(self, name: str, at: int, context: Context, depth: int) -> Embedded | None:
        """The text of ``name`` if it holds more than one word."""
        try:
            text = self.variable_text(name, at, context, depth)
        except Unresolved:
            return None
        return text if len(text.text.split()) > 1 or text.text.startswith(b"-") else None


@lru_cache(maxsize=256)  # a variable stands in many words
def parse_words(text: bytes) -> tuple[Span, ...] | None:
    """The words of ``text`` if it is one plain list of words; None if it is anything else."""
    read = outline(_PROGRAM + text)  # else `--a=b` at the front would be an assignment
    outer = [command for command in read.commands if not command.context]
    if read.errors or len(outer) != 1 or outer[0].redirects or outer[0].heredocs:
        return None
    return tuple((start - len(_PROGRAM), end - len(_PROGRAM)) for start, end in outer[0].words[1:])
