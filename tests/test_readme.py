"""The README is true: its commands are run, and print what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import lorapatch
from lorapatch.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()
# Commands whose output is not the same everywhere; their own tests look at what they do.
ELSEWHERE = ("estimate", "smoke", "tune", "full", "demo", "doctor", "monitor", "render")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def sessions() -> list[tuple[str, str]]:
    """(command, output) of every command in the README's console blocks, in order."""
    found = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command.partition("#")[0].strip(), output))
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("my.sh").write_text(blocks("bash")[0])
    Path("cut.sh").write_text("deepspeed train.py --learning_rate 1e-5 \\   # by hand\n    --output_dir out\n")
    return tmp_path


def test_the_commands_print_what_the_readme_says(folder: Path) -> None:
    ran = 0
    for command, output in sessions():
        program, *arguments = shlex.split(command)
        if program != "lorapatch" or arguments[0] in ELSEWHERE:
            continue
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        said = [line.rstrip() for line in result.output.splitlines() if "note:" not in line]
        assert said == [line.rstrip() for line in output.splitlines()], command
        ran += 1
    assert ran >= 7
    assert Path("my.sh").read_text() == blocks("bash")[0]


def test_the_library_example_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[0], "README.md", "exec"), {"__name__": "readme"})
    assert "3 deepspeed finetune" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["cut.sh", "my.sh"]


def test_every_command_and_make_target_it_names_exists() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for command in set(re.findall(r"(?:`|^\$ )lorapatch ([a-z]+)\b", README, re.MULTILINE)):
        assert command in main.list_commands(click.Context(main)), command


def test_exit_codes_are_those_of_the_exceptions() -> None:
    rows = README.partition("| exit code |")[2].partition("\n\n")[0]
    table = dict(re.findall(r"^\| (\d) \| (.*?) \|$", rows, re.MULTILINE))
    assert set(table) == {"0", "1", "2", "3", "4"}
    for error, code, word in (
        (lorapatch.UsageError, 2, "usage"),
        (lorapatch.Refused, 3, "refused"),
        (lorapatch.RunFailed, 4, "failed"),
    ):
        assert error.exit_code == code and word in table[str(code)]
