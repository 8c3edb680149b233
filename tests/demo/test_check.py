"""`check` on the demo toolkit: no fault where there is none, and each fault of a user's at its line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import lorapatch
from lorapatch.lora.lint import check_script

NAME = "train_mgm_2b_stage_1_10k_baseline.sh"


@pytest.fixture
def script(quick_demo: Path, tmp_path: Path) -> Path:
    """The script in a toolkit of its own, which shares all else with the demo."""
    toolkit = tmp_path / quick_demo.name
    toolkit.mkdir()
    for entry in (*quick_demo.iterdir(), *quick_demo.parent.iterdir()):
        if entry.name not in (NAME, quick_demo.name):
            (toolkit if entry.parent == quick_demo else tmp_path).joinpath(entry.name).symlink_to(entry)
    return Path(shutil.copy(quick_demo / NAME, toolkit))


def line_of(script: Path, text: str) -> int:
    return max(number for number, line in enumerate(script.read_text().splitlines(), 1) if text in line)


def errors(script: Path) -> list[tuple[int, str]]:
    return [(found.line, found.rule) for found in check_script(script) if found.severity == "error"]


def test_the_script_is_clean_before_it_is_patched_and_without_errors_after(script: Path) -> None:
    assert check_script(script) == []
    lorapatch.patch_script(script, lorapatch.PatchOptions(learning_rate=2e-4), with_merge=True)
    assert [found.rule for found in check_script(script)] == ["LP403"]  # ZeRO's offload, which LoRA does not need


def test_a_wrong_model_path_an_unknown_flag_and_a_cut_command_are_told_at_their_lines(script: Path) -> None:
    text = script.read_text()
    with pytest.raises(lorapatch.Refused, match="--nonsense is not one of its flags"):
        lorapatch.patch_script(script, lorapatch.PatchOptions(extra={"nonsense": "1"}))
    lorapatch.patch_script(script, lorapatch.PatchOptions(extra={"nonsense": "1"}), mode="flags")
    assert errors(script) == [(line_of(script, "--nonsense"), "LP501")]
    script.write_text(text.replace("gemma-2b-it", "gemma-3b-it"))
    assert {rule for _, rule in errors(script)} == {"LP301"}
    script.write_text(text.replace("--group_by_modality_length True \\", "--group_by_modality_length True \\  # why"))
    assert (line_of(script, "# why"), "LP102") in errors(script)
