"""torch's caching allocator, replayed: sequences worked out by hand from c10/cuda/CUDACachingAllocator.cpp."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from lorapatch.errors import UsageError
from lorapatch.memory.allocator import EMPTY_CACHE, AllocatorSettings, CachingAllocator, settings

KIB, MIB = 1 << 10, 1 << 20
EXPANDABLE = AllocatorSettings(expandable_segments=True)


def replay(
    events: Iterable[tuple[int, int]],
    options: AllocatorSettings | None = None,
    streams: Mapping[int, str] | None = None,
) -> CachingAllocator:
    """The allocator after ``events``; ``streams`` by id, the default is ""."""
    allocator = CachingAllocator(options)
    for nbytes, number in events:
        allocator.play(nbytes, number, (streams or {}).get(number, ""))
    return allocator


def test_sizes_are_rounded_to_512_bytes_and_small_ones_share_a_segment_of_2_mib() -> None:
    allocator = replay([(1, 0), (513, 1), (MIB, 2)])
    assert allocator.allocated == 512 + 1024 + MIB
    assert allocator.reserved == 2 * MIB


def test_a_request_of_one_to_ten_mib_takes_a_segment_of_20_mib_and_larger_ones_their_own() -> None:
    assert replay([(MIB + 512, 0)]).reserved == 20 * MIB
    assert replay([(10 * MIB - 512, 0)]).reserved == 20 * MIB
    assert replay([(10 * MIB, 0)]).reserved == 10 * MIB
    assert replay([(21 * MIB, 0)]).reserved == 22 * MIB


def test_a_large_block_is_split_only_where_more_than_one_mib_is_left() -> None:
    # A segment of 12 MiB: 11 MiB asked for leave 1 MiB, which stays with the block; 10.5 leave 1.5, which is free.
    whole = CachingAllocator()
    assert whole.malloc(0, 11 * MIB) == 12 * MIB
    assert whole.allocated == 12 * MIB
    split = CachingAllocator()
    assert split.malloc(0, 10 * MIB + 512 * KIB) == 10 * MIB + 512 * KIB
    assert split.malloc(1, MIB + 512 * KIB) == MIB + 512 * KIB
    assert split.reserved == 12 * MIB


def test_the_smallest_free_block_that_fits_is_taken() -> None:
    events = [(40 * MIB, 0), (30 * MIB, 1), (-1, 0), (-1, 1), (28 * MIB, 2), (38 * MIB, 3)]
    allocator = replay(events)
    assert allocator.reserved == 70 * MIB


def test_free_neighbours_become_one_block() -> None:
    events = [(60 * MIB, 0), (-1, 0), (20 * MIB, 1), (20 * MIB, 2), (20 * MIB, 3), (-1, 1), (-1, 3), (-1, 2), (60 * MIB, 4)]
    assert replay(events).peak_reserved == 60 * MIB
    in_between = [*events[:6], (30 * MIB, 5)]  # 20 and 20, not side by side: neither is enough
    assert replay([*in_between[:6], (-1, 3), (30 * MIB, 5)]).reserved == 90 * MIB


def test_a_stream_does_not_get_what_another_one_freed() -> None:
    events = [(40 * MIB, 0), (-1, 0), (40 * MIB, 1)]
    assert replay(events).reserved == 40 * MIB
    assert replay(events, streams={0: "reduction"}).reserved == 80 * MIB


def test_empty_cache_gives_back_segments_that_are_wholly_free() -> None:
    events = [(40 * MIB, 0), (30 * MIB, 1), (-1, 0), EMPTY_CACHE]
    allocator = replay(events)
    assert (allocator.reserved, allocator.peak_reserved) == (30 * MIB, 70 * MIB)


def test_a_full_card_loses_its_cached_segments_first() -> None:
    events = [(40 * MIB, 0), (-1, 0), (50 * MIB, 1)]
    assert replay(events, AllocatorSettings(capacity=60 * MIB)).peak_reserved == 50 * MIB
    assert replay(events).peak_reserved == 90 * MIB


def test_an_expandable_segment_grows_at_its_end_by_what_is_missing() -> None:
    allocator = replay([(30 * MIB, 0)], EXPANDABLE)
    assert allocator.reserved == 40 * MIB  # pieces of 20 MiB
    assert allocator.allocated == 30 * MIB
    # 10 MiB are free at the end: 30 more need one piece, not two
    assert replay([(30 * MIB, 0), (30 * MIB, 1)], EXPANDABLE).reserved == 60 * MIB


def test_expandable_segments_avoid_what_fragmentation_costs() -> None:
    events = []
    for number in range(1, 9):  # ever larger tensors, as with ever longer samples
        events += [(20 * number * MIB, number), (-1, number)]
    assert replay(events).peak_reserved == sum(20 * number for number in range(1, 9)) * MIB
    assert replay(events, EXPANDABLE).peak_reserved == 160 * MIB


def test_settings_are_read_as_torch_reads_them() -> None:
    found = settings("expandable_segments:True,max_split_size_mb:128,roundup_power2_divisions:[256:1,>:4]")
    assert (found.expandable_segments, found.max_split_size, found.roundup_divisions) == (True, 128 * MIB, 0)
    assert settings("roundup_power2_divisions:4") == AllocatorSettings(roundup_divisions=4)
    assert settings("", capacity=MIB) == AllocatorSettings(capacity=MIB)
    with pytest.raises(UsageError, match="is no name:value"):
        settings("expandable_segments")
    with pytest.raises(UsageError, match="max_split_size_mb:many"):
        settings("max_split_size_mb:many")


def test_a_power_of_two_is_divided_to_round_up() -> None:
    divided = CachingAllocator(AllocatorSettings(roundup_divisions=4))
    assert divided.malloc(0, 1200 * 512) == 1280 * 512  # between 1024 and 2048 blocks: steps of 256


def test_blocks_above_the_split_limit_serve_no_small_request() -> None:
    events = [(60 * MIB, 0), (-1, 0), (20 * MIB, 1)]
    assert replay(events).reserved == 60 * MIB
    assert replay(events, AllocatorSettings(max_split_size=40 * MIB)).reserved == 80 * MIB
