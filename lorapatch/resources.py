"""Where the files that travel with lorapatch are: in a wheel, in an editable install, in a checkout."""

from __future__ import annotations

from pathlib import Path

__all__ = ["resource_dir"]


def resource_dir(name: str) -> Path:
    """The folder ``name`` ("templates" or "original_scripts").

    A wheel holds it inside the package; a checkout and an editable install hold it beside the package.

    Raises FileNotFoundError when the installation is damaged.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{name}/ is missing beside {package}: install lorapatch again")
