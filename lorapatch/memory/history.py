"""How well estimates did: predicted against measured device memory of every run that was recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from lorapatch.memory.cache import load, store

__all__ = ["Past", "correction", "learn", "read_history"]

_FILE = "history.json"
ENOUGH = 3  # runs before their errors correct the next estimate


class Past(NamedTuple):
    """One finished run: device memory in bytes, on which card, and how it was predicted."""

    folder: str
    gpu: str
    way: str
    predicted: int
    measured: int
    corrected_by: float = 1.0

    @property
    def error(self) -> float:
        """Relative: above 0 when too much was predicted."""
        return (self.predicted - self.measured) / self.measured


def read_history(runs: Path) -> list[Past]:
    """Every run below ``runs`` (``lorapatch_runs``) whose record.json has both figures, oldest first."""
    found = []
    for path in sorted(runs.glob("*/record.json")):
        try:
            memory = json.loads(path.read_text(encoding="utf-8"))["memory"]
            past = _past(path.parent.name, memory)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if past is not None:
            found.append(past)
    return found


def _past(folder: str, memory: Mapping[str, Any]) -> Past | None:
    predicted, measured = memory.get("predicted") or {}, memory.get("device_peak_B")
    expected = (predicted.get("device") or {}).get("expected")
    if not expected or not measured:
        return None
    used = [gpu for gpu in memory["gpus"] if gpu["index"] in memory["gpus_of_run"]] or [{}]
    before = max((gpu.get("before_B") or 0 for gpu in used), default=0)  # another process's
    name = str(used[0].get("name") or predicted.get("gpu") or "")
    return Past(folder, name, str(predicted["breakdown"]["way"]), int(expected), max(int(measured) - before, 1),
                float(predicted.get("corrected_by") or 1))  # fmt: skip


def learn(past: Sequence[Past]) -> dict[str, float]:
    """Keep the median error of each card and way that has enough runs; returns what corrects the next estimates."""
    from lorapatch.errors import UsageError
    from lorapatch.memory.cards import card_called

    groups: dict[str, list[float]] = {}
    for run in past:
        try:
            name = card_called(run.gpu).name
        except UsageError:
            name = run.gpu
        groups.setdefault(_key(name, run.way), []).append(run.measured * run.corrected_by / run.predicted)
    found = {key: round(_bounded(median(ratios)), 4) for key, ratios in groups.items() if len(ratios) >= ENOUGH}
    if found:
        store(_FILE, {**load(_FILE), **found})
    return found


def correction(card: str, way: str) -> float:
    """What the device memory predicted for ``card`` is multiplied by; 1 without a history."""
    value = load(_FILE).get(_key(card, way), 1.0)
    return _bounded(float(value)) if isinstance(value, (int, float)) else 1.0


def _bounded(ratio: float) -> float:
    return min(max(ratio, 0.7), 1.5)


def _key(card: str, way: str) -> str:
    return f"{card} {way}"
