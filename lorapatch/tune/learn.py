"""The next learning run, from what the ones so far have shown. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorapatch.lora.flags import ALL_MODULES
from lorapatch.tune.configuration import Configuration
from lorapatch.tune.fitting import Fitting, gib
from lorapatch.tune.ladder import Space
from lorapatch.tune.trial import Goal, Trial

__all__ = ["Lesson", "next_lesson"]

_TOO_HIGH = ("nan", "diverging", "spiking")
_DOWN = 10.0
_UP = (5.0, 10.0)
_LOWEST = 1e-4  # of the script's own learning rate
_APART = 2.0  # two learning rates nearer than that are the same
_LARGEST_RANK = 128


@dataclass(frozen=True)
class Lesson:
    """A learning run to do; without a configuration there is none, and ``reason`` says why."""

    reason: str
    configuration: Configuration | None = None
    steps: int = 0


def next_lesson(space: Space, goal: Goal, trials: Sequence[Trial], best: Trial, fitting: Fitting) -> Lesson:
    """What to teach next to the configuration of ``best``, the probe to go on with."""
    lessons = [trial for trial in trials if trial.purpose == "learn"]
    if not lessons:
        first = goal.steps[0]
        return Lesson(f"run {best.number} is the one to go on with: is it stable in {first} steps?", best.configuration, first)
    last = lessons[-1]
    if last.outcome == "failed":
        return Lesson(f"run {last.number} failed: {last.cause}")
    if not last.fits:
        taught = [trial for trial in lessons if trial.fits and trial.configuration.footprint == best.configuration.footprint]
        if taught:  # it was a larger one that did not fit
            return _raise(space, lessons, taught[-1], fitting)
        again = replace(best.configuration, learning_rate=last.configuration.learning_rate)
        return Lesson(f"run {last.number} did not fit after all; the next best is run {best.number}", again, last.steps)
    state, sentence = last.learning.state, last.learning.sentence
    if state == "zero":
        return Lesson(f"run {last.number}: {sentence}")
    if state in _TOO_HIGH and not any(trial.fits and trial.learning.learns for trial in lessons):
        return _lower(space, lessons, last, sentence)
    longer = next((steps for steps in goal.steps if steps > last.steps), None)
    if longer is not None and state not in _TOO_HIGH and (state != "falling" or last.steps == goal.steps[0]):
        what = "it falls; does it go on" if state == "falling" else "that is too short to tell; more"
        return Lesson(f"run {last.number}: {sentence}; {what} in {longer} steps?", last.configuration, longer)
    if state == "falling" and goal.prefer != "quality":
        return Lesson(f"run {last.number} fits and learns: {sentence}")
    return _raise(space, lessons, last, fitting)


def _lower(space: Space, lessons: Sequence[Trial], last: Trial, sentence: str) -> Lesson:
    """A smaller learning rate: a tenth, or half way to one that was too small."""
    rate = last.configuration.learning_rate
    too_high = min(rate, *(t.configuration.learning_rate for t in lessons if t.learning.state in _TOO_HIGH))
    below = [t.configuration.learning_rate for t in lessons if t.fits and t.learning.state not in _TOO_HIGH]
    enough = max((other for other in below if other < too_high), default=None)
    lower = too_high / _DOWN if enough is None else _rounded(math.sqrt(enough * too_high))
    if enough is not None and too_high / enough <= _APART**2:
        return Lesson(f"run {last.number}: {sentence}; between {enough:g} and {too_high:g} there is no room")
    if lower < space.start.learning_rate * _LOWEST:
        return Lesson(f"run {last.number}: {sentence}; a learning rate of {rate:g} is not what is wrong")
    lower = _rounded(lower)
    return Lesson(
        f"run {last.number}: {sentence}; {rate:g} is too high, {lower:g} is next",
        replace(last.configuration, learning_rate=lower),
        last.steps,
    )


def _raise(space: Space, lessons: Sequence[Trial], last: Trial, fitting: Fitting) -> Lesson:
    """The expressive side: five and ten times the learning rate, twice the rank, all seven modules."""
    judged = [trial for trial in lessons if trial.fits and trial.steps == last.steps and trial.final is not None]
    best = min(judged, key=lambda trial: (trial.final or 0.0, trial.number), default=last)
    base = best.configuration
    first = next((t.configuration.learning_rate for t in lessons if t.learning.state not in _TOO_HIGH), base.learning_rate)
    too_high = min(
        (t.configuration.learning_rate for t in lessons if t.learning.state in _TOO_HIGH), default=math.inf
    )
    if best.learning.learns and best is not last and not _better(last, best):
        return Lesson(f"run {last.number} is no better than run {best.number}: nothing improves any more")
    tried = {trial.configuration for trial in lessons}
    closed = []
    for what, candidate in _expressive(base, first, space):
        if candidate in tried or candidate.learning_rate >= too_high:
            continue
        size = fitting.expected(candidate)
        if size is not None and not fitting.fits(candidate) and candidate.footprint != base.footprint:
            closed.append(f"{what} would take {gib(size)}")
            continue
        return Lesson(f"run {last.number}: {last.learning.sentence}; next is {what}", candidate, last.steps)
    more = f" ({'; '.join(closed)})" if closed else ""
    return Lesson(f"nothing more to try{more}; the best is run {best.number}: {best.learning.sentence}")


def _expressive(base: Configuration, first_rate: float, space: Space) -> list[tuple[str, Configuration]]:
    found = []
    for factor in _UP:
        rate = _rounded(first_rate * factor)
        if rate < 1:
            found.append((f"{factor:g} times the learning rate, {rate:g}", replace(base, learning_rate=rate)))
    if space.takes_rank and base.r * 2 <= min(_LARGEST_RANK, space.start.r * 2):
        found.append((f"rank {base.r * 2}", replace(base, r=base.r * 2, alpha=base.alpha * 2)))
    seven = ",".join(ALL_MODULES)
    names = set((base.target_modules or "").split(","))
    if space.takes_modules and base.target_modules not in (None, "all-linear") and names < set(ALL_MODULES):
        found.append(("LoRA on all seven modules", replace(base, target_modules=seven)))
    return found


def _better(new: Trial, old: Trial) -> bool:
    """Whether the loss ends lower, by more than the noise."""
    mine, theirs = new.learning, old.learning
    if new.final is None or old.final is None:
        return new.final is not None
    return new.final < old.final - max(mine.noise or 0.0, theirs.noise or 0.0)


def _rounded(rate: float) -> float:
    """Two digits: 0.000063."""
    return float(f"{rate:.2g}")
