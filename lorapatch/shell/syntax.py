"""What bash itself says: whether a script's syntax is right, and into which words it splits a command."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from types import TracebackType
from typing import TypeVar

from lorapatch.errors import Refused
from lorapatch.shell.command import blank, gaps
from lorapatch.shell.outline import Command

__all__ = ["BashSyntax", "BashWords", "syntax_error"]

_ENVIRONMENT = {"PATH": "/nonexistent", "LC_ALL": "C", "LANG": "C"}
_TIMEOUT = 20  # seconds
_DOLLAR = re.compile(rb"[$`]")


_Any = TypeVar("_Any", bound="_Bash")


class _Bash:
    """A bash that reads ``text`` while we go on; leaving the ``with`` ends it. Raises Refused if there is no bash."""

    def __init__(self, arguments: list[str], text: bytes, environment: dict[str, str]) -> None:
        folders = os.get_exec_path()
        bash = next((path for folder in folders if os.access(path := os.path.join(folder, "bash"), os.X_OK)), None)
        if bash is None:
            raise Refused("bash is not on the PATH; lorapatch needs it to check what it writes")
        with tempfile.TemporaryFile() as script:  # not a pipe: nobody has to wait until bash has read it
            script.write(text)
            script.seek(0)
            try:
                self._process = subprocess.Popen(
                    [bash, "--noprofile", "--norc", *arguments],
                    stdin=script,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=environment,
                    cwd="/",  # a folder that is there
                )
            except OSError as error:
                raise Refused(f"{bash} cannot be run ({error.strerror}); lorapatch needs it to check what it writes") from error

    def __enter__(self: _Any) -> _Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._process:  # closes its pipes and waits
            self._process.kill()

    def _answer(self) -> tuple[int, bytes, bytes]:
        """Its exit code, standard output and standard error. Raises Refused if it takes too long."""
        try:
            out, err = self._process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise Refused(f"bash did not answer within {_TIMEOUT} s, so nothing was written") from error
        return self._process.returncode, out, err


class BashSyntax(_Bash):
    """``bash -n`` on ``source``: nothing of it is executed."""

    def __init__(self, source: bytes) -> None:
        # An exported function or BASH_ENV of the user's must not change the verdict.
        path, locale = os.environ.get("PATH", os.defpath), os.environ.get("LC_ALL", "C.UTF-8")
        super().__init__(["-n"], source, {"PATH": path, "LC_ALL": locale})

    def error(self) -> str | None:
        """What bash says against the source; None if it has no objection."""
        code, _, said = self._answer()
        if code == 0 and not said:
            return None
        text = said.decode("utf-8", "replace").strip()
        if code == 0 and "here-document" not in text:
            return None
        first = next((line for line in text.splitlines() if line), "bash -n ended with an error")
        return re.sub(r"^(?:\S*bash|bash): ", "", first)


def syntax_error(source: bytes) -> str | None:
    """What ``bash -n`` says against ``source`` (nothing is executed); None if it has no objection."""
    with BashSyntax(source) as bash:
        return bash.error()


class BashWords(_Bash):
    """The words of commands (each with the text it stands in) as bash splits them, expansions blanked out.

    Nothing of the user's runs: the words become arguments of ``set``, every ``$`` and back quote is blanked out before
    bash sees them, there is nothing but words and blanks in the text, and that bash is restricted and has no PATH.

    Raises Refused if the text between the words is more than blanks and redirects, or bash fails.
    """

    def __init__(self, *commands: tuple[bytes, Command]) -> None:
        self._commands = len(commands)
        text = b"".join(_as_arguments(source, command) for source, command in commands)
        super().__init__(["-r", "-f", "+B", "-s"], text, _ENVIRONMENT)

    def words(self) -> list[list[bytes]]:
        """The words, command by command."""
        code, out, said = self._answer()
        fields = out.split(b"\0")[:-1]
        found: list[list[bytes]] = []
        while fields and fields[0].isdigit():
            count = int(fields[0])
            found.append(fields[1 : count + 1])
            del fields[: count + 1]
        if code or said or fields or len(found) != self._commands:
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
