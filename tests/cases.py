"""The scripts of tests/cases, each with what is expected of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CASES", "DEFAULT", "PATCHED", "REFUSED", "Case"]

FOLDER = Path(__file__).with_name("cases")
# What `lorapatch patch` sets without options.
DEFAULT = {
    "--lora_enable": "True",
    "--lora_r": "16",
    "--lora_alpha": "32",
    "--lora_dropout": "0.1",
    "--lora_bias": "none",
}


@dataclass(frozen=True)
class Case:
    """NAME.sh with NAME.json and either NAME.patched.sh or NAME.refused.

    The JSON says: ``why`` the case is there; ``launches`` (null where reading is refused too) with those of line,
    launcher, trainer, stage and training that are certain; ``patched``, the index of the launch to be patched;
    ``options`` of `lorapatch patch`; ``flags`` where they differ from the default; ``run``, the arguments and the
    environment with which the script reaches that launch; ``mark``, a word that only that launch has, where several run
    the same trainer; ``skip_run``, a reason not to run it.
    """

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def script(self) -> Path:
        return FOLDER / f"{self.name}.sh"

    @property
    def text(self) -> bytes:
        return self.script.read_bytes()

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((FOLDER / f"{self.name}.json").read_text(encoding="utf-8"))
        return facts

    @property
    def options(self) -> list[str]:
        return list(self.facts["options"])

    @property
    def flags(self) -> dict[str, str]:
        return dict(self.facts.get("flags", DEFAULT))

    @property
    def expected(self) -> bytes:
        return (FOLDER / f"{self.name}.patched.sh").read_bytes()

    @property
    def phrases(self) -> list[str]:
        return (FOLDER / f"{self.name}.refused").read_text(encoding="utf-8").splitlines()


def _named(ending: str) -> list[Case]:
    return [Case(path.name[: -len(ending)]) for path in sorted(FOLDER.glob(f"*{ending}"))]


PATCHED = _named(".patched.sh")
REFUSED = _named(".refused")
CASES = _named(".json")
