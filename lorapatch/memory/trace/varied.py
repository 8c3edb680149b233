"""What the allocator reserves where micro-batches differ in length: the traced steps, played again at other lengths.

Blocks of a longer micro-batch do not fit into those that a shorter one left behind, so the reserve grows whenever a length
is seen that none was before. The first step is traced at a short length, the second at the longest: every storage's size
lies on the line through both. No model is needed for that, only the allocator's replay.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorapatch.memory.allocator import AllocatorSettings, CachingAllocator

__all__ = ["ORDERS", "Reserved", "Sizes", "Traced", "draw", "reserved", "short_length"]

ORDERS = 3  # of the samples: the median of what they lead to is expected
MICRO_BATCHES = 24  # of each; the last is the longest, which an epoch holds once
_AHEAD, _ALIKE = 400, 6  # where two steps part: storages looked ahead, and how many in a row have to agree


class Reserved(NamedTuple):
    """Bytes reserved at the most: the median and the most of several orders of the samples."""

    expected: int
    high: int


@dataclass(frozen=True)
class Traced:
    """A trace as the replay needs it: ``events`` in order, and by storage its stream and what made it.

    ``marks`` are (kind, length, first event): "inputs", "micro-batch" and "step"; a part ends where the next begins.
    """

    events: Sequence[tuple[int, int]]
    marks: Sequence[tuple[str, int, int]]
    streams: Mapping[int, str]
    made_by: Sequence[object]  # by storage


@dataclass(frozen=True)
class Sizes:
    """A storage's size at any length: on the line through its size at two."""

    ends: Mapping[int, tuple[int, int]]  # bytes by storage at both lengths, of those that differ
    short: int
    longest: int

    def at(self, number: int, nbytes: int, length: int) -> int:
        """Bytes of storage ``number`` in a micro-batch of ``length`` tokens; ``nbytes`` if it does not change."""
        if number not in self.ends:
            return nbytes
        low, high = self.ends[number]
        return max(round(high - (high - low) * (self.longest - length) / (self.longest - self.short)), 1)


def draw(lengths: Sequence[int], micro_batch: int, seed: int) -> list[int]:
    """Padded lengths of micro-batches that hold ``micro_batch`` samples each, ``lengths`` being quantiles of the samples'.

    >>> draw([5, 5, 5], 2, seed=0)[-2:]
    [5, 5]
    """
    choose = random.Random(seed)
    drawn = [max(choose.choice(lengths) for _ in range(micro_batch)) for _ in range(MICRO_BATCHES - 1)]
    return [*drawn, max(lengths)]


def short_length(lengths: Sequence[int], micro_batch: int) -> int | None:
    """The shortest micro-batch that is played, where that is not the longest; None where all are alike."""
    shortest = min((min(draw(lengths, micro_batch, seed)) for seed in range(ORDERS)), default=0) if lengths else 0
    return shortest if lengths and shortest < max(lengths) else None


def reserved(
    traced: Traced,
    lengths: Sequence[int],
    micro_batch: int,
    options: AllocatorSettings | None = None,
    orders: int = ORDERS,
) -> Reserved:
    """The most that is reserved while micro-batches of all lengths pass; of equal ones where ``lengths`` is empty."""
    parts = _parts(traced)
    second = next(number for number, part in enumerate(parts) if part.kind == "step") + 1
    sizes = _sizes(traced, parts[:second], parts[second:]) if lengths else Sizes({}, 0, 1)
    found = []
    for seed in range(orders if lengths else 1):
        played = draw(lengths, micro_batch, seed) if lengths else [0, 0]
        allocator = CachingAllocator(options)
        player = _Player(traced, allocator, sizes)
        player.once(traced.events[: traced.marks[0][2]], 0)
        for part in parts[:second]:
            player.once(part.events, played[0])
        player.again_and_again(parts[second:], played[1:])
        found.append(allocator.peak_reserved)
    found.sort()
    return Reserved(found[len(found) // 2], found[-1])


class _Part(NamedTuple):
    kind: str
    length: int
    events: Sequence[tuple[int, int]]


def _parts(traced: Traced) -> list[_Part]:
    starts = [*(start for _, _, start in traced.marks), len(traced.events)]
    return [
        _Part(kind, length, traced.events[start:end])
        for (kind, length, start), end in zip(traced.marks, starts[1:], strict=True)
    ]


def _sizes(traced: Traced, first: Sequence[_Part], second: Sequence[_Part]) -> Sizes:
    """Each storage of the second step beside the one of the first that takes its place."""
    ends: dict[int, tuple[int, int]] = {}
    for kind in ("inputs", "micro-batch"):
        like = next((part for part in first if part.kind == kind), None)
        for part in second:
            if part.kind == kind and like is not None:
                for one, two in _aligned(traced, like, part):
                    ends[one.number] = ends[two.number] = (one.nbytes, two.nbytes)
    short, longest = (next(part.length for part in step if part.length) for step in (first, second))
    return Sizes(ends, short, longest)


def _aligned(traced: Traced, first: _Part, second: _Part) -> Iterator[tuple[_Made, _Made]]:
    """Storages of both that are each other's like, where their sizes differ.

    Both ran the same code, but for what is made only once and what is accumulated.
    """
    one, two = _made(traced, first), _made(traced, second)
    i = j = 0
    while i < len(one) and j < len(two):
        if one[i].by == two[j].by:
            if one[i].nbytes != two[j].nbytes:
                yield one[i], two[j]
            i, j = i + 1, j + 1
            continue
        skipped = _skipped(one[i : i + _AHEAD + _ALIKE], two[j : j + _AHEAD + _ALIKE])
        if skipped is None:
            return
        i, j = i + skipped[0], j + skipped[1]


class _Made(NamedTuple):
    number: int
    nbytes: int
    by: object


def _made(traced: Traced, part: _Part) -> list[_Made]:
    return [_Made(number, nbytes, traced.made_by[number]) for nbytes, number in part.events if nbytes > 0]


def _skipped(one: Sequence[_Made], two: Sequence[_Made]) -> tuple[int, int] | None:
    """How many of either to leave out until both agree again; the fewest."""
    for both in range(1, _AHEAD):
        for first in range(both + 1):
            ahead = [made.by for made in one[first : first + _ALIKE]]
            if ahead and ahead == [made.by for made in two[both - first : both - first + _ALIKE]]:
                return first, both - first
    return None


class _Player:
    """Plays parts again and again; each time their storages are new ones."""

    def __init__(self, traced: Traced, allocator: CachingAllocator, sizes: Sizes) -> None:
        self.traced, self.allocator, self.sizes = traced, allocator, sizes
        self.next = len(traced.made_by)

    def once(self, events: Sequence[tuple[int, int]], length: int) -> None:
        """What is not played again: up to the end of the first step, its micro-batch ``length`` tokens long."""
        for nbytes, number in events:
            self._event(self.sizes.at(number, nbytes, length) if nbytes > 0 else nbytes, number)

    def again_and_again(self, parts: Sequence[_Part], lengths: Sequence[int]) -> None:
        """A step's ``parts`` until every length has had its micro-batch."""
        micro_batches = sum(part.kind == "micro-batch" for part in parts)
        for at in range(0, len(lengths), micro_batches):
            step = list(lengths[at : at + micro_batches])
            self._step(parts, step + step[-1:] * (micro_batches - len(step)))

    def _step(self, parts: Sequence[_Part], lengths: Sequence[int]) -> None:
        new: dict[int, int] = {}
        coming = iter(lengths)
        length = lengths[0]
        for part in parts:
            if part.kind == "micro-batch":
                length = next(coming)
            for nbytes, number in part.events:
                if nbytes > 0:
                    new[number] = self.next
                    size = self.sizes.at(number, nbytes, length)
                    self.allocator.malloc(self.next, size, self.traced.streams.get(number, ""))
                    self.next += 1
                elif number in new:
                    self.allocator.release(new.pop(number))
                else:
                    self._event(nbytes, number)
        for kept in new.values():  # what outlives the step is made anew by the next
            self.allocator.release(kept)

    def _event(self, nbytes: int, number: int) -> None:
        """Of what was there before the steps that are played again, which can only be freed the first time."""
        if nbytes >= 0 or number in self.allocator.used:
            self.allocator.play(nbytes, number, self.traced.streams.get(number, ""))
