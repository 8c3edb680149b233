"""Prove a patched script before anybody writes it: its words are the old ones plus the flags, to all who read it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from lorapatch.errors import Refused
from lorapatch.launch.find import read_source
from lorapatch.launch.model import Launch, Script
from lorapatch.shell.command import check_words
from lorapatch.shell.syntax import BashSyntax, BashWords, syntax_error

__all__ = ["prove", "unproved"]


def prove(
    script: Script, launch: Launch, text: bytes, flags: Mapping[str, tuple[str, ...]], attach: Sequence[str] = ()
) -> tuple[Script, Launch]:
    """Read ``text``, the script with ``flags`` set in ``launch``, and ``attach`` before its trainer; return it and its launch.

    Raises Refused unless two parsers and bash itself find the old words, the new ones, and nothing else changed.
    """
    with BashSyntax(text) as syntax:  # it works while we read
        try:
            after, now, old_words, new_words = _read_again(script, launch, text)
        except Refused:
            _check_syntax(syntax, script)  # the better reason
            raise
        _check_syntax(syntax, script)
    for old, other in zip(script.launches, after.launches):
        if old.number != launch.number and [w.text for w in old.words] != [w.text for w in other.words]:
            raise unproved(launch)
    if _without(now, flags) != _without(launch, flags, attach):
        raise unproved(launch)
    if attach and not (now.attached and now.trainer[:2] == launch.trainer[:2]):
        raise unproved(launch)
    # A trainer inside of an array or a string is not among the words of the command that uses it.
    seen = launch.trainer.word.span in map(launch.text.span, launch.command.words)
    inserted = [word.encode("utf-8", "surrogateescape") for word in shlex.split(" ".join(attach)) if seen]
    if not _is_with(_others(new_words, now, flags), inserted, _others(old_words, launch, flags)):
        raise unproved(launch)
    return after, now


def _is_with(words: Sequence[bytes], inserted: Sequence[bytes], before: Sequence[bytes]) -> bool:
    """Whether ``words`` are ``before`` with ``inserted`` at one place; the parsers say at which."""
    count = len(inserted)
    return any(
        words[at : at + count] == inserted and [*words[:at], *words[at + count :]] == before
        for at in range(len(words) - count + 1)
    )


def _read_again(script: Script, launch: Launch, text: bytes) -> tuple[Script, Launch, list[bytes], list[bytes]]:
    """The patched script, its launch, and the words of the launch to bash, before and now."""
    after = read_source(text, script.path, script.values.environment)
    if len(after.launches) != len(script.launches):
        raise unproved(launch)
    now = after.launches[launch.number - 1]
    before, new = ((one.text.outline.source, one.command) for one in (launch, now))
    with BashWords(before, new) as bash:
        check_words(now.text.outline, now.command)
        old_words, new_words = bash.words()
    return after, now, old_words, new_words


def _check_syntax(syntax: BashSyntax, script: Script) -> None:
    if error := syntax.error():
        if before := syntax_error(script.source):
            raise Refused(f"bash finds a syntax error already: {before}")
        raise Refused(f"the patched script would have a syntax error: {error}; nothing was written")


def _without(launch: Launch, flags: Mapping[str, tuple[str, ...]], attach: Sequence[str] = ()) -> list[str]:
    """The words of the launch less the flags in question and their values, with ``attach`` before the trainer."""
    own = {id(word) for name in flags for flag in launch.all_flags(name) for word in (flag.word, *flag.values)}
    found: list[str] = []
    for word in launch.words:
        if word is launch.trainer.word:
            found += attach
        if id(word) not in own:
            found.append(word.text)
    return found


def _others(words: Sequence[bytes], launch: Launch, flags: Mapping[str, tuple[str, ...]]) -> list[bytes]:
    """The words that bash sees, less the flags in question and their values."""
    values = {name: [len(flag.values) for flag in launch.all_flags(name) if not flag.equals] for name in flags}
    rest: list[bytes] = []
    skip = 0
    for word in words:
        name, equals, _ = word.partition(b"=")
        key = name.lstrip(b"-").replace(b"-", b"_").decode("latin-1") if name.startswith(b"-") else ""
        if skip:
            skip -= 1
        elif key not in values:
            rest.append(word)
        elif not equals and values[key]:
            skip = values[key].pop(0)
    return rest


def unproved(launch: Launch) -> Refused:
    return Refused(
        f"line {launch.line}: the patched command could not be proved to be the old one plus the flags, so nothing was"
        " written; write it more simply (one flag a line, values in quotes)"
    )
