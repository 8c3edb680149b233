"""A lint rule, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lorapatch.lora.lint.facts import Facts

__all__ = ["Diagnostic", "Found", "Rule", "Severity", "rule", "rules"]

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Found:
    """What a rule found: the line, the sentence, and the remedy if it is not the rule's own."""

    line: int
    sentence: str
    remedy: str | None = None


@dataclass(frozen=True)
class Rule:
    """``id`` as users select it; ``what`` the rule in a few words; ``remedy`` what to do in general."""

    id: str
    name: str
    severity: Severity
    what: str
    remedy: str
    find: Callable[[Facts], Iterator[Found]]


@dataclass(frozen=True, order=True)
class Diagnostic:
    """One finding in one script. ``file`` is the script, ``line`` from 1."""

    file: Path
    line: int
    rule: str
    name: str
    severity: Severity
    sentence: str
    remedy: str


_RULES: dict[str, Rule] = {}


def rule(
    id: str, name: str, severity: Severity, what: str, remedy: str
) -> Callable[[Callable[[Facts], Iterator[Found]]], Callable[[Facts], Iterator[Found]]]:
    """Register a function as a rule."""

    def keep(find: Callable[[Facts], Iterator[Found]]) -> Callable[[Facts], Iterator[Found]]:
        _RULES[id] = Rule(id, name, severity, what, remedy, find)
        return find

    return keep


def rules() -> tuple[Rule, ...]:
    """Every rule in the order of its id."""
    from lorapatch.lora.lint import config_rules, lora_rules, path_rules, shell_rules, trainer_rules

    del config_rules, lora_rules, path_rules, shell_rules, trainer_rules  # importing them registers their rules
    return tuple(_RULES[id] for id in sorted(_RULES))
