"""What a card takes beside tensors: the table, what is measured on this machine, what finished runs teach."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_run import mgm_run, write_json

import lorapatch
from lorapatch.errors import Refused, UsageError
from lorapatch.memory import calibrate as calibrating
from lorapatch.memory.cards import CARDS, Card, card_called, card_here, save_calibration
from lorapatch.memory.history import correction, learn, read_history
from lorapatch.run.gpus import Gpu

GIB = 1 << 30


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("name", "card"),
    [("H200", "H200"), ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("rtx4090", "RTX 4090"),
     ("NVIDIA GeForce RTX 3090", "RTX 3090"), ("A100 40GB", "A100 40GB"), ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
     ("A100", "A100 80GB"), ("Tesla T4", "T4"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S"), ("a10", "A10"),
     ("Tesla V100-SXM2-32GB", "V100 32GB")],
)  # fmt: skip
def test_a_card_is_found_by_any_of_its_names(name: str, card: str) -> None:
    assert card_called(name).name == card


def test_an_unknown_card_is_a_usage_error_that_lists_them() -> None:
    with pytest.raises(UsageError, match="choose one of H200, H100"):
        card_called("Voodoo 2")


def test_nccl_counts_only_where_a_launcher_sets_it_up() -> None:
    card = card_called("H200")
    alone, zero3, zero2 = (card.overhead(communicators=many) for many in range(3))
    assert alone.expected == card.context and zero3.expected == card.context + card.nccl
    assert zero2.expected == zero3.expected + card.communicator
    assert zero2.low < zero2.expected < zero2.high
    assert card.overhead(communicators=2, alone=False).expected == zero2.expected + card.peers


def test_every_card_has_a_name_that_the_trace_knows_or_its_own() -> None:
    known = {card.name: card.traced_as for card in CARDS}
    assert known["RTX 4090"] == "4090" and known["A100 40GB"] == "A100" and known["H200"] == "H200"


class _Gpus:
    """A machine with these GPUs."""

    def __init__(self, *gpus: Gpu) -> None:
        self.gpus = gpus

    def __call__(self) -> _Gpus:
        return self

    def memory(self) -> tuple[Gpu, ...]:
        return self.gpus

    def close(self) -> None:
        pass


def test_the_card_here_has_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapatch.memory.cards.Gpus", _Gpus(Gpu(0, "NVIDIA H100 NVL", 0, 94 * GIB)))
    here = card_here()
    assert here is not None and (here.name, here.memory) == ("H100", 94 * GIB)
    monkeypatch.setattr("lorapatch.memory.cards.Gpus", _Gpus(Gpu(0, "NVIDIA Titan V", 0, 12 * GIB)))
    here = card_here()
    assert here is not None and (here.name, here.memory, here.measured) == ("NVIDIA Titan V", 12 * GIB, False)


def test_what_was_measured_counts_for_that_card_and_torch_alone() -> None:
    save_calibration(card_called("L4"), "2.11.0", context=111, nccl=None, communicator=None, workspace=33)
    found = card_called("L4", "2.11.0+cu130")
    assert (found.context, found.nccl, found.workspace, found.measured) == (111, card_called("L4").nccl, 33, True)
    assert not card_called("L4", "2.4.0").measured and not card_called("T4", "2.11.0").measured


def fake_python(folder: Path, body: str) -> str:
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = _Gpus(Gpu(0, "NVIDIA L4", 5, 22 * GIB))
    monkeypatch.setattr("lorapatch.memory.cards.Gpus", machine)
    monkeypatch.setattr("lorapatch.run.gpus.Gpus", machine)


@pytest.mark.usefixtures("with_gpu")
def test_calibrating_keeps_what_the_probe_says(tmp_path: Path) -> None:
    answer = json.dumps({"torch": "2.11.0+cu130", "context": 300, "workspace": 40, "nccl": 700, "communicator": -3})
    found = calibrating.calibrate(fake_python(tmp_path, f"assert sys.argv[-1] == '5'\nprint('noise')\nprint({answer!r})"))
    assert found == calibrating.Calibration("L4", "2.11.0", 300, 700, 0, 40)
    assert card_called("NVIDIA L4", "2.11.0").context == 300


@pytest.mark.usefixtures("with_gpu")
@pytest.mark.parametrize(
    ("body", "sentence"),
    [("raise RuntimeError('no kernel image')", "cannot use the GPU: RuntimeError: no kernel image"),
     ("print('hello')", "cannot measure the GPU"), ("print('[1]')", "it answered \\[1\\]"),
     ("print('{}')", "it answered {}")],
)  # fmt: skip
def test_a_probe_that_fails_is_one_sentence(tmp_path: Path, body: str, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        calibrating.calibrate(fake_python(tmp_path, body))


def test_without_a_gpu_there_is_nothing_to_calibrate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapatch.memory.cards.Gpus", _Gpus())
    with pytest.raises(Refused, match="no GPU is here to calibrate"):
        calibrating.calibrate()


def record(runs: Path, name: str, predicted: int, measured: int | None, corrected_by: float = 1.0) -> None:
    """A finished run on an H200 that held 1 GiB already."""
    gpu = {"index": 0, "name": "NVIDIA H200", "used_B": measured, "total_B": 140 * GIB, "before_B": GIB}
    told = {"gpu": "H200", "device": {"low": 1, "expected": predicted, "high": 9}, "breakdown": {"way": "trace"},
            "corrected_by": corrected_by}  # fmt: skip
    memory = {"predicted": told, "gpus": [gpu], "gpus_of_run": [0], "device_peak_B": measured}
    write_json(runs / name / "record.json", {"schema": 1, "memory": memory})


def test_the_history_is_every_run_that_has_both_figures(tmp_path: Path) -> None:
    record(tmp_path, "1-smoke", 10 * GIB, 11 * GIB)
    record(tmp_path, "2-smoke", 12 * GIB, 11 * GIB)
    record(tmp_path, "3-on-the-cpu", 10 * GIB, None)
    write_json(tmp_path / "4-older/record.json", {"memory": {"predicted": None, "device_peak_B": 1}})
    write_json(tmp_path / "5-odd/record.json", [])
    past = read_history(tmp_path)
    assert [(run.folder, run.measured) for run in past] == [("1-smoke", 10 * GIB), ("2-smoke", 10 * GIB)]
    assert [run.error for run in past] == [0.0, pytest.approx(0.2)]


def test_three_runs_correct_the_next_estimate_and_do_not_learn_from_themselves(tmp_path: Path) -> None:
    for number in range(2):
        record(tmp_path / "runs", str(number), 10 * GIB, 12 * GIB)
    assert learn(read_history(tmp_path / "runs")) == {} and correction("H200", "trace") == 1.0
    record(tmp_path / "runs", "2", 10 * GIB, 12 * GIB)
    assert learn(read_history(tmp_path / "runs")) == {"H200 trace": 1.1}
    assert correction("H200", "trace") == 1.1 and correction("H200", "closed form") == correction("L4", "trace") == 1.0
    for number in range(3, 9):
        record(tmp_path / "runs", str(number), 11 * GIB, 12 * GIB, corrected_by=1.1)
    assert learn(read_history(tmp_path / "runs")) == {"H200 trace": 1.1}


def test_a_correction_reaches_the_estimate(tmp_path: Path) -> None:
    script = mgm_run(tmp_path)
    before = lorapatch.estimate(script, fast=True, gpu="H200").after
    write_json(tmp_path / "cache/lorapatch/history.json", {"H200 closed form": 1.2, "L4 closed form": "odd"})
    after = lorapatch.estimate(script, fast=True, gpu="H200").after
    assert before is not None and after is not None
    assert after.device.expected == pytest.approx(1.2 * before.device.expected)
    assert after.reserved == before.reserved and correction("L4", "closed form") == 1.0


def test_a_cache_that_cannot_be_written_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    save_calibration(card_called("L4"), "2.11.0", context=1, nccl=1, communicator=1, workspace=1)
    assert isinstance(card_called("L4", "2.11.0"), Card) and not card_called("L4", "2.11.0").measured
