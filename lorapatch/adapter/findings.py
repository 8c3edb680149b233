"""What a check found: one sentence with its figures, and the list of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Finding", "State", "Verification", "counted", "judged"]

State = Literal["pass", "fail", "not checked"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: in which tier (1 files, 2 loaded, 3 merged), how it is, and the evidence.

    ``figures`` are the numbers of the sentence, for JSON.
    """

    id: str
    tier: int
    state: State
    sentence: str
    figures: Mapping[str, Any] = field(default_factory=dict)


def judged(name: str, tier: int, fault: str, fine: str, figures: Mapping[str, Any] | None = None) -> Finding:
    """A finding that failed with the sentence ``fault``, or passed with ``fine`` where there is no fault."""
    return Finding(name, tier, "fail" if fault else "pass", fault or fine, figures or {})


@dataclass(frozen=True)
class Verification:
    """All findings about the adapter in ``directory``, in the order in which they were made."""

    directory: Path
    base: Path | None
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; what was not checked does not count."""
        return not self.failures

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings that failed."""
        return tuple(finding for finding in self.findings if finding.state == "fail")

    def finding(self, name: str) -> Finding | None:
        """The finding with the id ``name``."""
        return next((finding for finding in self.findings if finding.id == name), None)

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON (schema 1)."""
        return {
            "schema": 1,
            "directory": str(self.directory),
            "base": None if self.base is None else str(self.base),
            "passed": self.passed,
            "findings": [
                {"id": f.id, "tier": f.tier, "state": f.state, "sentence": f.sentence, "figures": dict(f.figures)}
                for f in self.findings
            ],
        }


def counted(number: int, noun: str, verb: str = "") -> str:
    """``1 tensor is``, ``3 tensors are``: ``verb`` is the singular's, "is" or "holds"."""
    text = f"{number:,} {noun}{'' if number == 1 else 's'}"
    if not verb:
        return text
    plural = {"is": "are", "has": "have", "was": "were"}.get(verb, verb.removesuffix("s"))
    return f"{text} {verb if number == 1 else plural}"
