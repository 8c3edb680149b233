"""Micro-batches of different lengths: what the allocator reserves for them, by hand and beside traces of every length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorapatch.memory.allocator import AllocatorSettings
from lorapatch.memory.trace import varied
from lorapatch.memory.trace.varied import Traced, draw, reserved, short_length

MIB = 1 << 20


def traced(*, once: bool = False, accumulated: bool = False) -> Traced:
    """Two steps that each make one tensor of 4 MiB a token, at 10 and at 20 tokens, and one of 30 MiB."""
    events, marks, made_by = list[tuple[int, int]](), list[tuple[str, int, int]](), list[object]()

    def made(nbytes: int, by: str) -> int:
        made_by.append(by)
        events.append((nbytes, len(made_by) - 1))
        return len(made_by) - 1

    made(100 * MIB, "weights")
    for length in (10, 20):
        marks.append(("micro-batch", length, len(events)))
        if once and length == 10:
            made(2 * MIB, "a table")
        wide = made(4 * MIB * length, "wide")
        summed = made(2 * MIB, "a sum") if accumulated and length == 20 else None
        fixed = made(30 * MIB, "fixed")
        events.extend((-1, number) for number in (wide, fixed, summed) if number is not None)
        marks.append(("step", 0, len(events)))
    return Traced(events, marks, {}, made_by)


def play(order: list[int], monkeypatch: pytest.MonkeyPatch, options: AllocatorSettings | None = None, **how: Any) -> int:
    monkeypatch.setattr(varied, "draw", lambda lengths, micro_batch, seed: order)
    return reserved(traced(**how), (10, 20), 1, options).expected // MIB


def test_a_length_that_was_never_seen_takes_a_new_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    # 100 of weights, 4 a token and 30: a longer tensor fits into no block that a shorter one left, a shorter one does.
    assert play([10, 10], monkeypatch) == 100 + 40 + 30
    assert play([10, 20], monkeypatch) == 100 + 40 + 30 + 80
    assert play([15, 15], monkeypatch) == 100 + 60 + 30
    assert play([15, 18, 20], monkeypatch) == 100 + 60 + 30 + 72 + 80
    assert play([20, 18, 15], monkeypatch) == 100 + 80 + 30


def test_expandable_segments_grow_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    # In pieces of 20 MiB: 100 of weights, then 60 and 30 (100 mapped), 72 and 30 (120), 80 and 30 (120).
    assert play([15, 18, 20], monkeypatch, AllocatorSettings(expandable_segments=True)) == 100 + 120


def test_on_a_small_card_cached_segments_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert play([15, 18, 20], monkeypatch, AllocatorSettings(capacity=250 * MIB)) <= 250


def test_what_only_one_of_the_steps_makes_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    # A table's 2 MiB have a segment of 20; a sum's break the block of 30. The wide tensor still shrinks with its length.
    assert play([10, 10], monkeypatch, once=True) == 100 + 20 + 40 + 30
    assert play([10, 10], monkeypatch, accumulated=True) == 100 + 40 + 30 + 30


def test_micro_batches_are_drawn_from_the_samples_and_end_with_the_longest() -> None:
    lengths = (10, 12, 14, 30)
    assert draw(lengths, 1, seed=0) == draw(lengths, 1, seed=0) != draw(lengths, 1, seed=1)
    assert set(draw(lengths, 1, seed=0)) == set(lengths)
    assert draw(lengths, 1, seed=0)[-1] == 30
    assert sum(draw(lengths, 8, seed=0)) > sum(draw(lengths, 1, seed=0))  # padded to the longest of eight
    assert short_length(lengths, 1) == 10
    assert short_length((30, 30), 1) is None
    assert short_length((), 1) is None


def test_equal_lengths_reserve_what_was_recorded(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from tiny_runs import text_run

    recorder = _record(text_run(tmp_path, sequence=512, micro_batch=8), iter([512] * 9))
    assert reserved(_traced(recorder), (), 1).expected == recorder.allocator.peak_reserved


@pytest.mark.parametrize("kind", ["plain", "zero2", "zero3"])
def test_lengths_that_are_played_reserve_what_lengths_that_are_traced_do(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    from tiny_runs import ZERO2, ZERO3, text_run

    run: Any = pytest.importorskip("lorapatch.memory.trace.run")
    zero = {"plain": None, "zero2": ZERO2, "zero3": ZERO3}[kind]
    setup = text_run(tmp_path, sequence=1024, micro_batch=8, zero=zero, accumulation=1, lengths=(256, 1024))
    order = [512, 768, 256, 640, 896, 1024, 384]
    monkeypatch.setattr(varied, "draw", lambda lengths, micro_batch, seed: order)
    played = _traced(_record(setup, iter([256, 1024])))
    found = reserved(played, setup.lengths, 8, orders=1).expected
    monkeypatch.setattr(run, "STEPS", len(order))
    truth = _record(setup, iter(order)).allocator.peak_reserved
    alike = _record(setup, iter([1024] * 7)).allocator.peak_reserved
    assert found == truth
    assert truth > 1.05 * alike  # or there would be nothing to tell


def _record(setup: Any, lengths: Iterator[int]) -> Any:
    """The trace of steps whose micro-batches are as long as ``lengths`` says."""
    from lorapatch.memory.trace.run import trace_subject
    from lorapatch.memory.trace.subjects import plain

    subject = plain.build(setup)
    make = subject.make_batch
    subject.make_batch = lambda _: make(next(lengths))
    return trace_subject(subject, setup, 90)


def _traced(recorder: Any) -> Traced:
    from lorapatch.memory.trace.run import traced_by

    return traced_by(recorder)


def test_a_trace_plays_its_samples_lengths_on_its_card_and_advises(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from tiny_runs import text_run

    from lorapatch.memory.trace.run import measure

    run = {"sequence": 16_384, "micro_batch": 1, "accumulation": 1}
    alike = measure(text_run(tmp_path, **run), 90)
    setup = text_run(tmp_path, **run, lengths=tuple(range(4096, 16_385, 1024)))
    differing = measure(setup, 90)
    assert alike.reserved and differing.reserved and differing.reserved_high
    assert alike.advice == () and alike.reserved_high == alike.reserved
    assert differing.allocated == alike.allocated  # the longest decides
    assert alike.reserved < differing.reserved <= differing.reserved_high
    assert "with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True it would be" in differing.advice[0]
    expandable = measure(replace(setup, allocator="expandable_segments:True"), 90)
    assert expandable.advice == () and expandable.reserved and expandable.reserved < differing.reserved
    capacity = (differing.allocated + differing.reserved) // 2
    small = measure(setup, 90, capacity)
    assert small.reserved and small.reserved <= capacity
