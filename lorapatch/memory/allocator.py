"""PyTorch's caching allocator for CUDA, replayed: what is allocated and what is reserved, block by block, without a GPU.

Source: c10/cuda/CUDACachingAllocator.cpp (sizes, best fit, splitting, coalescing, expandable segments) and
c10/core/AllocatorConfig.cpp (PYTORCH_CUDA_ALLOC_CONF). One device; memory is never freed while a stream still uses it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from lorapatch.errors import UsageError

__all__ = ["EMPTY_CACHE", "WASTEFUL", "AllocatorSettings", "CachingAllocator", "settings"]

KIB, MIB = 1 << 10, 1 << 20
MIN_BLOCK = 512
SMALL_SIZE = MIB  # up to here a request is small
SMALL_BUFFER = 2 * MIB  # a segment of small blocks
LARGE_BUFFER = 20 * MIB  # a segment of requests below MIN_LARGE
MIN_LARGE = 10 * MIB
ROUND_LARGE = 2 * MIB

WASTEFUL = 1.1  # reserved over allocated, from where on fragmentation is worth a word
EMPTY_CACHE = (0, -1)  # the event of torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class AllocatorSettings:
    """What PYTORCH_CUDA_ALLOC_CONF may change; sizes in bytes. ``roundup_divisions`` by the power of two above a size."""

    expandable_segments: bool = False
    max_split_size: int | None = None
    roundup_divisions: int = 0
    capacity: int | None = None  # bytes of the card: cached segments go before a request fails


def settings(text: str, capacity: int | None = None) -> AllocatorSettings:
    """Settings from ``text`` as in PYTORCH_CUDA_ALLOC_CONF; raises UsageError."""
    values: dict[str, str] = {}
    for pair in _pairs(text):
        name, colon, value = pair.partition(":")
        if not colon:
            raise UsageError(f"PYTORCH_CUDA_ALLOC_CONF={text}: {pair!r} is no name:value")
        values[name.strip()] = value.strip()
    try:
        split = values.get("max_split_size_mb")
        divisions = values.get("roundup_power2_divisions", "0")
        return AllocatorSettings(
            expandable_segments=values.get("expandable_segments", "False").lower() == "true",
            max_split_size=int(split) * MIB if split else None,
            roundup_divisions=0 if divisions.startswith("[") else int(divisions),
            capacity=capacity,
        )
    except ValueError as error:
        raise UsageError(f"PYTORCH_CUDA_ALLOC_CONF={text}: {error}") from error


def _pairs(text: str) -> list[str]:
    """Split at commas that stand outside brackets."""
    parts, depth, start = [], 0, 0
    for at, sign in enumerate(text):
        depth += (sign == "[") - (sign == "]")
        if sign == "," and not depth:
            parts.append(text[start:at])
            start = at + 1
    return [part for part in (*parts, text[start:]) if part.strip()]


@dataclass(slots=True, eq=False)
class _Block:
    address: int
    size: int
    pool: _Pool
    previous: _Block | None = None
    next: _Block | None = None
    free: bool = False


@dataclass(slots=True, eq=False)
class _Pool:
    """Free blocks of one stream and one kind, by size and address; ``last``: where an expandable segment ends."""

    small: bool
    free: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[int, _Block] = field(default_factory=dict)  # free ones, by address
    last: _Block | None = None

    def insert(self, block: _Block) -> None:
        block.free = True
        insort(self.free, (block.size, block.address))
        self.blocks[block.address] = block

    def remove(self, block: _Block) -> None:
        block.free = False
        del self.free[bisect_left(self.free, (block.size, block.address))]
        del self.blocks[block.address]


class CachingAllocator:
    """``malloc`` and ``release`` as torch's; ``allocated`` adds up whole blocks, as max_memory_allocated() does."""

    def __init__(self, options: AllocatorSettings | None = None) -> None:
        self.options = options or AllocatorSettings()
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.pools: dict[tuple[str, bool], _Pool] = {}
        self.used: dict[int, _Block] = {}
        self._top = 0

    def play(self, nbytes: int, number: int, stream: str = "") -> None:
        """One event of a run: (+bytes, id), (-bytes, id) or EMPTY_CACHE."""
        if (nbytes, number) == EMPTY_CACHE:
            self.empty_cache()
        elif nbytes > 0:
            self.malloc(number, nbytes, stream)
        else:
            self.release(number)

    def malloc(self, number: int, nbytes: int, stream: str = "") -> int:
        """Allocate ``nbytes`` under the name ``number``; returns the bytes of the block that it gets."""
        size = self._rounded(nbytes)
        small = size <= SMALL_SIZE
        pool = self.pools.setdefault((stream, small), _Pool(small))
        block = self._find(pool, size)
        if block is None:
            block = self._grow(pool, size) if self.options.expandable_segments else self._segment(pool, size)
        self._split(block, size)
        self.used[number] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block.size

    def release(self, number: int) -> None:
        """Give the block of ``number`` back to its pool, one piece with its free neighbours."""
        block = self.used.pop(number)
        self.allocated -= block.size
        for neighbour in (block.previous, block.next):
            if neighbour is not None and neighbour.free:
                block.pool.remove(neighbour)
                block.address = min(block.address, neighbour.address)
                block.size += neighbour.size
                if neighbour is block.previous:
                    self._link(neighbour.previous, block)
                else:
                    self._link(block, neighbour.next)
                    if block.pool.last is neighbour:
                        block.pool.last = block
        block.pool.insert(block)

    def empty_cache(self) -> None:
        """Segments that are wholly free go back to the driver."""
        for pool in self.pools.values():
            for block in list(pool.blocks.values()):
                if block.previous is None and block.next is None:
                    pool.remove(block)
                    self.reserved -= block.size
                    if pool.last is block:
                        pool.last = None
                elif pool.last is block:  # an expandable segment is unmapped from its end, in whole pieces
                    self._shrink(pool, block)

    def _rounded(self, nbytes: int) -> int:
        if nbytes < MIN_BLOCK:
            return MIN_BLOCK
        divisions = self.options.roundup_divisions
        if divisions > 1 and nbytes > MIN_BLOCK * divisions:
            step = (1 << (nbytes.bit_length() - 1)) // divisions
            return -(-nbytes // step) * step
        return -(-nbytes // MIN_BLOCK) * MIN_BLOCK

    def _find(self, pool: _Pool, size: int) -> _Block | None:
        """Best fit; the end of an expandable segment, which could grow, is taken last."""
        at = bisect_left(pool.free, (size, -1))
        if at < len(pool.free) and pool.last is not None and pool.blocks[pool.free[at][1]] is pool.last:
            at = at + 1 if at + 1 < len(pool.free) else at
        if at == len(pool.free):
            return None
        block = pool.blocks[pool.free[at][1]]
        limit = self.options.max_split_size
        if limit is not None and not self.options.expandable_segments:
            if size < limit <= block.size or (size >= limit and block.size >= size + LARGE_BUFFER):
                return None
        pool.remove(block)
        return block

    def _segment(self, pool: _Pool, size: int) -> _Block:
        """cudaMalloc."""
        whole = SMALL_BUFFER if pool.small else LARGE_BUFFER if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE
        self._reserve(whole)
        block = _Block(self._top, whole, pool)
        self._top += whole + LARGE_BUFFER  # never next to each other: segments do not coalesce
        return block

    def _grow(self, pool: _Pool, size: int) -> _Block:
        """Map what is missing behind the segment's end, in pieces of 2 or 20 MiB."""
        piece = SMALL_BUFFER if pool.small else LARGE_BUFFER
        last = pool.last
        at_hand = last.size if last is not None and last.free else 0
        mapped = -(-(size - at_hand) // piece) * piece
        self._reserve(mapped)
        if last is not None and last.free:
            pool.remove(last)
            last.size += mapped
            return last
        if last is None:
            address, self._top = self._top, self._top + (1 << 48)
        else:
            address = last.address + last.size
        block = _Block(address, mapped, pool)
        self._link(last, block)
        pool.last = block
        return block

    def _shrink(self, pool: _Pool, block: _Block) -> None:
        piece = SMALL_BUFFER if pool.small else LARGE_BUFFER
        gone = block.size // piece * piece
        if gone == block.size:  # its first piece may be shared with the block before
            gone -= piece
        if gone > 0:
            pool.remove(block)
            block.size -= gone
            self.reserved -= gone
            pool.insert(block)

    def _reserve(self, nbytes: int) -> None:
        limit = self.options.capacity
        if limit is not None and self.reserved + nbytes > limit:
            self.empty_cache()
        self.reserved += nbytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _split(self, block: _Block, size: int) -> None:
        rest = block.size - size
        limit = self.options.max_split_size
        if block.pool.small or self.options.expandable_segments:
            wanted = rest >= MIN_BLOCK
        else:
            wanted = rest > SMALL_SIZE and (limit is None or size < limit)
        if not wanted:
            return
        right = _Block(block.address + size, rest, block.pool)
        self._link(right, block.next)
        self._link(block, right)
        block.size = size
        if block.pool.last is block:
            block.pool.last = right
        block.pool.insert(right)

    @staticmethod
    def _link(left: _Block | None, right: _Block | None) -> None:
        if left is not None:
            left.next = right
        if right is not None:
            right.previous = left
