"""Whether the installed PEFT knows what adapter_config.json says: its source is read, PEFT is not imported."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lorapatch.adapter.findings import Finding, counted

__all__ = ["InstalledPeft", "check_version", "installed_peft"]

_CLASSES = {"LoraConfig", "PeftConfig", "PeftConfigMixin"}


class InstalledPeft(NamedTuple):
    """A PEFT: its version, the fields of its LoraConfig, and whether it passes over fields that it does not know."""

    version: str
    fields: frozenset[str]
    lenient: bool


def installed_peft() -> InstalledPeft | None:
    """The PEFT of this Python; None if there is none, or its source is not where it was in 0.4 to 0.21."""
    spec = importlib.util.find_spec("peft")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    fields: set[str] = set()
    lenient = False
    for name in ("config.py", "utils/config.py", "tuners/lora/config.py", "tuners/lora.py"):
        if (root / name).is_file():
            text = (root / name).read_text(encoding="utf-8")
            fields |= _fields(text)
            lenient = lenient or "got an unexpected keyword" in text
    return InstalledPeft(importlib.metadata.version("peft"), frozenset(fields), lenient) if "r" in fields else None


def _fields(source: str) -> set[str]:
    return {
        line.target.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and node.name in _CLASSES
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def check_version(config: Mapping[str, Any], peft: InstalledPeft | None) -> Finding:
    """Whether ``peft`` loads an adapter with this ``adapter_config.json``, and means the same by it."""
    written = config.get("peft_version")
    by = f"PEFT {written}" if written else "a PEFT that does not say which"
    if peft is None:
        return Finding("peft", 1, "not checked", f"written by {by}; PEFT is not installed here", {"written": written})
    unknown = sorted(set(config) - peft.fields)
    meant = [name for name in unknown if config[name] not in (None, False, [], {}, "")]
    figures = {"written": written, "installed": peft.version, "unknown": unknown}
    fields = f"{counted(len(unknown), 'field')} that PEFT {peft.version} does not know ({', '.join(unknown)})"
    if meant:
        sentence = f"adapter_config.json, written by {by}, has {fields}: install the PEFT that wrote it"
        return Finding("peft", 1, "fail", sentence, figures)
    if unknown and not peft.lenient:
        sentence = (
            f"adapter_config.json, written by {by}, has {fields} and would end in 'unexpected keyword'; none is set, "
            "so remove them from the file"
        )
        return Finding("peft", 1, "fail", sentence, figures)
    note = "; fields that it does not know are not set" if unknown else ""
    return Finding("peft", 1, "pass", f"written by {by}, PEFT {peft.version} is installed{note}", figures)
