"""What was found, as text for people, JSON, GitHub annotations and SARIF."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lorapatch
from lorapatch.lora.lint.rule import Diagnostic, rules

__all__ = ["as_github", "as_json", "as_sarif", "as_text", "rule_list"]


def as_text(diagnostics: Sequence[Diagnostic], scripts: int) -> str:
    """``file:line: severity ID sentence`` with the remedy below, and a line of numbers."""
    lines = []
    for found in diagnostics:
        lines.append(f"{found.file}:{found.line}: {found.severity} {found.rule} [{found.name}] {found.sentence}")
        lines.append(f"    remedy: {found.remedy}")
    errors = sum(found.severity == "error" for found in diagnostics)
    warnings = len(diagnostics) - errors
    lines.append(f"{_count(scripts, 'script')}: {_count(errors, 'error')}, {_count(warnings, 'warning')}")
    return "\n".join(lines)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def as_json(diagnostics: Sequence[Diagnostic]) -> str:
    """One JSON document, schema 1."""
    return json.dumps(
        {"schema": 1, "diagnostics": [_dict(found) for found in diagnostics]}, indent=1, ensure_ascii=False
    )


def _dict(found: Diagnostic) -> dict[str, Any]:
    return {
        "file": str(found.file),
        "line": found.line,
        "rule": found.rule,
        "name": found.name,
        "severity": found.severity,
        "sentence": found.sentence,
        "remedy": found.remedy,
    }


def as_github(diagnostics: Sequence[Diagnostic]) -> str:
    """Workflow commands that GitHub Actions shows beside the lines of a pull request."""
    return "\n".join(
        f"::{found.severity} file={_property(str(found.file))},line={found.line},"
        f"title={_property(f'{found.rule} {found.name}')}::{_message(f'{found.sentence} ({found.remedy})')}"
        for found in diagnostics
    )


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")


def as_sarif(diagnostics: Sequence[Diagnostic]) -> str:
    """SARIF 2.1.0 (OASIS), as code scanning services take it."""
    driver = {
        "name": "lorapatch",
        "version": lorapatch.__version__,
        "rules": [
            {
                "id": rule.id,
                "name": rule.name,
                "shortDescription": {"text": rule.what},
                "help": {"text": rule.remedy},
                "defaultConfiguration": {"level": rule.severity},
            }
            for rule in rules()
        ],
    }
    results = [
        {
            "ruleId": found.rule,
            "level": found.severity,
            "message": {"text": f"{found.sentence}. {found.remedy}"},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": _uri(found.file)},
                        "region": {"startLine": found.line},
                    }
                }
            ],
        }
        for found in diagnostics
    ]
    document = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }
    return json.dumps(document, indent=1, ensure_ascii=False)


def _uri(file: Path) -> str:
    return file.as_uri() if file.is_absolute() else file.as_posix()


def rule_list() -> str:
    """Every rule on a line of its own."""
    return "\n".join(f"{rule.id} {rule.name} ({rule.severity}): {rule.what}" for rule in rules())
