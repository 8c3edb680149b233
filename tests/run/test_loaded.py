"""The adapter of a run is loaded in a process of its own, and whatever happens there is a finding."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorapatch.run.loaded import load_adapter


def program(folder: Path, text: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_findings_of_the_other_process_are_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = """{"findings": [{"id": "effect", "tier": 2, "state": "fail", "sentence": "it does nothing", "figures": {"x": 0}}]}"""
    monkeypatch.setattr("lorapatch.run.loaded.sys.executable", program(tmp_path, f"echo '{words}'; exit 1"))
    (found,) = load_adapter(tmp_path)
    assert (found.id, found.tier, found.state, found.sentence) == ("effect", 2, "fail", "it does nothing")
    assert found.figures == {"x": 0}


def test_a_process_that_dies_leaves_the_adapter_unchecked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapatch.run.loaded.sys.executable", program(tmp_path, "echo 'out of memory' >&2; kill -9 $$"))
    (found,) = load_adapter(tmp_path)
    assert (found.state, found.sentence) == ("not checked", "loading it ended with -9 (out of memory)")


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapatch.run.loaded.sys.executable", program(tmp_path, "exec sleep 60"))
    (found,) = load_adapter(tmp_path, longest_s=0.3)
    assert (found.state, found.sentence) == ("not checked", "it was not loaded within 0.3 s")


def test_a_folder_without_an_adapter_is_unchecked_with_the_reason(tmp_path: Path) -> None:
    (found,) = load_adapter(tmp_path)
    assert found.state == "not checked" and "holds no adapter" in found.sentence
