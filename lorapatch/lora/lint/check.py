"""Check scripts against every rule."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorapatch.errors import Refused, UsageError
from lorapatch.launch import read_script
from lorapatch.lora.lint.facts import Facts
from lorapatch.lora.lint.rule import Diagnostic, Rule, rules

__all__ = ["CheckOptions", "check_script", "check_scripts", "exit_code"]

_COMMENT = re.compile(rb"#[ \t]*lorapatch:[ \t]*ignore[ \t]*=[ \t]*([A-Za-z0-9_, \t-]+)")


@dataclass(frozen=True)
class CheckOptions:
    """``select`` and ``ignore``: rules by id, by the beginning of an id ("LP2") or by name; ``ignore`` wins.

    ``roots``: folders to look for trainers in. ``environment``: values that the script will find in its environment.
    ``bf16``: whether this machine's GPU has bf16 and TF32 (None: not known, so not checked).
    Raises UsageError for a rule that there is not.
    """

    select: Sequence[str] = ()
    ignore: Sequence[str] = ()
    roots: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    bf16: bool | None = None

    def __post_init__(self) -> None:
        for name in (*self.select, *self.ignore):
            if not any(_means(name, rule) for rule in rules()):
                raise UsageError(f"there is no rule {name}; `lorapatch check --list` shows them all")

    def wants(self, rule: Rule) -> bool:
        """Whether a rule is to be applied."""
        selected = not self.select or any(_means(name, rule) for name in self.select)
        return selected and not any(_means(name, rule) for name in self.ignore)


def _means(name: str, rule: Rule) -> bool:
    return rule.name == name or (name.upper().startswith("LP") and rule.id.startswith(name.upper()))


def check_scripts(paths: Iterable[Path], options: CheckOptions | None = None) -> list[Diagnostic]:
    """Everything found in several scripts, in their order."""
    return [diagnostic for path in paths for diagnostic in check_script(path, options)]


def check_script(path: Path, options: CheckOptions | None = None) -> list[Diagnostic]:
    """Everything found in one script, in the order of its lines. Nothing of the script or its trainer is run.

    A script that cannot be read at all (a directory, binary, CRLF …) is a finding too.
    """
    options = options or CheckOptions()
    try:
        script = read_script(path, options.environment)
    except Refused as refusal:
        rule = next(rule for rule in rules() if rule.id == "LP100")
        if any(_means(name, rule) for name in options.ignore):  # to select other rules does not make it readable
            return []
        return [Diagnostic(path, 1, rule.id, rule.name, rule.severity, str(refusal), rule.remedy)]
    facts = Facts(path, script, options.roots, options.bf16, options.environment)
    found = []
    for rule in rules():
        if options.wants(rule):
            for item in rule.find(facts):
                if not _is_ignored(facts, item.line, rule):
                    remedy = item.remedy or rule.remedy
                    found.append(Diagnostic(path, item.line, rule.id, rule.name, rule.severity, item.sentence, remedy))
    return sorted(dict.fromkeys(found))


def exit_code(diagnostics: Iterable[Diagnostic], *, strict: bool = False) -> int:
    """1 with an error, or under ``strict`` with a warning; else 0."""
    return int(any(strict or diagnostic.severity == "error" for diagnostic in diagnostics))


def _is_ignored(facts: Facts, line: int, rule: Rule) -> bool:
    """A ``# lorapatch: ignore=ID`` on the line, or in the comments above the command that the line belongs to."""
    lines = facts.source.split(b"\n")
    if _says_ignore(lines, line, rule):
        return True
    start = min((f.line for f in facts.launches if f.line <= line <= _last_line(facts, f.launch.end)), default=line)
    above = start - 1
    while above >= 1 and lines[above - 1].lstrip().startswith(b"#"):
        if _says_ignore(lines, above, rule):
            return True
        above -= 1
    return False


def _says_ignore(lines: list[bytes], line: int, rule: Rule) -> bool:
    match = _COMMENT.search(lines[line - 1]) if 1 <= line <= len(lines) else None
    names = re.split(r"[,\s]+", match[1].decode("ascii").strip()) if match else []
    return any(_means(name, rule) for name in names if name)


def _last_line(facts: Facts, end: int) -> int:
    return facts.script.line(end)
