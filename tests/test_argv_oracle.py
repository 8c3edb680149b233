"""What the commands of each case are given, before the patch and after it, as bash itself hands it to them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from cases import DEFAULT, PATCHED, Case
from click.testing import CliRunner
from oracle import Call, fault, run_script

from lorapatch import PatchOptions, plan_patch, read_script
from lorapatch.cli import main
from lorapatch.launch.find import read_source

# Written with the mistakes that a patcher makes; the oracle has to see each of them.
SCRIPT = b"""\
deepspeed train.py --tune_mm_mlp_adapter True --output_dir out/pretrain
deepspeed --num_gpus 2 train.py \\
    --prompt "a  b" \\
    --output_dir out \\
    2>&1 | tee train.log
echo done
"""
FLAGS = b"--lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none"
RIGHT = SCRIPT.replace(b"--output_dir out \\\n", b"--output_dir out " + FLAGS + b" \\\n")
WRONG = {
    "on the other launch": SCRIPT.replace(b"out/pretrain", b"out/pretrain " + FLAGS),
    "on both launches": RIGHT.replace(b"out/pretrain", b"out/pretrain " + FLAGS),
    "behind the pipe": SCRIPT.replace(b"train.log", b"train.log " + FLAGS),
    "behind a comment sign": SCRIPT.replace(b"out \\\n    2>", b"out # " + FLAGS + b"\n: 2>"),
    "before the trainer": SCRIPT.replace(b"--num_gpus 2", b"--num_gpus 2 " + FLAGS),
    "a value is missing": RIGHT.replace(b"--lora_r 16", b"--lora_r"),
    "a wrong value": RIGHT.replace(b"--lora_r 16", b"--lora_r 61"),
    "a flag is missing": RIGHT.replace(b" --lora_bias none", b""),
    "a flag twice": RIGHT.replace(b"--lora_r 16", b"--lora_r 16 --lora_r 16"),
    "in another order": RIGHT.replace(b" --lora_bias none", b"").replace(b"--lora_r", b"--lora_bias none --lora_r"),
    "in two places": RIGHT.replace(b" --lora_bias none", b"").replace(b"--prompt", b"--lora_bias none --prompt"),
    "the backslash was lost": RIGHT.replace(b"out " + FLAGS + b" \\", b"out\n" + FLAGS + b" \\"),
    "a quote was lost": RIGHT.replace(b'"a  b"', b"a  b"),
    "a blank was lost": RIGHT.replace(b"a  b", b"a b"),
    "glued to the last word": RIGHT.replace(b"out --lora", b"out--lora"),
    "a launch was dropped": RIGHT.replace(b"deepspeed train.py --tune", b"# deepspeed train.py --tune"),
    "another launcher": RIGHT.replace(b"deepspeed --num", b"torchrun --num"),
    "the environment changed": RIGHT.replace(b"deepspeed --num", b"WANDB_MODE=off deepspeed --num"),
    "all flags in one word": RIGHT.replace(FLAGS, b"'" + FLAGS + b"'"),
    "nothing was done": SCRIPT,
}


@cache
def calls(case: Case, text: bytes) -> list[Call]:
    run = case.facts.get("run", {})
    return run_script(text, run.get("args", []), run.get("env", {}))


def assert_right(case: Case, text: bytes, attach: Sequence[str] = ()) -> None:
    facts = case.facts
    if "skip_run" in facts:
        pytest.skip(facts["skip_run"])
    trainer = last_part(facts["launches"][facts["patched"]])
    # Where other launches have the same trainer, the case says by which word this one is known.
    alone = [last_part(launch) for launch in facts["launches"]].count(trainer) == 1
    mark = trainer if alone else facts["mark"]
    assert fault(calls(case, case.text), calls(case, text), case.flags, trainer, mark, attach) is None


@pytest.mark.parametrize("case", PATCHED, ids=str)
def test_attach_mode_puts_lorapatch_attach_before_the_one_trainer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapatch.lora.plan.check_interpreter", lambda script, launch: None)
    options = dict(zip(case.options[::2], case.options[1::2]))
    script = read_script(case.script)
    patch = plan_patch(script, PatchOptions(stage=options.get("--stage")), mode="attach")
    assert "lorapatch.attach" in patch.attach and patch.text.count(b"lorapatch.attach") == 1
    if "flags" not in case.facts:
        assert_right(case, patch.text, patch.attach)
    again = read_source(patch.text, script.path)
    assert again.launches[patch.launch.number - 1].attached
    assert not plan_patch(again, PatchOptions(stage=options.get("--stage"))).changed


def last_part(launch: dict[str, str]) -> str:
    return launch["trainer"].rsplit("/", 1)[-1]


@pytest.mark.parametrize("case", PATCHED, ids=str)
def test_the_expected_text_hands_the_flags_to_the_one_launch(case: Case) -> None:
    assert_right(case, case.expected)


@pytest.mark.parametrize("case", PATCHED, ids=str)
def test_what_patch_writes_hands_the_flags_to_the_one_launch(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out.sh"
    result = CliRunner().invoke(main, ["patch", str(case.script), *case.options, "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert_right(case, out.read_bytes())


def test_the_oracle_accepts_a_right_patch() -> None:
    assert fault(run_script(SCRIPT), run_script(RIGHT), DEFAULT, "train.py", "--num_gpus") is None


@pytest.mark.parametrize("mistake", WRONG)
def test_the_oracle_sees_a_wrong_patch(mistake: str) -> None:
    assert WRONG[mistake] != RIGHT
    assert fault(run_script(SCRIPT), run_script(WRONG[mistake]), DEFAULT, "train.py", "--num_gpus") is not None


def test_the_oracle_runs_none_of_the_script_s_programs(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("still here")
    text = f"rm -rf {kept}\ncp /dev/null {kept}\nrsync -a x {kept}\npython -c 'open(0)'\n{kept}\n".encode()
    assert [call.program for call in run_script(text)] == ["rm", "cp", "rsync", "python"]
    assert kept.read_text() == "still here"


def test_the_oracle_sees_through_wrappers_and_waits_for_the_background() -> None:
    text = b"""\
export A=1
srun -p gpu --gres=gpu:2 env -u A B=2 nohup deepspeed train.py "x y" > log 2>&1 &
CMD="torchrun train.py 'c  d'"; bash -c "$CMD"
exec /opt/conda/bin/python $(which deepspeed) train.py
"""
    found = {call.program: call for call in run_script(text)}
    assert found["srun"].argv == (b"-p", b"gpu", b"--gres=gpu:2")
    assert found["deepspeed"] == Call("deepspeed", (b"train.py", b"x y"), ((b"B", b"2"),))
    assert found["torchrun"].argv == (b"train.py", b"c  d")
    assert found["python"].argv == (b"/bin/deepspeed", b"train.py")
