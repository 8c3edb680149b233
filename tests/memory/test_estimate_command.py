"""`lorapatch estimate` from the outside: what it prints, its JSON, its exit codes; and that runs record a prediction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_run import mgm_run, text_run, write_json

from lorapatch.cli import main
from lorapatch.memory import cache
from lorapatch.memory import calibrate as calibrating
from lorapatch.memory.closed_form import closed_form
from lorapatch.memory.history import correction
from lorapatch.memory.model import Breakdown, RunSetup
from lorapatch.run.runs import RunOptions

GIB = 1 << 30


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("lorapatch.memory.cards.card_here", lambda torch=None: None)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["estimate", *map(str, arguments)])


def rows(output: str) -> dict[str, list[str]]:
    """The table's rows: label to cells."""
    found = {}
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        if len(cells) == 3:
            found[cells[0]] = cells[1:]
    return found


def test_the_table_has_before_and_after_side_by_side(tmp_path: Path) -> None:
    ended = run(mgm_run(tmp_path), "--fast", "--gpu", "H200", "--budget", "24GiB")
    assert ended.exit_code == 0, ended.output
    table = rows(ended.output)
    assert list(table)[:8] == ["frozen weights", "trainable weights", "master copies", "gradients", "optimizer states",
                               "activations", "logits", "buffers"]  # fmt: skip
    assert table["parameters"] == ["3,019,166,144", "3,038,777,792"]
    assert table["trainable"] == ["2,519,431,424", "32,870,656"]
    assert table["trainable, per cent"] == ["83.45", "1.08"]
    assert table["fits 24 GiB"][0] == "no" and ", up to micro-batch " in table["fits 24 GiB"][1]
    for name in ("total allocated", "reserved", "device, as nvidia-smi shows it"):
        assert all(" to " in cell for cell in table[name])
    assert "memory of one H200 in GiB (closed form)" in ended.output and "biggest tensors after:" in ended.output
    assert "assumed: lengths from data.json" in ended.output and "not modelled: " in ended.output


def test_advice_stands_under_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_IN_PROCESS", {})

    def trace(setup: RunSetup, **_: object) -> Breakdown:
        return replace(closed_form(setup), way="trace", advice=("let segments grow",))

    monkeypatch.setattr("lorapatch.memory.trace.trace", trace)
    ended = run(mgm_run(tmp_path), "--gpu", "H200")
    assert ended.exit_code == 0 and "advice for before: let segments grow\n" in ended.output
    assert "advice for after: let segments grow\n" in ended.output


def test_the_json_is_one_document(tmp_path: Path) -> None:
    ended = run(mgm_run(tmp_path), "--fast", "--json", "--seq", "700", "--set", "per_device_train_batch_size=2", "--r", "8")
    found = json.loads(ended.output)
    assert found["schema"] == 1 and found["gpu"] == "RTX 4090"
    assert found["after"]["setup"]["lora"]["r"] == 8 and found["after"]["setup"]["sequence"] == 700
    assert found["before"]["setup"]["micro_batch"] == found["after"]["setup"]["micro_batch"] == 2
    assert found["after"]["device"]["low"] < found["after"]["device"]["expected"] < found["after"]["device"]["high"]


def test_the_script_is_only_read(tmp_path: Path) -> None:
    script = mgm_run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(script, "--fast").exit_code == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_grid_compares_methods_stages_and_micro_batches(tmp_path: Path) -> None:
    arguments = [mgm_run(tmp_path), "--fast", "--compare", "full,lora,qlora", "--zero", "0,2", "--batch", "1,4"]
    ended = run(*arguments, "--budget", "24GiB")
    lines = [line.split() for line in ended.output.splitlines() if line.startswith(("full", "lora", "qlora"))]
    assert [line[:3] for line in lines] == [[m, z, b] for m in ("full", "lora", "qlora") for z in ("none", "2") for b in "14"]
    assert {line[-1] for line in lines if line[0] == "full"} == {"no"} and lines[-1][-1] in ("yes", "likely")
    grid = json.loads(run(*arguments, "--json").output)
    assert grid["schema"] == 1 and len(grid["grid"]) == 12 and grid["grid"][0]["method"] == "full"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["missing.sh"], 3, "missing.sh"),
        (["train.sh", "--gpu", "Voodoo"], 2, "there is no card Voodoo"),
        (["train.sh", "--seq", "0"], 2, "--seq has to be at least 1"),
        (["train.sh", "--budget", "much"], 2, "is not a size such as 24GiB"),
        (["train.sh", "--batch", "a"], 2, "is not a list of whole numbers"),
        (["train.sh", "--compare", "half"], 2, "there is no method half"),
        (["train.sh", "--stage", "7"], 3, "--stage 7 fits no launch"),
        (["nameless.sh"], 3, "nameless.sh: line 2: the launch names no model"),
        ([], 2, "which script?"),
        (["--calibrate"], 3, "no GPU is here to calibrate"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrating, "card_here", lambda: None)
    script = text_run(tmp_path)
    (tmp_path / "nameless.sh").write_text(script.read_text().replace("--model_name_or_path model", "--seed 1"))
    ended = run(*arguments, *(["--fast"] if arguments else []))
    assert ended.exit_code == code and sentence in ended.output
    assert ended.exception is None or isinstance(ended.exception, SystemExit)


def test_calibrating_prints_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = calibrating.Calibration("L4", "2.11.0", 300 << 20, None, None, 16 << 20)
    monkeypatch.setattr(calibrating, "calibrate", lambda python: found)
    ended = run("--calibrate")
    assert "L4, torch 2.11.0" in ended.output and "300 MiB" in ended.output and "not measured" in ended.output
    assert json.loads(run("--calibrate", "--json").output)["context"] == 300 << 20


def test_the_history_is_a_table_of_predicted_and_measured(tmp_path: Path) -> None:
    told = {"device": {"expected": 10 * GIB}, "breakdown": {"way": "trace"}, "gpu": "H200"}
    gpu = {"index": 0, "name": "NVIDIA H200", "before_B": 0}
    memory = {"predicted": told, "gpus": [gpu], "gpus_of_run": [0], "device_peak_B": 8 * GIB}
    assert "no finished run" in run("--history", "--runs", tmp_path / "runs").output
    for name in ("a", "b", "c"):
        write_json(tmp_path / f"runs/{name}/record.json", {"memory": memory})
    ended = run("--history", "--runs", tmp_path / "runs")
    assert ended.output.count("+25.0 %") == 3 and "3 runs, mean error 25.0 %" in ended.output
    assert "H200 trace: device memory is corrected by 0.800 from now on" in ended.output
    found = json.loads(run("--history", "--runs", tmp_path / "runs", "--json").output)
    assert found["corrections"] == {"H200 trace": 0.8} and len(found["runs"]) == 3


@pytest.mark.parametrize("command", ["smoke", "full"])
def test_a_run_is_told_what_was_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    kept = _runs(monkeypatch, command)
    CliRunner().invoke(main, [command, str(mgm_run(tmp_path)), "--r", "8"])
    predicted = kept[0].predicted
    assert predicted is not None and predicted["breakdown"]["way"] == "closed form"
    assert predicted["setup"]["method"] == "lora" and predicted["setup"]["lora"]["r"] == 8
    json.dumps(predicted)


def test_a_run_that_cannot_be_predicted_is_run_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = _runs(monkeypatch, "smoke")
    ended = CliRunner().invoke(main, ["smoke", str(text_run(tmp_path, model_name_or_path="mine"))])
    assert "note: its memory was not predicted: " in ended.output and kept[0].predicted is None


def test_a_finished_run_teaches_the_estimates_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"device": {"expected": 10 * GIB}, "breakdown": {"way": "closed form"}, "gpu": "H200"}
    gpu = {"index": 0, "name": "NVIDIA H200", "before_B": 0}
    memory = {"predicted": told, "gpus": [gpu], "gpus_of_run": [0], "device_peak_B": 11 * GIB}
    for name in ("a", "b", "c"):
        write_json(tmp_path / f"runs/{name}/record.json", {"memory": memory})
    report = SimpleNamespace(
        folder=tmp_path / "runs/c", verdict=SimpleNamespace(lines=()), markdown=tmp_path / "RECORD.md", passed=True
    )
    monkeypatch.setattr("lorapatch.run.smoke", lambda *arguments, **more: report)
    assert CliRunner().invoke(main, ["smoke", str(mgm_run(tmp_path))]).exit_code == 0
    assert correction("H200", "closed form") == 1.1


def _runs(monkeypatch: pytest.MonkeyPatch, command: str) -> list[RunOptions]:
    kept: list[RunOptions] = []

    def instead(script: Path, patch: Any, options: RunOptions, **more: Any) -> None:
        kept.append(options)

    monkeypatch.setattr(f"lorapatch.run.{command}", instead)
    monkeypatch.setattr("lorapatch.cli.running._report", lambda report: None)
    return kept
