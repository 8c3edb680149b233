"""What a run's record says of its memory, and how a trainer is held to a budget."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h200
import pytest

from lorapatch.lora.flags import PatchOptions
from lorapatch.run.diagnose import Diagnosis
from lorapatch.run.gpus import Gpu
from lorapatch.run.runs import RunOptions
from lorapatch.run.view import PlainView
from lorapatch.tune import Goal, Prediction
from lorapatch.tune import trials as module
from lorapatch.tune.script import read_tuned
from lorapatch.tune.trials import FRACTION, Row, Runner, measured_bytes, showed

GIB = 1 << 30
PREDICTED = Prediction(9 * GIB, 10 * GIB, 11 * GIB, 2 * GIB)


def record(device: float | None, reserved: float | None, before: float = 0, host: int = GIB) -> dict[str, Any]:
    gpus = [{"index": 0, "before_B": int(before * GIB)}] if device is not None else []
    speed = {"peak_reserved_B": int(reserved * GIB)} if reserved is not None else {}
    peak = None if device is None else int(device * GIB)
    memory = {"device_peak_B": peak, "gpus": gpus, "gpus_of_run": [0], "host_rss_peak_B": host}
    return {"memory": memory, "metrics": {"trainer": {"speed": speed}}}


def test_the_peak_is_what_the_trainer_says_with_its_context() -> None:
    assert measured_bytes(record(12.2, 10), PREDICTED) == 12 * GIB
    assert measured_bytes(record(12.2, 10), None) == int(12.2 * GIB)  # the context as the card shows it


@pytest.mark.parametrize("name", h200.MEASURED)
def test_alone_on_the_card_that_is_what_the_card_shows(name: str) -> None:
    shown, reserved = h200.MEASURED[name]
    predicted = Prediction(0, 1, 2, h200.CONTEXT_B)
    found = measured_bytes(record(shown / GIB, reserved / GIB), predicted)
    assert found is not None and abs(found - shown) < 16 << 20


def test_without_the_trainers_word_it_is_what_the_card_holds_more_than_before() -> None:
    assert measured_bytes(record(42.5, None, before=30), PREDICTED) == int(42.5 * GIB) - 30 * GIB
    assert measured_bytes(record(12.2, None), None) == int(12.2 * GIB)


@pytest.mark.parametrize("others", [-3, 0.3, 0.7, 2, 40])
def test_what_other_processes_took_meanwhile_is_not_the_runs(others: float) -> None:
    assert measured_bytes(record(12 + others, 10), PREDICTED) == 12 * GIB
    assert measured_bytes(record(12 + others, 10, before=1), PREDICTED) == 12 * GIB
    assert measured_bytes(record(52, 10), None) == 11 * GIB


def report(state: str, diagnosis: Diagnosis | None = None) -> Any:
    """What a run leaves, as far as tuning looks at it."""
    ended = {"state": state, "started": "2026-11-26T01:58:10+0000", "wall_s": 60.0}
    ended_well = SimpleNamespace(lines=[SimpleNamespace(state="pass" if state == "finished" else "fail")])
    return SimpleNamespace(
        record={**record(33, None), "outcome": ended}, diagnosis=diagnosis, verdict=ended_well,
        exit_code=0 if state == "finished" else 1, sentence="it ended",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("state", "losses", "id", "outcome", "kept"),
    [
        ("finished", 5, "", "fits", True),
        ("failed", 0, "quantisation-missing", "failed", False),
        ("failed", 3, "cuda-oom", "oom", False),
        ("timeout", 0, "timeout", "timeout", False),
        ("timeout", 1, "timeout", "timeout", False),
        ("timeout", 2, "timeout", "timeout", True),
        ("interrupted", 3, "interrupted", "interrupted", False),
    ],
)
def test_only_a_run_that_lived_says_what_it_takes(state: str, losses: int, id: str, outcome: str, kept: bool) -> None:
    diagnosis = Diagnosis(id, "a cause", "a remedy") if id else None
    rows = [Row(0.0, 2.5 - 0.1 * step, None) for step in range(losses)]
    found = showed(report(state, diagnosis), rows, 40 * GIB, PREDICTED)
    assert found.outcome == outcome and (found.measured_B == 33 * GIB if kept else found.measured_B is None)
    assert found.diagnosis == ("quantisation-missing" if outcome == "failed" else "")
    over = showed(report(state, diagnosis), rows, 30 * GIB, PREDICTED)
    assert over.outcome == ("over" if kept else outcome) and over.measured_B == found.measured_B


def test_a_run_that_was_cut_short_is_gone_on_with_and_says_so() -> None:
    found = showed(report("timeout", Diagnosis("timeout", "c", "lorapatch tune x")), [Row(0.0, 2.0, None)] * 5, 40 * GIB, None)
    assert "--resume" in found.cause and "behind step 5" in found.cause


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
