"""What to run next, and why: a pure function of the space, the goal, the predictions and the runs so far."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lorapatch.tune.configuration import Configuration
from lorapatch.tune.fitting import Fitting, at_fault, gib, speed_score
from lorapatch.tune.ladder import Rung, Space
from lorapatch.tune.learn import next_lesson
from lorapatch.tune.trial import Goal, Predict, Trial

__all__ = ["Decision", "Skipped", "decide", "winner"]

# A probe is three optimizer steps: the first makes the optimizer's states, the others are the steady ones.
PROBE_STEPS = 3
# A further probe has to promise this much more speed, and more when the last one was too large already; one of the other
# kind is worth a look when it is this near.
_GAIN, _GAIN_AFTER_A_MISS, _NEAR = 1.05, 1.3, 0.85
_ENOUGH = 3  # probes that fit


@dataclass(frozen=True)
class Skipped:
    """A configuration that was passed over without a run, what it was predicted to take, and why."""

    configuration: Configuration
    expected_B: int | None
    reason: str


@dataclass(frozen=True)
class Decision:
    """The next run (``configuration``, ``purpose`` "probe" or "learn", ``steps``), or the end of tuning.

    ``end`` is empty for a run, else "done", "limit", "nothing fits" or "failed".
    """

    reason: str
    configuration: Configuration | None = None
    purpose: str = ""
    steps: int = 0
    expected_B: int | None = None
    skipped: tuple[Skipped, ...] = ()
    end: str = ""


@dataclass(frozen=True)
class _Level:
    """What is left after some rungs: ``base``; its variants cost no quality, and none is smaller than ``smallest``."""

    base: Configuration
    rungs: tuple[Rung, ...]
    smallest: Configuration


def decide(space: Space, goal: Goal, trials: Sequence[Trial], predict: Predict) -> Decision:
    """The next step. The same arguments give the same decision."""
    if (limit := _limits(goal, trials)) is not None:
        return replace(limit, reason=limit.reason + _failures(trials, goal))
    if (hopeless := _hopeless(space, trials)) is not None:
        return hopeless
    trials = [trial for trial in trials if trial.counts]
    fitting = Fitting(space, goal, trials, predict)
    if predict(space.start, False) is None:
        found = _probe_blindly(space, goal, trials, fitting)
    else:
        found = _probe(space, goal, trials, fitting)
    if found is not None:
        return found
    best = best_probe(trials, goal)
    if best is None:
        return _nothing_fits(space, fitting)
    lesson = next_lesson(space, goal, trials, best, fitting)
    if lesson.configuration is None:
        return Decision(lesson.reason + _failures(trials, goal), end="done")
    expected = fitting.expected(lesson.configuration)
    return Decision(lesson.reason, lesson.configuration, "learn", lesson.steps, expected)


def winner(goal: Goal, trials: Sequence[Trial]) -> Trial | None:
    """The run whose configuration is the result: one that fits and learns, else the best that fits; None if none does."""
    too_large = {trial.configuration.footprint for trial in trials if trial.too_large}
    taught = [t for t in trials if t.purpose == "learn" and t.fits and t.configuration.footprint not in too_large]
    good = [trial for trial in taught if trial.learning.learns]
    if goal.prefer == "quality" and good:
        return min(good, key=lambda trial: (trial.final or math.inf, -trial.number))
    if good:
        return good[-1]
    usable = [t for t in taught if t.learning.state in ("weak", "flat", "unknown")]
    if usable:
        return min(usable, key=lambda trial: (trial.final or math.inf, -trial.number))
    return best_probe(trials, goal) if not taught else None


def best_probe(trials: Sequence[Trial], goal: Goal) -> Trial | None:
    """Of the runs that fit the one to go on with: the fastest, or the smallest. What later proved too large is out."""
    too_large = {trial.configuration.footprint for trial in trials if trial.too_large}
    fit = [t for t in trials if t.purpose == "probe" and t.fits and t.configuration.footprint not in too_large]
    if goal.prefer == "memory":
        return min(fit, key=lambda trial: (trial.measured_B or 0, trial.number), default=None)
    return max(fit, key=lambda trial: (trial.samples_per_s or 0.0, -trial.number), default=None)


# -- ends ------------------------------------------------------------------------------------------------------------


def _limits(goal: Goal, trials: Sequence[Trial]) -> Decision | None:
    spent = sum(trial.seconds for trial in trials)
    if len(trials) >= goal.max_runs:
        return Decision(f"the limit of {goal.max_runs} run{'s' * (goal.max_runs != 1)} is reached", end="limit")
    if goal.time_limit_s is not None and spent >= goal.time_limit_s:
        return Decision(f"the time limit of {goal.time_limit_s:.0f} s is reached, {spent:.0f} s were run", end="limit")
    started = next((trial for trial in reversed(trials) if trial.first_step_s is not None), None)
    if goal.time_limit_s is not None and started is not None and goal.time_limit_s - spent < (started.first_step_s or 0):
        left = f"{goal.time_limit_s - spent:.0f} s of the time limit of {goal.time_limit_s:.0f} s are left"
        took = f"run {started.number} took {started.first_step_s:.0f} s to its first step"
        return Decision(f"{left}, and {took}", end="limit")
    return None


def _hopeless(space: Space, trials: Sequence[Trial]) -> Decision | None:
    """A failure that has nothing to do with what was changed will come again."""
    for trial in trials:
        spared = at_fault(trial) == "offload" and space.without_offload is not None
        if trial.outcome == "failed" and not changed_fields(space.start, trial.configuration) and not spared:
            return Decision(f"run {trial.number} failed, and not for memory: {trial.cause}", end="failed")
    return None


def changed_fields(start: Configuration, other: Configuration) -> frozenset[str]:
    """The fields, sizes of a batch and learning rate aside, in which a configuration differs from the script's own."""
    aside = {"micro_batch", "accumulation", "learning_rate"}
    mine, theirs = start.as_dict(), other.as_dict()
    return frozenset(name for name in mine if mine[name] != theirs[name] and name not in aside)


def _nothing_fits(space: Space, fitting: Fitting) -> Decision:
    """The end, with the smallest there is, and what would fit if it had not failed."""
    levels = list(_levels(space, fitting))
    open_ = [level.smallest for level in levels if fitting.barred_by(level.smallest) is None]
    sizes = [(size, smallest) for smallest in open_ if (size := fitting.expected(smallest)) is not None]
    sentence = "nothing that was tried fits, and the ladder is at its end"
    if sizes:
        size, smallest = min(sizes, key=lambda pair: pair[0])
        words = smallest.unlike(space.start)
        sentence = f"nothing fits in {gib(fitting.goal.budget_B)}: the smallest, {words}, takes about {gib(size)}"
    sentence += _failures(fitting.trials, fitting.goal)
    return Decision(sentence, skipped=_passed_over(levels, fitting, None), end="nothing fits")


def _failures(trials: Sequence[Trial], goal: Goal) -> str:
    """What was lost on the way, not for memory, and what would bring it back; empty where nothing was."""
    said = ""
    for trial in trials:
        if trial.outcome == "failed":
            said += f"; run {trial.number} failed: {trial.cause.rstrip('.')}"
            said += f"; try `{trial.remedy}`" if trial.remedy else ""
            if trial.expected_B is not None and trial.expected_B <= goal.budget_B:
                said += f", and {gib(trial.expected_B)} are expected of {trial.configuration.words()}"
    return said


# -- going down, and up again ----------------------------------------------------------------------------------------


def _probe(space: Space, goal: Goal, trials: Sequence[Trial], fitting: Fitting) -> Decision | None:
    """The next memory probe; None when no further one promises anything."""
    if space.host and not trials:
        reason = "its memory is measured first: predictions are of a GPU, the budget is of host memory"
        return Decision(reason, space.start, "probe", PROBE_STEPS, fitting.expected(space.start))
    best = best_probe(trials, goal)
    if best is not None and any(trial.purpose == "learn" and trial.fits for trial in trials):
        return None  # it is learning already
    if best is not None:
        levels = list(_levels(space, fitting))
        chosen = _worth_a_look(_pool(space, goal, levels, fitting), best, trials, goal)
    else:
        levels, chosen = _first_to_fit(space, goal, fitting)
    if chosen is not None:
        level = next(level for level in levels if chosen in variants_of(space, level.base))
        reason = _why(goal, level, chosen, best, fitting)
        skipped = _passed_over(levels, fitting, level)
        return Decision(reason, chosen, "probe", PROBE_STEPS, fitting.expected(chosen), skipped)
    return _last_resort(levels, fitting) if best is None else None


def _first_to_fit(space: Space, goal: Goal, fitting: Fitting) -> tuple[list[_Level], Configuration | None]:
    """The most promising that fits; a trace on the way may show that it takes another rung."""
    while True:
        traces = fitting.traces
        levels = list(_levels(space, fitting))
        chosen = next((c for c in _pool(space, goal, levels, fitting) if fitting.confirmed(c)), None)
        if chosen is not None or fitting.traces == traces:
            return levels, chosen


def _pool(space: Space, goal: Goal, levels: Sequence[_Level], fitting: Fitting) -> list[Configuration]:
    """What fits and was not run yet, the most promising first."""
    found = [c for level in levels for c in _fitting(space, level, fitting) if not fitting.was_run(c)]
    if goal.prefer == "memory":
        return sorted(found, key=lambda c: (fitting.expected(c) or 0, -speed_score(c)))
    return sorted(found, key=lambda c: (-speed_score(c), fitting.expected(c) or 0))


def _worth_a_look(
    pool: Sequence[Configuration], best: Trial, trials: Sequence[Trial], goal: Goal
) -> Configuration | None:
    """A further probe, when it may be faster than the best so far."""
    measured = [trial for trial in trials if trial.purpose == "probe" and trial.fits]
    if goal.prefer == "memory" or len(measured) >= _ENOUGH:
        return None
    mine = speed_score(best.configuration)
    missed = any(trial.too_large for trial in trials if trial.number > best.number)
    kinds = {trial.configuration.checkpointing for trial in measured}
    for other in pool:
        if speed_score(other) > (_GAIN_AFTER_A_MISS if missed else _GAIN) * mine:
            return other
        # The score is rough: of the two kinds, with and without checkpointing, each is measured when they are near.
        if not missed and speed_score(other) > _NEAR * mine and other.checkpointing not in kinds:
            return other
    return None


def _why(goal: Goal, level: _Level, chosen: Configuration, best: Trial | None, fitting: Fitting) -> str:
    size = fitting.expected(chosen)
    fits = f"{gib(size)} of {gib(goal.budget_B)} are expected" if size is not None else "nobody can predict it"
    if best is not None:
        return f"there may be more speed in it than in run {best.number}, and it should fit: {fits}"
    given_up = ", ".join(rung.label for rung in level.rungs)
    what = {"memory": "smallest", "speed": "fastest", "quality": "fastest"}[goal.prefer]
    if given_up:
        return f"without {given_up} nothing fits; with it this is the {what} that should: {fits}"
    return f"the {what} that should fit with nothing given up: {fits}"


def _last_resort(levels: Sequence[_Level], fitting: Fitting) -> Decision | None:
    """Nothing is expected to fit; the smallest is tried all the same where the lower bound leaves room for it.

    Of host memory one run says nothing yet about another: the smallest that costs no quality is the second to measure.
    """
    first = levels[0].smallest
    if fitting.space.host and len(fitting.trials) == 1 and not fitting.was_run(first):
        reason = "a second measurement, of the smallest that costs no quality: how host memory grows is not known yet"
        return Decision(reason, first, "probe", PROBE_STEPS, fitting.expected(first))
    left = [level.smallest for level in levels if not fitting.was_run(level.smallest)]
    left = [smallest for smallest in left if fitting.barred_by(smallest) is None and fitting.expected(smallest) is not None]
    if not left:
        return None
    smallest = min(left, key=lambda configuration: fitting.expected(configuration) or 0)
    size = fitting.expected(smallest)
    if not fitting.may_fit(smallest):
        return None
    reason = f"nothing is expected to fit, this comes nearest: {gib(size)}"
    skipped = _passed_over(levels, fitting, None)
    return Decision(reason, smallest, "probe", PROBE_STEPS, size, skipped)


def _levels(space: Space, fitting: Fitting) -> Iterator[_Level]:
    """The script's own level, then one rung after another, until one has something that fits; and then those that would
    have sufficed in the last one's place and may be faster."""
    by_bytes = space.order == "bytes"
    left = [rung for rung in space.rungs if not by_bytes or rung.name not in _VARIED]
    level = _level(space, space.start, (), fitting)
    while True:
        yield level
        below = [] if fitting.fits(level.smallest) else list(_below(space, level, left, fitting))
        enough = [pair for pair in below if fitting.fits(pair[1].smallest)]
        if by_bytes and enough:
            yield from _by_bytes(enough, level, fitting)
            return
        if not below:
            return
        if by_bytes:
            # Of what does not suffice by itself: first what costs no quality, then what saves most.
            below.sort(key=lambda pair: (pair[0].costs == "quality", -_saved(level, pair[1], fitting)))
        rung, level = below[0]
        left.remove(rung)


def _below(
    space: Space, level: _Level, rungs: Sequence[Rung], fitting: Fitting
) -> Iterator[tuple[Rung, _Level]]:
    """The levels one rung down, each with its rung; by bytes, only those that save some."""
    for rung in rungs:
        base = rung.on(level.base)
        if base is not None:
            lower = _level(space, base, (*level.rungs, rung), fitting)
            if fitting.barred_by(lower.smallest) is not None:
                continue  # what it needs has failed, in every variant
            if space.order == "written" or _saved(level, lower, fitting) > 0:
                yield rung, lower


_VARIED = ("micro_batch", "gradient_checkpointing")


def _by_bytes(enough: Sequence[tuple[Rung, _Level]], level: _Level, fitting: Fitting) -> Iterator[_Level]:
    """Those that suffice, the one that gives up least first."""
    order = sorted(enough, key=lambda pair: (pair[0].costs == "quality", _saved(level, pair[1], fitting)))
    yield from (lower for rung, lower in order[:1])
    if fitting.goal.prefer == "speed":
        yield from (lower for rung, lower in order[1:] if rung.costs == order[0][0].costs)


def _saved(level: _Level, lower: _Level, fitting: Fitting) -> int:
    """Bytes between the smallest variants of two levels."""
    return (fitting.expected(level.smallest) or 0) - (fitting.expected(lower.smallest) or 0)


def _level(space: Space, base: Configuration, rungs: tuple[Rung, ...], fitting: Fitting) -> _Level:
    kinds = list(variants_of(space, base))
    kinds = [kind for kind in kinds if fitting.barred_by(kind) is None] or kinds
    return _Level(base, rungs, min(kinds, key=lambda c: (c.micro_batch, not c.checkpointing, not c.offload)))


def _fitting(space: Space, level: _Level, fitting: Fitting) -> Iterator[Configuration]:
    """The variants that fit. Of each kind the micro-batch goes up until one does not: nothing larger is asked about."""
    too_large: set[tuple[bool, str | None]] = set()
    for variant in variants_of(space, level.base):
        kind = variant.checkpointing, variant.deepspeed
        if kind not in too_large and fitting.fits(variant):
            yield variant
        else:
            too_large.add(kind)


def variants_of(space: Space, base: Configuration) -> Iterator[Configuration]:
    """``base`` with every micro-batch, with and without checkpointing and offload: what changes speed and memory alone.

    A ladder that goes by its written order takes micro-batches downwards only on a rung of it.
    """
    names = {rung.name for rung in space.rungs}
    by_bytes = space.order == "bytes"
    sizes = [s for s in space.micro_batches if s >= base.micro_batch or (by_bytes and "micro_batch" in names)]
    checkpointing = {base.checkpointing} if not by_bytes else {base.checkpointing, False}
    if by_bytes and "gradient_checkpointing" in names:
        checkpointing.add(True)
    files = [(base.deepspeed, base.offload)]
    if base.deepspeed == space.start.deepspeed and space.without_offload is not None:
        files.append((space.without_offload, False))
    for file, offload in files:
        for on in sorted(checkpointing):
            for size in sizes:
                yield replace(base.with_micro_batch(size), checkpointing=on, deepspeed=file, offload=offload)


def _passed_over(levels: Sequence[_Level], fitting: Fitting, chosen: _Level | None) -> tuple[Skipped, ...]:
    """The smallest of each level that was left behind because nothing in it fits."""
    found = []
    for level in levels:
        if level is not chosen and not fitting.fits(level.smallest) and not fitting.was_run(level.smallest):
            size = fitting.expected(level.smallest)
            sentence = f"even this is expected to take {gib(size)}, the budget is {gib(fitting.goal.budget_B)}"
            found.append(Skipped(level.smallest, size, sentence))
    said = {item.configuration for item in found}
    for rung in fitting.space.rungs:
        base = rung.on(fitting.space.start)
        failed = fitting.barred_by(base) if base is not None and not fitting.was_run(base) else None
        if base is not None and failed is not None and base not in said and fitting.barred_by(fitting.space.start) is None:
            found.append(Skipped(base, fitting.expected(base), f"run {failed.number} failed: {failed.cause}"))
    return tuple(found)


def _probe_blindly(space: Space, goal: Goal, trials: Sequence[Trial], fitting: Fitting) -> Decision | None:
    """Without predictions: the script's own, then down the ladder as written until one fits; up by what was measured."""
    why = "nobody can predict this script's memory"
    best = best_probe(trials, goal)
    run = {trial.configuration for trial in trials}
    if best is not None:
        double = best.configuration.micro_batch * 2
        room = best.measured_B is not None and 2 * best.measured_B <= goal.budget_B
        if goal.prefer == "memory" or double not in space.micro_batches or not room:
            return None
        larger = best.configuration.with_micro_batch(double)
        reason = f"twice the micro-batch takes at most twice the memory of run {best.number}"
        return None if larger in run else Decision(reason, larger, "probe", PROBE_STEPS)
    configuration, left = space.start, list(space.rungs)
    while configuration in run and left:
        lower = left.pop(0).on(configuration)
        if lower is not None and fitting.barred_by(lower) is None:
            configuration = lower
    if configuration in run:
        return None
    return Decision(f"{why}: the next rung down" if trials else why, configuration, "probe", PROBE_STEPS)
