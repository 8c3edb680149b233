"""Will it fit, and how fast will it be: predictions, corrected by what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorapatch.tune.configuration import Configuration
from lorapatch.tune.ladder import Space
from lorapatch.tune.trial import Goal, Predict, Prediction, Trial

__all__ = ["Fitting", "at_fault", "gib", "speed_score"]

# A prediction has to leave this share of the budget free; host memory wavers more.
_MARGIN, _HOST_MARGIN = 0.02, 0.05
_STEEPEST = 3.0
_TRACES = 2
# What a diagnosis says is at fault, whatever else the run had: those that need the same are not tried.
_AT_FAULT = {"quantisation-missing": "bits", "bitsandbytes-zero3": "bits", "deepspeed-build": "offload"}
_NEARLY = 0.9  # below this share of what is expected a budget is hopeless
# Seconds of a sample: the forward and backward pass (a third more with checkpoints), and a part that every micro-batch
# takes however small it is, spread over its samples. Measured on MGM-2B, one H200: 0.16 s and 0.032 s a sample.
_FIXED = 6.0
_RECOMPUTED = 4 / 3
_OF_BITS = {16: 1.0, 8: 2.0, 4: 1.25}
_OFFLOADED = 1.02


def gib(size_B: int | None) -> str:
    """Bytes in GiB, two digits behind the point; what would be 0 then in MiB."""
    if size_B is None:
        return "n/a"
    return f"{size_B / (1 << 30):.2f} GiB" if abs(size_B) >= 1 << 27 else f"{size_B / (1 << 20):.1f} MiB"


def speed_score(configuration: Configuration) -> float:
    """Samples a second in units of no meaning: good for an order, until there are measurements."""
    work = (_RECOMPUTED if configuration.checkpointing else 1.0) * _OF_BITS.get(configuration.bits, 1.0)
    time = work + _FIXED / configuration.micro_batch
    return 1 / (time * (_OFFLOADED if configuration.offload else 1.0))


class Fitting:
    """Answers for one decision. ``expected`` is what a configuration will take, after all that was measured."""

    def __init__(self, space: Space, goal: Goal, trials: Sequence[Trial], predict: Predict) -> None:
        self.space, self.goal, self.trials, self.predict = space, goal, trials, predict
        self._known: dict[Configuration, int | None] = {}
        self._traced: list[tuple[int, int]] = []  # closed form, trace

    def expected(self, configuration: Configuration) -> int | None:
        """Bytes: measured if it was run, else predicted and corrected. None where nobody can say."""
        if configuration not in self._known:
            self._known[configuration] = self._expected(configuration)
        return self._known[configuration]

    def _expected(self, configuration: Configuration) -> int | None:
        measured = [t.peak_B for t in self._runs(configuration) if t.peak_B is not None]
        if measured:
            return max(measured)
        prediction = self.predict(configuration, False)
        if prediction is None:
            return None
        # Host memory is another thing than what is predicted: only what was measured says how they go together.
        steepest = math.inf if self.space.host else _STEEPEST
        points, full = self._points(configuration)
        points = points or self._traced
        size = corrected(prediction, [*points, full] if full is not None else points, steepest)
        if full is not None and prediction.expected >= full[0]:
            return max(size, full[1] + prediction.expected - full[0])
        return size

    def _runs(self, configuration: Configuration) -> list[Trial]:
        return [trial for trial in self.trials if trial.configuration.footprint == configuration.footprint]

    def _points(self, configuration: Configuration) -> tuple[list[tuple[int, int]], tuple[int, int] | None]:
        """Pairs of predicted and measured bytes, of runs of the same kind if there are any; and of the smallest run that
        was out of memory, which says no more than that it was too little."""
        known = [trial for trial in self.trials if trial.peak_B is not None or trial.outcome == "oom"]
        alike = [trial for trial in known if trial.configuration.bits == configuration.bits]
        points: dict[int, int] = {}
        full: tuple[int, int] | None = None
        for trial in alike or known:
            prediction = self.predict(trial.configuration, False)
            if prediction is None:
                continue
            x = prediction.expected
            if trial.peak_B is not None:
                points[x] = max(points.get(x, 0), trial.peak_B)
            elif full is None or x < full[0]:
                full = x, max(self.goal.budget_B, x) * 102 // 100
        return sorted(points.items()), full

    def fits(self, configuration: Configuration) -> bool:
        """Whether it fits, as far as is known."""
        runs = self._runs(configuration)
        if runs:
            return all(trial.fits for trial in runs)
        size = self.expected(configuration)
        margin = _HOST_MARGIN if self.space.host else _MARGIN
        return size is not None and size * (1 + margin) <= self.goal.budget_B and self.barred_by(configuration) is None

    def confirmed(self, configuration: Configuration) -> bool:
        """`fits` once more, by a trace where the closed form's bounds leave it open and nothing was measured yet.

        A trace takes as long as a short run: two at most, and each corrects the closed form of the others.
        """
        prediction = self.predict(configuration, False)
        open_ = prediction is not None and prediction.high > self.goal.budget_B and len(self._traced) < _TRACES
        if prediction is None or not open_ or self.trials or self.space.host or not self.fits(configuration):
            return self.fits(configuration)
        exact = self.predict(configuration, True)
        if exact is not None:
            self._traced.append((prediction.expected, exact.expected))
            self._known = {configuration: exact.expected}
        return self.fits(configuration)

    @property
    def traces(self) -> int:
        """How many were asked for."""
        return len(self._traced)

    def may_fit(self, configuration: Configuration) -> bool:
        """Whether the lower bound leaves hope."""
        size = self.expected(configuration)
        prediction = self.predict(configuration, False)
        if size is None or prediction is None:
            return False
        return min(size * _NEARLY, size - prediction.expected + prediction.low) <= self.goal.budget_B

    def was_run(self, configuration: Configuration) -> bool:
        """Whether there is a run of it already, with whatever learning rate."""
        return bool(self._runs(configuration))

    def barred_by(self, configuration: Configuration) -> Trial | None:
        """The run that failed, not for memory, for something that this one needs as well: what its diagnosis names, else
        everything that it changed of the script's own."""
        start, mine = self.space.start.as_dict(), configuration.as_dict()
        for trial in self.trials:
            if trial.outcome != "failed":
                continue
            if (fault := at_fault(trial)) is not None:
                if _needs(configuration, fault):
                    return trial
                continue
            theirs = trial.configuration.as_dict()
            changed = [n for n in start if theirs[n] != start[n] and n not in ("micro_batch", "accumulation")]
            if changed and all(mine[name] == theirs[name] for name in changed):
                return trial
        return None


def at_fault(trial: Trial) -> str | None:
    """The field of its configuration that a run failed for, where the diagnosis names one and the run had it."""
    field = _AT_FAULT.get(trial.diagnosis) if trial.outcome == "failed" else None
    return field if field is not None and _needs(trial.configuration, field) else None


def _needs(configuration: Configuration, field: str) -> bool:
    """Whether it has fewer bits (by bitsandbytes, 8 as 4), or states in host memory (by an operation that is compiled)."""
    return configuration.bits != 16 if field == "bits" else configuration.offload


def corrected(prediction: Prediction, points: Sequence[tuple[int, int]], steepest: float = _STEEPEST) -> int:
    """The prediction as the runs so far teach it: ``points`` are (predicted, measured).

    One run shifts it: upwards by all of its error, downwards by half, since a run of a few steps may not have met the
    longest batch. From two on the line through the nearest two says how the error grows, within reason (``steepest``).
    """
    x = prediction.expected
    if not points:
        return x
    near = sorted(points, key=lambda point: abs(point[0] - x))[:2]
    (x0, y0), *more = near
    if more and more[0][0] != x0:
        x1, y1 = more[0]
        slope = min(max((y1 - y0) / (x1 - x0), 0.1), steepest)
        return round(y0 + slope * (x - x0))
    error = y0 - x0
    return x + (error if error > 0 else error // 2)
