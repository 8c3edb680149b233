"""The parts of one simple command as bashlex sees them: by its tokenizer where that is enough, else by its grammar."""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Container
from functools import cache
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any, NamedTuple

from lorapatch.shell.outline import Span

__all__ = ["Parts", "bashlex_parts"]

# bashlex goes through a text character by character, at some microseconds each. It need not see all of a long name or
# path: no word ends, or is quoted, between two such characters. Nor every blank of several: but one behind a backslash is
# part of a word.
_LONG = re.compile(r"(?<=[\w./-])[\w./-]{3,}(?=[\w./-])|(?<=(?<!\\)[ \t])[ \t]+", re.ASCII)
_NAME = re.compile(r"\w+", re.ASCII)
_RESERVED = frozenset(word[1:-1] for word in ("while", "until", "select", "function", "coproc"))
# What bashlex's grammar looks into and its tokenizer passes over.
_NESTED = re.compile(r"`|\$[({\[\"']|[<>]\(")
_FILES = ("WORD",)
_DESCRIPTORS = ("WORD", "NUMBER", "DASH")
# What may stand behind each kind of redirect.
_REDIRECTS = {
    "LESS": _FILES,
    "GREATER": _FILES,
    "GREATER_GREATER": _FILES,
    "GREATER_BAR": _FILES,
    "LESS_GREATER": _FILES,
    "LESS_LESS_LESS": _FILES,
    "LESS_AND": _DESCRIPTORS,
    "GREATER_AND": _DESCRIPTORS,
    "AND_GREATER": _FILES,
    "AND_GREATER_GREATER": _FILES,
}


class Parts(NamedTuple):
    """The spans, in bytes of the command's text, of what it is made of."""

    words: tuple[Span, ...]
    assignments: tuple[Span, ...]  # before the program
    redirects: tuple[Span, ...]


def bashlex_parts(text: bytes) -> Parts:
    """The parts of ``text``, a simple command in ASCII.

    Raises whatever bashlex raises on text that it cannot read, and ValueError on what is not one simple command.
    """
    whole = text.decode("ascii")
    if not _NESTED.search(whole):
        short, original = _abridged(whole)
        if (found := _by_tokens(short)) is not None:
            return Parts(*(tuple((original(start), original(end)) for start, end in spans) for spans in found))
    return _by_grammar(whole)


def _abridged(text: str) -> tuple[str, Callable[[int], int]]:
    """``text`` with long names and gaps made short, and the function from an offset there to the one in ``text``."""
    pieces: list[str] = []
    ends, shifts = [0], [0]  # from this offset on, the original is so much further
    kept = length = 0
    for match in _LONG.finditer(text):
        piece = text[kept : match.start()] + _stand_in(match[0])
        pieces.append(piece)
        kept = match.end()
        length += len(piece)
        ends.append(length)
        shifts.append(kept - length)
    pieces.append(text[kept:])
    return "".join(pieces), lambda offset: offset + shifts[bisect_right(ends, offset) - 1]


def _stand_in(long: str) -> str:
    """What leaves a number a number, a name a name, a reserved word itself, and anything else none of them."""
    if long[0] in " \t":
        return ""
    if not _NAME.fullmatch(long):
        return "-_"
    return long if long.isdecimal() or long in _RESERVED else "__"


@cache
def _tokenizer() -> tuple[ModuleType, Callable[[], Any]]:
    """bashlex's module ``tokenizer``, and what makes a state for it.

    bashlex itself would load its grammar too, which takes a third of the time of a whole `lorapatch patch`. So the package
    is there, unexecuted, while the two modules are loaded; a later ``import bashlex`` finds them and loads the rest.
    """
    spec = None if "bashlex" in sys.modules else find_spec("bashlex")
    if spec is not None:
        sys.modules["bashlex"] = module_from_spec(spec)
    try:
        from bashlex import state, tokenizer  # type: ignore[import-untyped]
    finally:
        if spec is not None:
            del sys.modules["bashlex"]
    return tokenizer, state.parserstate


def _by_tokens(text: str) -> Parts | None:
    """Words, assignments and redirects of ``text``; None if it has tokens that the grammar has to judge."""
    tokenizer, new_state = _tokenizer()
    words, assignments, redirects = list[Span](), list[Span](), list[Span]()
    reader = tokenizer.tokenizer(text, new_state())
    begin = -1  # of a redirect, while it is read
    wanted: Container[str] = ()  # behind a redirect's operator
    while (token := reader.token()) is not tokenizer.eoftoken:
        kind, span = token.type, (token.lexpos, token.endlexpos)
        if wanted:
            if kind not in wanted:
                return None
            redirects.append((begin, span[1]))
            begin, wanted = -1, ()
        elif kind in _REDIRECTS:
            begin, wanted = span[0] if begin < 0 else begin, _REDIRECTS[kind]
        elif begin >= 0:  # a number, and no redirect behind it
            return None
        elif kind == "WORD":
            words.append(span)
        elif kind == "ASSIGNMENT_WORD":
            assignments.append(span)
        elif kind == "NUMBER":
            begin = span[0]
        elif kind == "NEWLINE" and span[0] == len(text):  # the one that bashlex puts there itself
            break
        else:
            return None
    else:  # a backslash hides that line end
        return None
    return Parts(tuple(words), tuple(assignments), tuple(redirects)) if words or assignments or redirects else None


def _by_grammar(text: str) -> Parts:
    import bashlex

    trees = bashlex.parse(text, expansionlimit=0)
    if len(trees) != 1 or trees[0].kind != "command":
        raise ValueError("not one simple command")
    found: dict[str, list[Span]] = {"word": [], "assignment": [], "redirect": []}
    for part in trees[0].parts:
        if part.kind not in found:
            raise ValueError(f"a {part.kind} in a simple command")
        found[part.kind].append((part.pos[0], part.pos[1]))
    return Parts(*map(tuple, found.values()))
