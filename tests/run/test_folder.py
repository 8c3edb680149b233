"""A run's folder keeps everything as it comes, readable at any moment."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lorapatch.errors import Refused
from lorapatch.run.folder import RunFolder, read_jsonl
from lorapatch.run.log import Line
from lorapatch.run.session import read_log
from lorapatch.run.state import LoggedStep
from lorapatch.run.watch import MemorySample


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs", "smoke", "train it", now=0)


def log_of(folder: RunFolder) -> list[bytes]:
    return (folder.path / "log.txt").read_bytes().splitlines()


def test_folders_are_named_by_time_kind_and_script_and_never_shared(tmp_path: Path) -> None:
    names = [
        RunFolder(tmp_path / "runs", "smoke", name, now=0).path.name
        for name in ("train it", "train it", "../../x", "模型")
    ]
    assert names[0].endswith("-smoke-train_it") and names[1] == names[0] + ".2"
    assert names[2].endswith("-smoke-x") and names[3].endswith("-smoke-模型")
    assert all((tmp_path / "runs" / name).is_dir() for name in names)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(Refused, match="the run's folder cannot be made there"):
        RunFolder(tmp_path / "runs", "smoke", "x")


def test_lines_are_there_as_soon_as_they_are_written_with_their_bytes(folder: RunFolder) -> None:
    folder.write_line(Line(b"one \xff"), 0)
    assert log_of(folder) == [b"one \xff"]


def test_of_a_bar_its_states_are_kept_now_and_then_and_before_other_lines(folder: RunFolder) -> None:
    for tenth in range(1, 121):
        folder.write_line(Line(b"bar %d" % tenth, True), tenth / 10)
    folder.write_line(Line(b"{'loss': 1}"), 12.1)
    folder.write_line(Line(b"bar 120", True), 12.2)
    folder.write_line(Line(b"bar 121", True), 12.3)
    folder.close(13)
    assert log_of(folder) == [b"bar 1", b"bar 51", b"bar 101", b"bar 120", b"{'loss': 1}", b"bar 121"]


def test_numbers_that_json_has_not_are_written_as_words(folder: RunFolder) -> None:
    folder.write_step(LoggedStep(1.0, 1, 1, math.nan, math.inf))
    folder.write_memory(MemorySample(1, (), 1, 2, 3, 4))
    folder.write_json("record.json", {"x": [math.nan, {"path": Path("/a")}], "bad": "\udcff"})
    entry = read_jsonl(folder.path / "metrics.jsonl")[0]
    assert (entry["loss"], entry["grad_norm"], entry["learning_rate"]) == ("nan", "inf", None)
    assert json.loads((folder.path / "record.json").read_text())["x"] == ["nan", {"path": "/a"}]
    assert read_jsonl(folder.path / "memory.jsonl")[0]["host_rss_B"] == 1
    folder.close()
    folder.write_memory(MemorySample(1, (), 1, 2, 3, 4))  # a last sample of the watcher's thread


def test_gaps_are_filled_by_writing_the_steps_anew(folder: RunFolder) -> None:
    folder.write_step(LoggedStep(1.0, 1, 2, 2.0))
    folder.close()
    folder.rewrite_steps([LoggedStep(0.0, 1, 1, 3.0), LoggedStep(1.0, 1, 2, 2.0)])
    assert [entry["step"] for entry in read_jsonl(folder.path / "metrics.jsonl")] == [1, 2]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"a": 1}\n[1]\n{"a": ')
    assert read_jsonl(tmp_path / "m.jsonl") == [{"a": 1}]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_of_a_long_log_the_beginning_and_the_end_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"first\n" + b"x" * (3 << 20) + b"\nlast\n")
    text = read_log(path)
    assert text.startswith("first\n") and text.endswith("\nlast\n") and len(text) < 2 << 20
    path.write_bytes(b"short\n")
    assert read_log(path) == "short\n"
