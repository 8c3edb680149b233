"""``$0`` in a text that was taken out of a script: it keeps meaning that script."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lorapatch.shell.edit import Edit, apply_edits

__all__ = ["pin_script_path"]

_NAME = "lorapatch_script"
# Single quotes and comments are not expanded; everything else may hold $0, ${0…} and BASH_SOURCE.
_TOKEN = re.compile(
    rb"'[^']*'|\\.|(?<![\w$])#[^\n]*|(?P<zero>\$0(?!\w)|\$BASH_SOURCE\b|\$\{(?:0|BASH_SOURCE(?:\[0\])?)(?P<more>[^}\w\[][^}]*)?\})",
    re.DOTALL,
)
# The folder alone is asked for: it is the same for a script that stands beside.
_FOLDER = re.compile(rb"dirname\s+(?:--\s+)?[\"']?$")


def pin_script_path(text: bytes, script: Path | None, target: Path) -> bytes:
    """``text`` with ``$0`` and ``BASH_SOURCE`` standing for ``script``, when it is run as ``target``.

    Beside the script, where only its folder is asked for, nothing changes.
    """
    if script is None:
        return text
    beside = script.parent == target.absolute().parent
    edits = []
    in_double = False
    position = 0
    while position < len(text):
        char = text[position : position + 1]
        if char == b'"':
            in_double = not in_double
            position += 1
            continue
        match = _TOKEN.match(text, position)
        if match is None or (in_double and match["zero"] is None and char != b"\\"):
            position += 1
            continue
        if match["zero"] is not None:
            more = match["more"] or b""
            if not (beside and (_FOLDER.search(text[:position]) or more.startswith(b"%/"))):
                edits.append(Edit(match.start(), match.end(), b"${" + _NAME.encode() + more + b"}"))
        position = match.end()
    if not edits:
        return text
    line = f"{_NAME}={shlex.quote(str(script))}\n"
    return line.encode("utf-8", "surrogateescape") + apply_edits(text, edits)
