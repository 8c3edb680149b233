"""Does it learn? The loss of a short run, fitted over its steps with its noise: a pure function of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["Learning", "judge"]

# Two-sided 95 % of the normal distribution, and what makes a median absolute deviation a standard deviation.
_Z, _MAD = 1.96, 1.4826
_SPIKE = 6.0  # deviations above the line
# A rise or fall that is less than this share of the loss is not worth its name, however sure.
_WORTH = 0.02


@dataclass(frozen=True)
class Learning:
    """``state``: "falling", "weak", "flat", "spiking", "diverging", "nan", "zero" or "unknown"; ``sentence`` has the figures.

    ``slope`` is the change of the loss in a step with its 95 % interval, ``noise`` the standard deviation around the line,
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


def judge(losses: Sequence[float]) -> Learning:
    """What ``losses``, one a step, say.

    The slope is Theil's and Sen's median of all pairwise slopes, its interval Sen's (1968), by the normal approximation
    of Kendall's statistic: neither a spike nor the first steps of a warm-up can carry it away.
    """
    bad = next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if bad is not None:
        return Learning("nan", f"the loss is {losses[bad - 1]} at step {bad}")
    if losses and not any(losses):
        return Learning("zero", "the loss is exactly 0: no label is left")
    if len(losses) < 4:
        return Learning("unknown", f"{len(losses)} steps are too few to say")
    slope, low, high = _slope(losses)
    start = median(loss - slope * step for step, loss in enumerate(losses))
    rest = [loss - start - slope * step for step, loss in enumerate(losses)]
    noise = _MAD * median(abs(value) for value in rest)
    final = start + slope * (len(losses) - 1)
    state, sentence = _state(losses, slope, (low, high), noise, rest)
    return Learning(state, sentence, slope, low, high, noise, final)


def _slope(losses: Sequence[float]) -> tuple[float, float, float]:
    """The median of all pairwise slopes and its 95 % interval."""
    n = len(losses)
    slopes = sorted((losses[j] - losses[i]) / (j - i) for i in range(n) for j in range(i + 1, n))
    spread = _Z * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    count = len(slopes)
    low = max(0, math.floor((count - spread) / 2) - 1)  # Sen counts from 1
    high = min(count - 1, math.ceil((count + spread) / 2))
    return median(slopes), slopes[low], slopes[high]


def _state(
    losses: Sequence[float], slope: float, interval: tuple[float, float], noise: float, rest: Sequence[float]
) -> tuple[str, str]:
    low, high = interval
    steps = len(losses) - 1
    third = max(1, len(losses) // 3)
    first, last = median(losses[:third]), median(losses[-third:])
    change = slope * steps
    figures = (
        f"{slope:+.3g} a step (95 % between {low:+.3g} and {high:+.3g}), noise {noise:.2g},"
        f" {losses[0]:.4g} to {losses[-1]:.4g} in {len(losses)} steps"
    )
    level = max(abs(first), 1e-12)
    if (low > 0 and change > max(noise, _WORTH * level)) or last > 2 * first and last > first + 1:
        return "diverging", f"the loss rises: {figures}"
    jump = next((step for step in range(1, len(losses)) if losses[step] > 2 * max(losses[:step])), None)
    if jump is not None and last > max(losses[:jump]):
        return "spiking", f"the loss jumps to {losses[jump]:.4g} at step {jump + 1} and has not come back: {figures}"
    peak = max(range(len(rest)), key=lambda step: rest[step])
    # A spike stands above everything that came before it: the fall of a good start is no spike.
    if rest[peak] > max(_SPIKE * noise, 0.5 * level) and losses[peak] > 1.5 * max(losses[:peak] or [math.inf]):
        return "spiking", f"the loss jumps to {losses[peak]:.4g} at step {peak + 1}, else: {figures}"
    if high < 0 and -change > max(noise, _WORTH * level):
        return "falling", f"the loss falls: {figures}"
    if high < 0:
        return "weak", f"the loss falls, but by less than its noise: {figures}"
    return "flat", f"the loss does not move beyond its noise: {figures}"
