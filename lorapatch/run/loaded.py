"""The adapter that a run left, loaded with its base: ``lorapatch verify --tier 2`` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lorapatch.adapter.findings import Finding

__all__ = ["load_adapter"]

# Loading MGM-2B and asking it takes half a minute on a GPU; a CPU may need minutes.
_LONGEST_S = 900


def load_adapter(directory: Path, *, longest_s: float = _LONGEST_S) -> tuple[Finding, ...]:
    """The findings of tier 2; where they cannot be made (no torch here, no base model, no time), one that says why.

    Apart, so that neither a model nor its libraries stay in this process, and what crashes there ends nothing here.
    """
    command = [sys.executable, "-m", "lorapatch.cli", "verify", str(directory), "--tier", "2", "--json"]
    try:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=longest_s, check=False)
    except subprocess.TimeoutExpired:
        return (_unknown(f"it was not loaded within {longest_s:g} s"),)
    try:
        found = json.loads(ended.stdout)["findings"]
    except (ValueError, LookupError):
        said = ended.stderr.decode("utf-8", "replace").strip().splitlines()
        return (_unknown(f"loading it ended with {ended.returncode}{f' ({said[-1]})' if said else ''}"),)
    return tuple(Finding(f["id"], f["tier"], f["state"], f["sentence"], f["figures"]) for f in found)


def _unknown(sentence: str) -> Finding:
    return Finding("loaded", 2, "not checked", sentence)
