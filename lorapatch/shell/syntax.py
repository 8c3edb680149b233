"""What bash itself says: whether a script's syntax is right, and into which words it splits a command."""

from __future__ import annotations

import os
import re
import subprocess

from lorapatch.errors import Refused
from lorapatch.shell.command import blank, gaps
from lorapatch.shell.outline import Command

__all__ = ["bash_words", "syntax_error"]

_ENVIRONMENT = {"PATH": "/nonexistent", "LC_ALL": "C", "LANG": "C"}
_TIMEOUT = 20  # seconds
_DOLLAR = re.compile(rb"[$`]")


def _bash(arguments: list[str], text: bytes, environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    folders = os.get_exec_path()
    bash = next((path for folder in folders if os.access(path := os.path.join(folder, "bash"), os.X_OK)), None)
    if bash is None:
        raise Refused("bash is not on the PATH; lorapatch needs it to check what it writes")
    try:
        return subprocess.run(
            [bash, "--noprofile", "--norc", *arguments],
            input=text,
            capture_output=True,
            env=environment,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise Refused(f"bash did not answer within {_TIMEOUT} s, so nothing was written") from error


def syntax_error(source: bytes) -> str | None:
    """What ``bash -n`` says against ``source`` (nothing is executed); None if it has no objection."""
    # An exported function or BASH_ENV of the user's must not change the verdict.
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": os.environ.get("LC_ALL", "C.UTF-8")}
    result = _bash(["-n"], source, environment)
    if result.returncode == 0 and not result.stderr:
        return None
    text = result.stderr.decode("utf-8", "replace").strip()
    if result.returncode == 0 and "here-document" not in text:
        return None
    first = next((line for line in text.splitlines() if line), "bash -n ended with an error")
    return re.sub(r"^(?:\S*bash|bash): ", "", first)


def bash_words(*commands: tuple[bytes, Command]) -> list[list[bytes]]:
    """The words of each command (with the text it stands in) as bash splits them, expansions blanked out.

    Nothing of the user's runs: the words become arguments of ``set``, every ``$`` and back quote is blanked out before
    bash sees them, there is nothing but words and blanks in the text, and that bash is restricted and has no PATH.

    Raises Refused if the text between the words is more than blanks and redirects, or bash fails.
    """
    text = b"".join(_as_arguments(source, command) for source, command in commands)
    result = _bash(["-r", "-f", "+B", "-s"], text, _ENVIRONMENT)
    fields = result.stdout.split(b"\0")[:-1]
    found: list[list[bytes]] = []
    while fields:
        count = int(fields[0])
        found.append(fields[1 : count + 1])
        del fields[: count + 1]
    if result.returncode or result.stderr or len(found) != len(commands):
        raise Refused("bash does not split this command as lorapatch does, so it is not touched; write it more simply")
    return found


def _as_arguments(source: bytes, command: Command) -> bytes:
    parts = [b"set --"]
    for gap, (start, end) in zip([b" ", *_gaps_without_redirects(source, command)], command.words):
        word = blank(source, start, end, command.expansions)
        parts += [gap, _DOLLAR.sub(b"_", word)]
    return b"".join(parts) + b'\nprintf \'%s\\0\' "$#" "$@"\n'


def _gaps_without_redirects(source: bytes, command: Command) -> list[bytes]:
    plain = source
    if command.redirects:
        spaces = bytearray(source)
        for start, end in command.redirects:
            spaces[start:end] = b" " * (end - start)
        plain = bytes(spaces)
    between = gaps(plain, command.words)
    if between is None:
        raise Refused("something other than blanks stands between the words of this command; write it more simply")
    return between
