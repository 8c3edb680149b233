"""What a run's record says of its memory, and how a trainer is held to a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorapatch.lora.flags import PatchOptions
from lorapatch.run.gpus import Gpu
from lorapatch.run.runs import RunOptions
from lorapatch.run.view import PlainView
from lorapatch.tune import Goal, Prediction
from lorapatch.tune import trials as module
from lorapatch.tune.script import read_tuned
from lorapatch.tune.trials import FRACTION, Runner, measured_bytes

GIB = 1 << 30
PREDICTED = Prediction(9 * GIB, 10 * GIB, 11 * GIB, 2 * GIB)


def record(device: float | None, reserved: float | None, before: float = 0, host: int = GIB) -> dict[str, Any]:
    gpus = [{"index": 0, "before_B": int(before * GIB)}] if device is not None else []
    speed = {"peak_reserved_B": int(reserved * GIB)} if reserved is not None else {}
    peak = None if device is None else int(device * GIB)
    memory = {"device_peak_B": peak, "gpus": gpus, "gpus_of_run": [0], "host_rss_peak_B": host}
    return {"memory": memory, "metrics": {"trainer": {"speed": speed}}}


def test_the_peak_is_what_the_card_shows_less_what_was_there_before() -> None:
    assert measured_bytes(record(12.2, 10), PREDICTED) == int(12.2 * GIB)
    assert measured_bytes(record(42.5, 10, before=30), PREDICTED) == int(42.5 * GIB) - 30 * GIB
    assert measured_bytes(record(12.2, None), None) == int(12.2 * GIB)


def test_what_other_processes_took_meanwhile_is_not_the_runs() -> None:
    assert measured_bytes(record(52, 10), PREDICTED) == 12 * GIB
    assert measured_bytes(record(9, 10), PREDICTED) == 12 * GIB  # and what they gave back
    assert measured_bytes(record(52, 10), None) == 11 * GIB


def test_without_a_gpu_it_is_host_memory() -> None:
    assert measured_bytes(record(None, None, host=3 * GIB), PREDICTED) == 3 * GIB
    assert measured_bytes(record(None, None, host=0), PREDICTED) is None


class Card:
    def memory(self) -> tuple[Gpu, ...]:
        return (Gpu(0, "H200", 0, 140 * GIB),)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("size", "predicted", "share"), [(16, PREDICTED, 0.1), (15, None, 0.1), (1, PREDICTED, 0.01)])
def test_the_trainer_is_held_to_the_budget_without_its_context(
    script: Path, monkeypatch: pytest.MonkeyPatch, size: int, predicted: Prediction | None, share: float
) -> None:
    monkeypatch.setattr(module, "Gpus", Card)
    monkeypatch.delenv(FRACTION, raising=False)
    tuned = read_tuned(script, PatchOptions(), None)
    options, view = RunOptions(), PlainView(lambda line: None)
    runner = Runner(tuned, Goal(size * GIB), options, view, gpu=True)
    assert {name: float(value) for name, value in runner._limit(predicted).items()} == {FRACTION: share}
    monkeypatch.setenv(FRACTION, "0.05")  # a smaller share that was given stays
    assert float(runner._limit(predicted)[FRACTION]) == min(share, 0.05)
    assert Runner(tuned, Goal(size * GIB), options, view, gpu=False)._limit(predicted) == {}


def test_a_budget_of_the_whole_card_sets_no_limit(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Gpus", Card)
    monkeypatch.delenv(FRACTION, raising=False)
    tuned = read_tuned(script, PatchOptions(), None)
    runner = Runner(tuned, Goal(143 * GIB), RunOptions(), PlainView(lambda line: None), gpu=True)
    assert runner._limit(PREDICTED) == {}
