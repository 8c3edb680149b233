"""One run's memory with its bounds: traced, or by arithmetic; allocated, reserved, and as nvidia-smi shows it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from lorapatch.errors import LorapatchError
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


def allocator_settings() -> dict[str, str]:
    """What the environment says to PyTorch's allocator: the replay heeds it."""
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    return {name: os.environ[name] for name in names if name in os.environ}


@dataclass(frozen=True)
class Predictor:
    """Predicts for one card; ``fast``: by arithmetic alone."""

    card: Card
    fast: bool

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
        told = {**versions_of(python), "gpu": gpu, **allocator_settings()}
        try:
            found = remembered(setup, told, lambda: trace(setup, python=python, gpu=gpu))
        except LorapatchError as error:
            return counted, (f"the trace failed, so it is counted by the closed form: {error}",)
        return found, ()

    def _reserved(self, setup: RunSetup, breakdown: Breakdown, allocated: Bytes) -> Bytes:
        ratios = _RESERVED.get(setup.trainer, _RESERVED_USUALLY)
        if breakdown.reserved is None:
            return Bytes(*(round(bytes_ * ratio) for bytes_, ratio in zip(allocated, ratios, strict=True)))
        expected = max(breakdown.reserved, allocated.expected)
        over = expected / max(allocated.expected, 1)
        low, high = allocated.low * max(1.0, 1 + (over - 1) / 2), allocated.high * (1 + (over - 1) * 1.5)
        return Bytes(round(min(low, expected)), expected, round(max(high, expected)))

    def _device(self, setup: RunSetup, breakdown: Breakdown, reserved: Bytes) -> Bytes:
        overhead = self.card.overhead(distributed=setup.zero is not None or setup.gpus > 1)
        factor = correction(self.card.name, breakdown.way)
        low, expected, high = (round((a + b) * factor) for a, b in zip(reserved, overhead, strict=True))
        return Bytes(low, expected, high)

    def device_at(self, described: Described, micro_batch: int, *, fast: bool) -> int:
        """Expected device memory at another micro-batch, in bytes."""
        setup = replace(described.setup, micro_batch=micro_batch)
        counted = self._counted(described, setup)
        breakdown = counted if fast else self._traced(described, setup, counted)[0]
        expected = Bytes(breakdown.allocated, breakdown.allocated, breakdown.allocated)
        return self._device(setup, breakdown, self._reserved(setup, breakdown, expected)).expected


def largest_micro_batch(
    predictor: Predictor, described: Described, side: Side, budget: int, *, confirm: bool
) -> int:
    """The largest micro-batch whose expected device memory is within ``budget`` bytes; 0 if none is.

    Memory is affine in the micro-batch but for where the peak moves, which the closed form follows; it is corrected by
    what ``side`` (and with ``confirm`` one more trace, at the answer) says.
    """

    def counted(size: int) -> int:
        return predictor.device_at(described, size, fast=True)

    first = described.setup.micro_batch
    off = side.device.expected - counted(first)
    found = _search(lambda size: counted(size) + off <= budget)
    if not confirm or predictor.fast or found in (0, first) or side.breakdown.way == "closed form":
        return found
    then = predictor.device_at(described, found, fast=False) - counted(found)
    slope = (then - off) / (found - first)
    return _search(lambda size: counted(size) + off + slope * (size - first) <= budget)


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
