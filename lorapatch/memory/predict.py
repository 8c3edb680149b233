"""One run's memory with its bounds: traced, or by arithmetic; allocated, reserved, and as nvidia-smi shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lorapatch.errors import LorapatchError
from lorapatch.memory.allocator import WASTEFUL
from lorapatch.memory.cache import remembered
from lorapatch.memory.cards import Card
from lorapatch.memory.closed_form import closed_form
from lorapatch.memory.history import correction
from lorapatch.memory.model import Breakdown, Bytes, RunSetup, Side
from lorapatch.memory.setup import Described
from lorapatch.memory.versions import versions_of

__all__ = ["Predictor", "largest_micro_batch"]

# Relative uncertainty of what is allocated: a trace; arithmetic that knows the model and the samples; one that guesses.
_TRACED, _COUNTED, _GUESSED = 0.02, 0.12, 0.4
# Reserved over allocated where no allocator was replayed, and its bounds. Measured on an H200: 1.05 to 1.20 by the
# embedded trainer and by MGM with expandable segments, 1.14 to 2.2 by MGM without them.
_RESERVED = {"upstream": (1.05, 1.3, 2.2)}
_RESERVED_USUALLY = (1.03, 1.12, 1.25)
_MOST = 4096  # micro-batches above are not looked for


@dataclass(frozen=True)
class Predictor:
    """Predicts for one card, or ``budget`` bytes of it; ``fast``: by arithmetic alone."""

    card: Card
    fast: bool
    budget: int | None = None

    def side(self, described: Described) -> Side:
        """The run's memory. A trace that fails gives way to arithmetic, and says so."""
        counted = self._counted(described, described.setup)
        breakdown, notes = (counted, ()) if self.fast else self._traced(described, described.setup, counted)
        traced = breakdown is not counted
        shown = replace(
            breakdown,
            assumed=tuple(dict.fromkeys((*notes, *described.assumed, *breakdown.assumed))),
            not_modelled=tuple(dict.fromkeys((*described.not_modelled, *breakdown.not_modelled))),
        )
        below = counted.allocated - self._counted(described, described.low).allocated
        above = self._counted(described, described.high).allocated - counted.allocated
        spread = _TRACED if traced else _COUNTED if described.sure else _GUESSED
        expected = breakdown.allocated
        low, high = (expected - below) * (1 - spread), (expected + above) * (1 + spread)
        allocated = Bytes(round(max(low, 0)), expected, round(high))
        reserved = self._reserved(described.setup, breakdown, allocated)
        return Side(described.setup, shown, allocated, reserved, self._device(described.setup, breakdown, reserved))

    def _counted(self, described: Described, setup: RunSetup) -> Breakdown:
        return closed_form(setup, self.card.workspace, versions_of(described.python).get("transformers", ""))

    def _traced(
        self, described: Described, setup: RunSetup, counted: Breakdown
    ) -> tuple[Breakdown, tuple[str, ...]]:
        from lorapatch.memory.trace import trace

        python, gpu = described.python, self.card.traced_as
        capacity = self._capacity(setup)
        told = {**versions_of(python), "gpu": gpu, "capacity": str(capacity)}
        try:
            found = remembered(setup, told, lambda: trace(setup, python=python, gpu=gpu, capacity=capacity))
        except LorapatchError as error:
            return counted, (f"the trace failed, so it is counted by the closed form: {error}",)
        return found, ()

    def _reserved(self, setup: RunSetup, breakdown: Breakdown, allocated: Bytes) -> Bytes:
        ratios = _RESERVED.get(setup.trainer, _RESERVED_USUALLY)
        if breakdown.reserved is None:
            each = zip(allocated, ratios, strict=True)
            return Bytes(*(self._within(setup, bytes_, bytes_ * ratio) for bytes_, ratio in each))
        expected = max(breakdown.reserved, allocated.expected)
        over = expected / max(allocated.expected, 1)
        low, high = allocated.low * max(1.0, 1 + (over - 1) / 2), allocated.high * (1 + (over - 1) * 1.5)
        if setup.lengths:  # by the order in which they come; in a short run perhaps the longest first
            low, high = allocated.low * _RESERVED_USUALLY[0], max(high, breakdown.reserved_high or high)
        return Bytes(round(min(low, expected)), expected, max(self._within(setup, allocated.high, high), expected))

    def _within(self, setup: RunSetup, allocated: float, reserved: float) -> int:
        """Where room is short the allocator gives cached blocks back: more than the card is reserved only if it must."""
        return round(min(reserved, max(self._capacity(setup), allocated * _RESERVED_USUALLY[0])))

    def _capacity(self, setup: RunSetup) -> int:
        """Bytes of the card, or of the budget, that PyTorch's allocator can have."""
        return min(self.budget or self.card.memory, self.card.memory) - self._beside(setup).expected

    def _device(self, setup: RunSetup, breakdown: Breakdown, reserved: Bytes) -> Bytes:
        factor = correction(self.card.name, breakdown.way)
        low, expected, high = (round((a + b) * factor) for a, b in zip(reserved, self._beside(setup), strict=True))
        return Bytes(low, expected, high)

    def _beside(self, setup: RunSetup) -> Bytes:
        """Device memory of the process that PyTorch's allocator does not see."""
        stage = setup.zero.stage if setup.zero is not None else 3  # DistributedDataParallel has one group, as ZeRO-3
        communicators = 0 if setup.zero is None and setup.gpus == 1 else 1 if stage == 3 else 2
        return self.card.overhead(communicators=communicators, alone=setup.gpus == 1)

    def counted_at(self, described: Described, micro_batch: int, over: float | None = None) -> int:
        """Expected device memory at another micro-batch by arithmetic, on a card that is large enough; bytes.

        ``over``: what is reserved over what is allocated, by default what is usual.
        """
        setup = replace(described.setup, micro_batch=micro_batch)
        over = _RESERVED.get(setup.trainer, _RESERVED_USUALLY)[1] if over is None else over
        return round(self._counted(described, setup).allocated * over) + self._beside(setup).expected

    def traced_at(self, described: Described, micro_batch: int) -> int:
        """Expected device memory at another micro-batch by a trace, in bytes."""
        setup = replace(described.setup, micro_batch=micro_batch)
        breakdown = self._traced(described, setup, self._counted(described, setup))[0]
        expected = Bytes(breakdown.allocated, breakdown.allocated, breakdown.allocated)
        return self._device(setup, breakdown, self._reserved(setup, breakdown, expected)).expected


def largest_micro_batch(
    predictor: Predictor, described: Described, side: Side, budget: int, *, confirm: bool
) -> int:
    """The largest micro-batch whose expected device memory is within ``budget`` bytes; 0 if none is.

    The closed form follows how memory grows; it is corrected by how far it is off where ``side`` (and with ``confirm`` one
    more trace, at the answer) knows better.
    """

    first = described.setup.micro_batch
    fits = first if side.device.expected <= budget else 0
    off = side.device.expected / predictor.counted_at(described, first)
    found = _search(lambda size: predictor.counted_at(described, size) * off <= budget)
    if not confirm or predictor.fast or side.breakdown.way == "closed form":
        return max(found, fits)
    if found not in (0, first):
        then = predictor.traced_at(described, found) / predictor.counted_at(described, found)
        slope = (then - off) / (found - first)
        found = _search(lambda size: predictor.counted_at(described, size) * (off + slope * (size - first)) <= budget)
    return _with_blocks_given_back(predictor, described, side, budget, max(found, fits))


def _with_blocks_given_back(predictor: Predictor, described: Described, side: Side, budget: int, found: int) -> int:
    """More than ``found``, where that much is reserved only because there is room: at most two traces tell."""
    if side.reserved.expected < WASTEFUL * side.allocated.expected:
        return found
    off = side.allocated.expected / predictor.counted_at(described, side.setup.micro_batch, over=1.0)
    most = _search(lambda size: predictor.counted_at(described, size, over=_RESERVED_USUALLY[0]) * off <= budget)
    for size in (most, (most + found) // 2):
        if size > found and predictor.traced_at(described, size) <= budget:
            return size
    return found


def _search(fits: Callable[[int], bool]) -> int:
    """The last size from 1 on that fits, by doubling and halving."""
    if not fits(1):
        return 0
    low = 1
    while fits(2 * low):
        low *= 2
        if low >= _MOST:
            return _MOST
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
