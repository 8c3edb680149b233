"""What is known about a run while it runs: the events of its log, added up."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorapatch.run.log import Announcement, Event, Line, Metrics, Progress, Spawned, Traceback

__all__ = ["LoggedStep", "RunState"]

# Other names that trainers give to the same number.
_NAMES = {"learning_rate": ("learning_rate", "lr"), "grad_norm": ("grad_norm", "gnorm"), "epoch": ("epoch",)}
_KEPT_LINES = 200


@dataclass
class LoggedStep:
    """One logged step: ``stage`` counts the trainings of the script from 1, ``time`` is seconds since 1970."""

    time: float
    stage: int
    step: int
    loss: float
    grad_norm: float | None = None
    learning_rate: float | None = None
    epoch: float | None = None
    samples_per_s: float | None = None


@dataclass
class RunState:
    """Give it every event with its time. ``logging_steps``, ``samples_per_step`` (of all ranks): as the script says.

    ``first_step``: the step of the checkpoint that the first training goes on from.
    """

    logging_steps: int = 1
    first_step: int = 0
    samples_per_step: int | None = None
    stage: int = 1
    step: int = 0
    total: int | None = None
    eta_s: float | None = None
    steps_per_s: float | None = None
    logged: list[LoggedStep] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    spawned: list[Spawned] = field(default_factory=list)
    tracebacks: list[Traceback] = field(default_factory=list)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))
    _rates: dict[int, float] = field(default_factory=dict)
    _bar_step: int = 0
    _stage_over: bool = False  # its summary was printed
    _next_bar: Progress | None = None
    _new_facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def apply(self, event: Event, time: float) -> LoggedStep | None:
        """Take in ``event``; the new logged step if it was one."""
        if isinstance(event, Line):
            if not event.progress and event.raw.strip():
                self.tail.append(event.text)
        elif isinstance(event, Metrics):
            return self._metrics(event, time)
        elif isinstance(event, Progress):
            self._progress(event)
        elif isinstance(event, Announcement):
            (self._new_facts if self._stage_over and event.kind != "speed" else self.facts)[event.kind] = event.data
        elif isinstance(event, Spawned):
            self.spawned.append(event)
        elif isinstance(event, Traceback):
            self.tracebacks.append(event)
        return None

    @property
    def losses(self) -> list[float]:
        """The losses of the last stage, in order."""
        return [row.loss for row in self.logged if row.stage == self.stage]

    def _progress(self, bar: Progress) -> None:
        if bar.name and not bar.name.startswith(("Epoch", "epoch", "Train", "train", "Step", "step")):
            return  # weights that are loaded, data that are mapped
        if self.total not in (None, bar.total) or (self._stage_over and bar.step < self.step):
            # An evaluation's bar has no name either. Only a loss shows that another training has begun.
            if self._stage_over:
                self._next_bar = bar
            return
        self.total, self._bar_step = bar.total, bar.step
        self.step = max(self.step, bar.step)
        self.eta_s, self.steps_per_s = bar.eta_s, bar.steps_per_s

    def _next_stage(self) -> None:
        self.stage += any(row.stage == self.stage for row in self.logged)
        bar, self._next_bar, self._stage_over = self._next_bar, None, False
        self.step = self._bar_step = bar.step if bar else 0
        self.total = bar.total if bar else None
        self.summary, self.facts = {}, self._new_facts
        self._new_facts = {}

    def _metrics(self, entry: Metrics, time: float) -> LoggedStep | None:
        values = entry.values
        if "train_runtime" in values:
            self.summary = values
            self._stage_over = True
            return None
        if any(key.startswith("eval_") for key in values) and "loss" not in values:
            self.evaluations.append(values)
            return None
        if "samples_per_s" in values and entry.step is not None:
            self._rates[entry.step] = values["samples_per_s"]
        if "loss" not in values:
            return None
        if self._stage_over:
            self._next_stage()
        return self._log(entry, time)

    def _log(self, entry: Metrics, time: float) -> LoggedStep | None:
        last = self.logged[-1] if self.logged and self.logged[-1].stage == self.stage else None
        step = entry.step if entry.step is not None else self._implied_step(last)
        if last is not None and step <= last.step:
            return None  # a bar that shows the same loss again, or another rank's copy
        row = LoggedStep(time, self.stage, step, entry.values["loss"])
        for name, keys in _NAMES.items():
            setattr(row, name, next((entry.values[key] for key in keys if key in entry.values), None))
        row.samples_per_s = self._rates.get(step) or self._samples_per_s(last, step, time)
        self.logged.append(row)
        self.step = max(self.step, step)
        return row

    def _implied_step(self, last: LoggedStep | None) -> int:
        """Trainer's entries name no step: the bar does, but it is not drawn at every step."""
        start = self.first_step if self.stage == 1 else 0
        expected = (last.step if last else start) + self.logging_steps
        return max(expected, self._bar_step - self._bar_step % self.logging_steps)

    def _samples_per_s(self, last: LoggedStep | None, step: int, time: float) -> float | None:
        if last is None or self.samples_per_step is None or time <= last.time:
            return None
        return (step - last.step) * self.samples_per_step / (time - last.time)

    def fill(self, history: list[Mapping[str, Any]], time: float, after_step: int = 0) -> bool:
        """Add the steps of a ``trainer_state.json``'s ``log_history`` that the log did not show; True if any changed.

        The file names its steps, the log does not: where both have the same losses in the same order, the file's
        steps count. ``after_step`` is the step that the run resumed from; what is before it belongs to another run.
        """
        known = [row for entry in history if (row := self._from_history(entry, time)) and row.step > after_step]
        mine = [row for row in self.logged if row.stage == self.stage]
        before = [row.step for row in mine]
        if all(math.isclose(a.loss, b.loss, rel_tol=2e-3, abs_tol=1e-4) for a, b in zip(mine, known)):
            for row, exact in zip(mine, known):
                row.step = exact.step
        missing = [row for row in known if row.step not in {row.step for row in mine}]
        self.logged.extend(missing)
        self.logged.sort(key=lambda row: (row.stage, row.step))
        self.step = max([self.step, *(row.step for row in missing)])
        return bool(missing) or before != [row.step for row in mine]

    def _from_history(self, entry: Mapping[str, Any], time: float) -> LoggedStep | None:
        if not isinstance(entry.get("step"), int):
            return None
        try:
            numbers = {name: float(entry[name]) for name in ("loss", *_NAMES) if entry.get(name) is not None}
        except (TypeError, ValueError):
            return None
        return LoggedStep(time, self.stage, entry["step"], **numbers) if "loss" in numbers else None
