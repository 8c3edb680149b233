"""What the words of one command are: bashlex reads it, and tree-sitter has to agree on every word's span."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable

from lorapatch.errors import Refused
from lorapatch.shell.bashlex_words import bashlex_parts
from lorapatch.shell.outline import Command, Outline, Span

__all__ = ["blank", "check_words", "check_not_cut", "gaps"]

_NOT_ASCII = re.compile(rb"[\x80-\xff]")
# Between two words of a command there may be blanks and continued lines, nothing else.
_GAP = re.compile(rb"(?:[ \t]|\\\n)+")
# Reserved words that tree-sitter takes for a program; bashlex fails on the first and knows the second.
_KEYWORDS = {b"time", b"coproc"}
_ONLY_COMMENTS = re.compile(rb"(?:[ \t\n\\]|#[^\n]*\n)*")
_CUT = re.compile(rb"(?:[ \t]|\\\n)*\\[ \t]+")


def blank(source: bytes, start: int, end: int, spans: Iterable[Span]) -> bytes:
    """``source[start:end]`` with each span, and each byte outside ASCII, replaced by as many ``x``."""
    text = bytearray(source[start:end])
    for first, last in spans:
        first, last = max(first, start), min(last, end)
        if first < last:
            text[first - start : last - start] = b"x" * (last - first)
    return _NOT_ASCII.sub(b"x", bytes(text))


def check_not_cut(outline: Outline, command: Command) -> None:
    """Raise Refused if a backslash with a blank behind it ends the command where its author did not mean it to.

    Such a backslash escapes the blank. `bash -n` is content, the flags on the next lines are not passed.
    """
    source = outline.source
    for _, end in command.words:
        cut = _CUT.match(source, end)
        if cut:
            line = outline.line(cut.end() - 1)
            what = "a comment" if source[cut.end() : cut.end() + 1] == b"#" else "a blank"
            raise Refused(
                f"line {line}: {what} stands behind the backslash, so the command ends there and the lines below it are"
                " not part of it; let the backslash be the last character of the line"
            )
    _check_not_continued(outline, command)


def _check_not_continued(outline: Outline, command: Command) -> None:
    """Raise Refused if the next command begins with flags: they were meant to be this one's."""
    index = bisect_left(outline.commands, command.end, key=lambda other: other.start)
    if index == len(outline.commands):
        return
    source, following = outline.source, outline.commands[index]
    between = source[command.end : following.start]
    if source[following.start : following.start + 2] == b"--" and _ONLY_COMMENTS.fullmatch(between):
        comment = between.find(b"#")
        here = outline.line(command.end if comment < 0 else command.end + comment)
        there = outline.line(following.start)
        cause = "a missing backslash or an empty line" if comment < 0 else "a comment"
        raise Refused(
            f"line {here}: the command is cut short by {cause}, so to bash the flags on line {there} are a command of"
            " their own; join the lines"
        )


def check_words(outline: Outline, command: Command) -> None:
    """Raise Refused unless bashlex finds the words, prefix and redirects of ``command`` where tree-sitter does."""
    end = min((start for start, _ in command.heredocs), default=command.end)
    spans = list(command.expansions)
    if command.words and outline.source[slice(*command.words[0])] in _KEYWORDS:
        spans.append(command.words[0])
    text = blank(outline.source, command.start, end, spans)
    try:
        found = bashlex_parts(text)
    except ImportError:
        raise
    except Exception as error:  # bashlex raises many kinds on input that it does not know
        raise _disagree(outline, command) from error
    parts = [tuple(_trimmed(outline.source, a + command.start, b + command.start) for a, b in spans) for spans in found]
    if parts != [command.words, command.assignments, command.redirects]:
        raise _disagree(outline, command)


def _trimmed(source: bytes, start: int, end: int) -> Span:
    """Without the continued line ends that bashlex counts to the word they touch."""
    while source.startswith(b"\\\n", start) and start < end:
        start += 2
    while source.endswith(b"\\\n", start, end):
        end -= 2
    return start, end


def _disagree(outline: Outline, command: Command) -> Refused:
    line = outline.line(command.start)
    program = outline.source[slice(*command.words[0])] if command.words else b""
    name = program.decode("utf-8", "replace")
    return Refused(
        f"line {line}: two parsers do not agree on the words of this `{name}` command, so it is not touched;"
        " write it more simply (one flag a line, values in quotes)"
    )


def gaps(source: bytes, words: tuple[Span, ...]) -> list[bytes] | None:
    """What stands between the words; None if it is more than blanks and continued lines."""
    between = [source[a[1] : b[0]] for a, b in zip(words, words[1:])]
    return between if all(_GAP.fullmatch(gap) for gap in between) else None
