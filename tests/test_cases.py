"""Every script of tests/cases: the patch is the expected bytes or the expected refusal, and a second one does nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cases import CASES, PATCHED, REFUSED, Case
from click.testing import CliRunner, Result

import lorapatch
from lorapatch.cli import main

READ = [case for case in CASES if case.facts["launches"] is not None]


def patch(script: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["patch", str(script), *options])


def copy_to(folder: Path, text: bytes) -> Path:
    script = folder / "launch.sh"
    script.write_bytes(text)
    return script


@pytest.mark.parametrize("case", PATCHED, ids=str)
def test_patched_text_is_the_expected_one_byte_for_byte(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out.sh"
    result = patch(case.script, *case.options, "-o", str(out))
    assert result.exit_code == 0, result.output
    assert out.read_bytes() == case.expected


@pytest.mark.parametrize("case", PATCHED, ids=str)
def test_check_says_by_its_exit_code_whether_the_patch_would_change_the_script(case: Case, tmp_path: Path) -> None:
    script = copy_to(tmp_path, case.text)
    assert patch(script, *case.options, "--check").exit_code == int(case.expected != case.text)
    assert script.read_bytes() == case.text
    assert list(tmp_path.iterdir()) == [script]


@pytest.mark.parametrize("case", PATCHED, ids=str)
def test_a_patched_script_is_left_as_it_is(case: Case, tmp_path: Path) -> None:
    script = copy_to(tmp_path, case.expected)
    assert patch(script, *case.options, "--check").exit_code == 0
    result = patch(script, *case.options)
    assert result.exit_code == 0, result.output
    assert script.read_bytes() == case.expected
    assert list(tmp_path.iterdir()) == [script]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_refusal_names_its_cause_and_writes_nothing(case: Case, tmp_path: Path) -> None:
    script = copy_to(tmp_path, case.text)
    out = tmp_path / "out.sh"
    result = patch(script, *case.options, "-o", str(out))
    assert result.exit_code == 3, result.output
    assert str(script) in result.stderr
    message = result.stderr.replace(str(script), "FILE")
    assert not [phrase for phrase in case.phrases if not says(message, phrase)], message
    assert message.count("\n") == 1
    assert result.stdout == ""
    assert script.read_bytes() == case.text
    assert list(tmp_path.iterdir()) == [script]


def says(message: str, phrase: str) -> bool:
    """``line N`` is also said by FILE:N: in front of the sentence."""
    line = re.fullmatch(r"line (\d+)", phrase)
    if line is None:
        return phrase.lower() in message.lower()
    return re.search(rf"FILE:{line[1]}:|\bline {line[1]}\b", message) is not None


@pytest.mark.parametrize("case", READ, ids=str)
def test_reading_finds_the_launches(case: Case) -> None:
    wanted = case.facts["launches"]
    found = [described(launch) for launch in lorapatch.read_script(case.script).launches]
    assert len(found) == len(wanted), found
    # The case says what is certain; what it leaves out may be read in more than one way.
    assert [{fact: launch[fact] for fact in sure} for launch, sure in zip(found, wanted)] == [
        {**sure, "trainer": last_part(sure["trainer"])} for sure in wanted
    ]


@pytest.mark.parametrize("case", [case for case in PATCHED if case.expected != case.text], ids=str)
def test_the_plan_names_the_launch_that_is_patched(case: Case) -> None:
    script = lorapatch.read_script(case.script)
    stage = dict(zip(case.options[::2], case.options[1::2])).get("--stage")
    plan = lorapatch.plan_patch(script, lorapatch.PatchOptions(stage=stage))
    assert script.launches.index(plan.launch) == case.facts["patched"]


def described(launch: Any) -> dict[str, Any]:
    return {
        "line": launch.line,
        "launcher": launch.launcher,
        "trainer": last_part(launch.trainer.name),
        "stage": launch.stage.name,
        "training": launch.stage.training,
    }


def last_part(trainer: str) -> str:
    return trainer.rsplit("/", 1)[-1]
