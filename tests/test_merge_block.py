"""The merge block stands behind the launch, gives lorapatch its folder, and stops the script if the merge fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cases import PATCHED, Case
from oracle import Call, run_script

from lorapatch.errors import Refused
from lorapatch.launch.find import read_source
from lorapatch.lora.choose import choose_launch
from lorapatch.lora.merge_block import find_merge_block, merge_block, merge_edits
from lorapatch.shell.edit import apply_edits
from lorapatch.shell.syntax import syntax_error

PLAN = Path(__file__).parents[1] / "original_scripts" / "train_mgm_2b_stage_1_10k_baseline.sh"
TRAIN = "deepspeed train.py --deepspeed z.json --learning_rate 1e-5"


def with_block(text: bytes, stage: str | None = None) -> bytes:
    script = read_source(text)
    return apply_edits(text, merge_edits(script, choose_launch(script, stage)))


def refusal(text: str) -> str:
    with pytest.raises(Refused) as caught:
        with_block(text.encode())
    return str(caught.value)


def test_the_plans_script_gets_it_between_fine_tuning_and_evaluation() -> None:
    before = PLAN.read_bytes()
    after = with_block(before)
    block = b"""
# >>> lorapatch merge >>> the stages below need a whole model; the adapter is kept beside it, as NAME-lora
lorapatch_output=$SCRIPT_DIR/../output/training_dirs/$FINETUNE_NAME
if ! lorapatch merge "$lorapatch_output" -o "$lorapatch_output"; then
    echo "lorapatch: $lorapatch_output was not merged; stopped, because the stages below need a whole model" >&2
    exit 1
fi
# <<< lorapatch merge <<<
"""
    start = after.index(b"# >>> lorapatch")
    assert after[: start - 1].endswith(b"/finetuning.log") and after[start - 1 :].startswith(block)
    assert after.replace(block[1:], b"") == before
    assert syntax_error(after) is None


def test_a_second_time_changes_nothing_and_an_old_block_is_brought_up_to_date() -> None:
    once = with_block(PLAN.read_bytes())
    assert with_block(once) == once
    span = find_merge_block(once)
    assert span is not None
    older = once[: span[0]] + once[slice(*span)].replace(b"exit 1", b"exit 7") + once[span[1] :]
    assert with_block(older) == once


def test_a_block_that_stands_elsewhere_moves() -> None:
    text = f"{TRAIN} --output_dir a\necho one\n".encode()
    block = merge_block("old").encode()
    moved = with_block(text + block + b"echo two\n")
    assert moved == with_block(text) + b"echo two\n"


@pytest.mark.parametrize("case", PATCHED[::3], ids=str)
def test_bash_hands_it_the_folder_of_the_launch_and_nothing_else_changes(case: Case) -> None:
    if "skip_run" in case.facts:
        pytest.skip(case.facts["skip_run"])
    options = case.options
    stage = options[options.index("--stage") + 1] if "--stage" in options else None
    try:
        text = with_block(case.expected, stage)
    except Refused:
        pytest.skip("no block can follow this launch")
    assert with_block(text, stage) == text
    run = case.facts.get("run", {})
    before = run_script(case.expected, run.get("args", []), run.get("env", {}))
    after = run_script(text, run.get("args", []), run.get("env", {}))
    merges = [number for number, call in enumerate(after) if call.program == "lorapatch"]
    assert merges
    assert sorted(map(str, before)) == sorted(str(call) for call in after if call.program != "lorapatch")
    for number in merges:
        trained = [call for call in after[:number] if outputs(call)]
        folder = outputs(trained[-1])[-1]
        assert after[number].argv == (b"merge", folder, b"-o", folder)


def outputs(call: Call) -> list[bytes]:
    """The values of --output_dir."""
    behind = [after for word, after in zip(call.argv, call.argv[1:]) if word == b"--output_dir"]
    return behind + [word.split(b"=", 1)[1] for word in call.argv if word.startswith(b"--output_dir=")]


@pytest.mark.parametrize(
    ("word", "folder"),
    [
        ("out", "out"),
        ('"two words"', "two words"),
        ("'$not a variable'", "$not a variable"),
        ("$HERE/$NAME", "here/my name"),
        ('"$HERE"/model-"$NAME"', "here/model-my name"),
        ("${HERE:-there}/x", "here/x"),
        ("a\\ b", "a b"),
        ("$'tab\\there'", "tab\there"),
        ("{here}/100%", "{here}/100%"),
        ("out-$((1 + 1))", "out-2"),
    ],
)
@pytest.mark.parametrize("works", [True, False])
def test_it_runs_and_a_merge_that_fails_stops_the_script(word: str, folder: str, works: bool, tmp_path: Path) -> None:
    stub = tmp_path / "bin" / "lorapatch"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > "{tmp_path}/argv"\nexit {0 if works else 3}\n')
    (tmp_path / "bin" / "deepspeed").write_text("#!/bin/bash\n")
    for program in stub.parent.iterdir():
        program.chmod(0o755)
    text = f"set -eu\nHERE=here NAME='my name'\n{TRAIN} --output_dir {word} 2>&1 | tee log\necho evaluated\n"
    script = tmp_path / "run.sh"
    script.write_bytes(with_block(text.encode()))
    environment = {"PATH": f"{stub.parent}:/usr/bin:/bin"}
    done = subprocess.run(["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (tmp_path / "argv").read_text().split("\0")[:-1] == ["merge", folder, "-o", folder]
    assert done.stdout == ("evaluated\n" if works else "")
    said = f"lorapatch: {folder} was not merged; stopped, because the stages below need a whole model\n"
    assert (done.returncode, done.stderr) == ((0, "") if works else (1, said))


def test_without_lorapatch_on_the_path_the_script_stops_too(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(merge_block("out") + "echo evaluated\n")
    done = subprocess.run(["/bin/bash", script], env={"PATH": "/nowhere"}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and "out was not merged; stopped" in done.stderr


def test_it_takes_the_indentation_of_the_launch() -> None:
    after = with_block(f"if true; then\n\t{TRAIN} --output_dir out\nfi\n".encode()).decode()
    lines = after.splitlines()[2:-1]
    assert len(lines) == 7 and all(line.startswith("\t") for line in lines) and syntax_error(after.encode()) is None


@pytest.mark.parametrize(
    ("text", "behind"),
    [
        (f"{TRAIN} --output_dir out", ""),  # no end of line
        (f"{TRAIN} --output_dir out \\\n", ""),
        (f"{TRAIN} --output_dir out \\", ""),
        (f"{TRAIN} --output_dir out # why \\\necho x\n", "echo x\n"),
        (f"{TRAIN} --output_dir out || exit 1\necho x\n", "echo x\n"),
        (f"{TRAIN} --output_dir out || {{\n  echo failed\n  exit 1\n}}\necho x\n", "echo x\n"),
        (f"{TRAIN} --output_dir out && echo good\necho x\n", "echo x\n"),
        (f"{TRAIN} --output_dir out; echo $?\necho x\n", "echo x\n"),
        (f"{TRAIN} --output_dir out <<EOF\nyes\nEOF\necho x\n", "echo x\n"),
        (f"{TRAIN} --output_dir out > log 2>&1\necho x\n", "echo x\n"),
    ],
)
def test_it_stands_behind_the_whole_statement(text: str, behind: str) -> None:
    after = with_block(text.encode())
    assert after.endswith(merge_block("out").encode() + behind.encode())
    assert syntax_error(after) is None and with_block(after) == after


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TRAIN, "line 1: --with-merge needs the launch's --output_dir, and it has none"),
        (
            f"{TRAIN} --output_dir out-$(date +%s)",
            "would be another folder the second time; put it in a variable first",
        ),
        (f"{TRAIN} --output_dir `pwd`/out", "would be another folder the second time"),
        (f"{TRAIN} --output_dir out-$RANDOM", "would be another folder the second time"),
        (f"{TRAIN} --output_dir out &\nwait\n", "runs in the background"),
        (f"{TRAIN} --output_dir out && bash eval.sh\n", "is followed by &&"),
        (f"{TRAIN} --output_dir out; bash eval.sh\n", "has more commands behind it on its line"),
        (f"if {TRAIN} --output_dir out; then echo good; fi\n", "is a condition"),
        (f"until {TRAIN} --output_dir out; do sleep 1; done\n", "is a condition"),
        (f"(\n{TRAIN} --output_dir out\n)\n", "where exit would not stop the script"),
        (f"{{\n{TRAIN} --output_dir out\n}} | tee log\n", "where exit would not stop the script"),
        (f"exec {TRAIN} --output_dir out\n", "is run by exec, so nothing behind it runs"),
    ],
)
def test_where_it_cannot_stand_the_reason_is_given(text: str, reason: str) -> None:
    assert reason in refusal(text)
