"""Does it learn? The loss of a short run, fitted over its steps with its noise: a pure function of numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["FEWEST", "Learning", "judge"]

# How likely chance alone may make a trend that is believed (one-sided), and the interval that goes with it: 90 %.
_CHANCE, _Z = 0.05, 1.645
FEWEST = 4  # losses: of three even a perfect fall comes about by chance in one of six
_EXACT = 10  # up to here Kendall's statistic is counted out, above it is as good as normal
_MAD = 1.4826  # makes a median absolute deviation a standard deviation
_SPIKE = 6.0  # deviations above the line
# A rise or fall that is less than this share of the loss is not worth its name, however sure.
_WORTH = 0.02


@dataclass(frozen=True)
class Learning:
    """``state``: "falling", "weak", "flat", "spiking", "diverging", "nan", "zero" or "unknown"; ``sentence`` has the figures.

    ``slope`` is the change of the loss in a step with its 90 % interval, ``noise`` the standard deviation around the line,
    ``final`` the line's value at the last step.
    """

    state: str
    sentence: str
    slope: float | None = None
    low: float | None = None
    high: float | None = None
    noise: float | None = None
    final: float | None = None

    @property
    def learns(self) -> bool:
        """Whether the loss falls as it should."""
        return self.state == "falling"


@dataclass(frozen=True)
class _Line:
    """The fit: ``rest`` are the losses without it, ``falls`` and ``rises`` how likely chance makes such a fall or rise."""

    slope: float
    low: float
    high: float
    noise: float
    final: float
    rest: Sequence[float]
    falls: float
    rises: float


def judge(losses: Sequence[float], rates: Sequence[float | None] = ()) -> Learning:
    """What ``losses``, one a step, say; ``rates`` are the learning rates that were logged with them, as far as they were.

    Whether there is a trend is Mann's test (Econometrica 13, 1945; Kendall, Rank Correlation Methods, 1970, with ties):
    it counts the pairs of losses of which the later is the lower, so neither a spike nor the fall's shape matters, and
    its chances are exact for few steps. How large it is: the median of all pairwise slopes (Theil 1950) with the interval
    of Sen (J. Am. Stat. Assoc. 63, 1968). Steps of a warm-up that begins at a learning rate of 0 change no weight: the
    losses before the first real one are all of the same model, and are left out.
    """
    bad = next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if bad is not None:
        return Learning("nan", f"the loss is {losses[bad - 1]} at step {bad}")
    if losses and not any(losses):
        return Learning("zero", "the loss is exactly 0: no label is left")
    idle = _idle(rates) if len(rates) == len(losses) else 0
    moved = losses[idle:]
    if len(moved) < FEWEST:
        aside = f", {idle} at a learning rate of 0 not counted" if idle else ""
        return Learning("unknown", f"{_steps(len(moved))} {'is' if len(moved) == 1 else 'are'} too few to say{aside}")
    line = _fit(moved)
    state, sentence = _state(moved, line, idle)
    return Learning(state, sentence, line.slope, line.low, line.high, line.noise, line.final)


def _idle(rates: Sequence[float | None]) -> int:
    """How many steps at the beginning had a learning rate of 0."""
    return next((number for number, rate in enumerate(rates) if rate != 0), len(rates))


def _steps(number: int) -> str:
    return f"{number} step{'s' * (number != 1)}"


def _fit(losses: Sequence[float]) -> _Line:
    n = len(losses)
    slopes = sorted((losses[j] - losses[i]) / (j - i) for i in range(n) for j in range(i + 1, n))
    spread = _Z * math.sqrt(_spread(n) / 18)
    low = max(0, math.floor((len(slopes) - spread) / 2) - 1)  # Sen counts from 1
    high = min(len(slopes) - 1, math.ceil((len(slopes) + spread) / 2))
    slope = median(slopes)
    start = median(loss - slope * step for step, loss in enumerate(losses))
    rest = [loss - start - slope * step for step, loss in enumerate(losses)]
    noise = _MAD * median(abs(value) for value in rest)
    up = sum((slope > 0) - (slope < 0) for slope in slopes)
    ties = list(Counter(losses).values())
    final = start + slope * (n - 1)
    return _Line(slope, slopes[low], slopes[high], noise, final, rest, _chance(ties, -up), _chance(ties, up))


def _chance(ties: Sequence[int], excess: int) -> float:
    """How likely losses in random order have at least ``excess`` more pairs that go one way than the other.

    ``ties`` are the sizes of the groups of equal losses (all 1 without any).
    """
    n = sum(ties)
    if n > _EXACT:
        variance = (_spread(n) - sum(_spread(k) for k in ties)) / 18
        return 0.5 * math.erfc((excess - 1) / math.sqrt(2 * variance)) if variance > 0 else 1.0
    orders = _orders(ties)
    fewest = (len(orders) - 1 + excess + 1) // 2  # of the pairs that are no ties, those that go that way
    return sum(orders[max(0, fewest) :]) / sum(orders)


def _spread(n: int) -> int:
    return n * (n - 1) * (2 * n + 5)


def _orders(ties: Sequence[int]) -> list[int]:
    """How many orders of a multiset have 0, 1, 2, … inversions: MacMahon's q-multinomial coefficient [n]! / Π [tie]!."""
    orders = [1]
    for k in range(2, sum(ties) + 1):  # times 1 + q + … + q^(k-1)
        orders = [sum(orders[max(0, i - k + 1) : i + 1]) for i in range(len(orders) + k - 1)]
    for k in (k for tie in ties for k in range(2, tie + 1)):  # and divided by it
        quotient: list[int] = []
        for i in range(len(orders) - k + 1):
            quotient.append(orders[i] - sum(quotient[max(0, i - k + 1) : i]))
        orders = quotient
    return orders


def _state(losses: Sequence[float], line: _Line, idle: int) -> tuple[str, str]:
    third = max(1, len(losses) // 3)
    first, last = median(losses[:third]), median(losses[-third:])
    change = line.slope * (len(losses) - 1)
    figures = (
        f"{line.slope:+.3g} a step (90 % between {line.low:+.3g} and {line.high:+.3g}), noise {line.noise:.2g},"
        f" {losses[0]:.4g} to {losses[-1]:.4g} in {_steps(len(losses))}"
    )
    level = max(abs(first), 1e-12)
    worth = max(line.noise, _WORTH * level)
    if (line.rises <= _CHANCE and change > worth) or last > 2 * first and last > first + 1:
        return "diverging", f"the loss rises: {figures}"
    jump = next((step for step in range(1, len(losses)) if losses[step] > 2 * max(losses[:step])), None)
    if jump is not None and last > max(losses[:jump]):
        where = f"jumps to {losses[jump]:.4g} at step {idle + jump + 1}"
        return "spiking", f"the loss {where} and has not come back: {figures}"
    peak = max(range(len(losses)), key=lambda step: line.rest[step])
    # A spike stands above everything that came before it: the fall of a good start is no spike.
    if line.rest[peak] > max(_SPIKE * line.noise, 0.5 * level) and losses[peak] > 1.5 * max(losses[:peak] or [math.inf]):
        return "spiking", f"the loss jumps to {losses[peak]:.4g} at step {idle + peak + 1}, else: {figures}"
    if line.falls > _CHANCE:
        return "flat", f"the loss does not move beyond its noise: {figures}"
    if -change > worth:
        return "falling", f"the loss falls: {figures}"
    return "weak", f"the loss falls, but by less than its noise: {figures}"
