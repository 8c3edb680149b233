"""What a script launches: trainers, their flags, values and stages."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path

from lorapatch.launch.find import read_source
from lorapatch.launch.model import Flag, Launch, Script, Stage, Trainer, Word

__all__ = ["Flag", "Launch", "Script", "Stage", "Trainer", "Word", "read_script", "read_source"]


def read_script(path: str | PathLike[str], environment: Mapping[str, str] | None = None) -> Script:
    """Read the script at ``path`` without running anything of it.

    ``environment`` holds values that the script will find in its environment; the real one is not looked at.
    Raises Refused for a file that is not a script (directory, binary, CRLF …).
    """
    from lorapatch.shell.files import read_bytes

    file = Path(fspath(path))
    return read_source(read_bytes(file), Path(file.absolute()), environment)
