"""`patch` in attach mode: which words go where, what is refused, what stays as it is."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import lorapatch
from lorapatch import PatchOptions, Refused, patch_script, plan_patch, read_script
from lorapatch.cli import main
from lorapatch.launch.find import read_source

TRAINERS = Path(__file__).parents[1] / "attach"
FIVE = "--lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the toy trainers, and a `deepspeed` of this interpreter on PATH."""
    for name in ("plain.py", "own_lora.py", "toy.py"):
        shutil.copy(TRAINERS / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("deepspeed", "torchrun", "accelerate"):
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(lorapatch.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str) -> Path:
    Path("run.sh").write_text(text)
    return Path("run.sh")


def patched(text: str, options: PatchOptions | None = None, **more: object) -> str:
    return plan_patch(read_script(write(text)), options, **more).text.decode()  # type: ignore[arg-type]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("deepspeed plain.py --learning_rate 1e-4", "deepspeed --module lorapatch.attach plain.py --learning_rate 1e-4"),
        ("torchrun --nproc_per_node 2 plain.py --lr 1", "torchrun --nproc_per_node 2 -m lorapatch.attach plain.py --lr 1"),
        ("accelerate launch --num_processes 2 plain.py --lr 1",
         "accelerate launch --num_processes 2 -m lorapatch.attach plain.py --lr 1"),
        ("python -u plain.py --lr 1", "python -u -m lorapatch.attach plain.py --lr 1"),
        ("python -m torch.distributed.run --nproc_per_node=2 plain.py --lr 1",
         "python -m torch.distributed.run --nproc_per_node=2 -m lorapatch.attach plain.py --lr 1"),
        ("srun -p gpu env A=b nohup deepspeed plain.py --lr 1",
         "srun -p gpu env A=b nohup deepspeed --module lorapatch.attach plain.py --lr 1"),
        ("deepspeed --module pkg.plain --lr 1", "deepspeed --module lorapatch.attach -m pkg.plain --lr 1"),
        ("torchrun -m pkg.plain --lr 1", "torchrun -m lorapatch.attach -m pkg.plain --lr 1"),
        ('deepspeed "$HOME/a b/train.py" --lr 1', 'deepspeed --module lorapatch.attach "$HOME/a b/train.py" --lr 1'),
        ("python $(which deepspeed) plain.py --lr 1", "python $(which deepspeed) --module lorapatch.attach plain.py --lr 1"),
    ],
)  # fmt: skip
def test_each_launcher_is_told_to_run_lorapatch_attach(folder: Path, before: str, after: str) -> None:
    text = f"{before} --num_train_epochs 1\n"
    assert patched(text, mode="attach") == f"{after} --num_train_epochs 1 {FIVE}\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('CMD="deepspeed plain.py --learning_rate 1"\neval $CMD\n',
         f'CMD="deepspeed --module lorapatch.attach plain.py --learning_rate 1 {FIVE}"\neval $CMD\n'),
        ('CMD="deepspeed \\"$HERE/train.py\\" --learning_rate 1"\neval "$CMD"\n',
         f'CMD="deepspeed --module lorapatch.attach \\"$HERE/train.py\\" --learning_rate 1 {FIVE}"\neval "$CMD"\n'),
        ("ARGS=(\n  torchrun\n  plain.py\n  --learning_rate 1\n)\n\"${ARGS[@]}\"\n",
         "ARGS=(\n  torchrun\n  -m lorapatch.attach plain.py\n  --learning_rate 1\n  "
         + FIVE.replace(" --", "\n  --") + "\n)\n\"${ARGS[@]}\"\n"),
        ("bash -c 'torchrun plain.py --learning_rate 1'\n",
         f"bash -c 'torchrun -m lorapatch.attach plain.py --learning_rate 1 {FIVE}'\n"),
    ],
)  # fmt: skip
def test_a_launch_in_a_string_or_an_array_is_attached_there(folder: Path, before: str, after: str) -> None:
    assert patched(before, mode="attach") == after


def test_a_trainer_without_lora_is_attached_by_itself_said_and_undone(folder: Path) -> None:
    text = "deepspeed plain.py \\\n  --learning_rate 2e-4 \\\n  --output_dir out 2>&1 | tee log\n"
    script = write(text)
    assert run("patch", "run.sh", "--check").exit_code == 1
    done = run("patch", "run.sh")
    assert done.exit_code == 0 and "    --module lorapatch.attach plain.py\n    --lora_enable True\n" in done.stdout
    assert "attach mode:" in done.stderr and "puts no LoRA on its model" in done.stderr
    assert script.read_text().startswith("deepspeed --module lorapatch.attach plain.py \\\n  --learning_rate 2e-4 \\\n")
    for options in ([], ["--mode", "attach"], ["--mode", "flags"]):
        again = run("patch", "run.sh", *options)
        assert again.stdout == "run.sh: nothing to do, the finetune launch on line 1 has its LoRA flags\n", options
    assert run("check", "run.sh").exit_code == 0
    assert "finetune, LoRA by lorapatch.attach" in run("inspect", "run.sh").stdout
    changed = run("patch", "run.sh", "--r", "8")
    assert changed.exit_code == 0 and "    --lora_r 8   (was 16)\n" in changed.stdout
    assert run("restore", "run.sh").exit_code == 0 and script.read_text() == text


def test_the_launch_is_read_as_its_trainer_s(folder: Path) -> None:
    patch_script(write("deepspeed --num_gpus 2 plain.py --learning_rate 1 --output_dir out\n"))
    (launch,) = read_script("run.sh").launches
    assert launch.attached and launch.trainer.name == "plain.py" and not launch.trainer.module and launch.runs_module
    assert [word.text for word in launch.launcher_options] == ["--num_gpus", "2", "--module"]
    assert launch.stage.name == "finetune" and launch.flag("output_dir") is not None
    assert read_script("run.sh").as_dict()["launches"][0]["attached"] is True


def test_hard_wired_target_modules_are_set_by_attach_and_the_rest_by_the_trainer_s_own_flags(folder: Path) -> None:
    text = "deepspeed own_lora.py --learning_rate 1\n"
    assert patched(text) == text.replace("\n", " --lora_enable True --lora_rank 16 --lora_alpha 32\n")
    wanted = patched(text, PatchOptions(target_modules="q_proj,v_proj"))
    assert wanted == (
        "deepspeed --module lorapatch.attach own_lora.py --learning_rate 1 --lora_enable True --lora_rank 16"
        " --lora_alpha 32 --lora_target_modules q_proj,v_proj\n"
    )
    write(wanted)
    assert not plan_patch(read_script("run.sh"), PatchOptions(target_modules="q_proj,v_proj")).changed
    assert not plan_patch(read_script("run.sh")).changed
    preset = patched(text, PatchOptions(preset="aggressive"), mode="attach")
    assert preset.endswith("--lora_dropout 0.1 --lora_target_modules q_proj,v_proj --gradient_checkpointing True\n")


def test_a_variant_that_the_trainer_has_no_flag_for_is_a_reason_to_attach(folder: Path) -> None:
    result = patched("deepspeed own_lora.py --learning_rate 1\n", PatchOptions(extra={"lora_variant": "dora"}))
    assert "lorapatch.attach own_lora.py" in result and result.endswith("--lora_alpha 32 --lora_variant dora\n")


def test_flags_mode_never_attaches(folder: Path) -> None:
    assert "lorapatch.attach" not in patched("deepspeed plain.py --learning_rate 1\n", mode="flags")


def test_by_path_the_interpreter_needs_nothing(folder: Path) -> None:
    text = "env_of_old/bin/python plain.py --learning_rate 1\n"
    path = Path(lorapatch.__file__).with_name("attach.py")
    result = patched(text, attach_path=True)
    assert result == f"env_of_old/bin/python {path} plain.py --learning_rate 1 {FIVE}\n"
    write(result)
    (launch,) = read_script("run.sh").launches
    assert launch.attached and not launch.runs_module and launch.trainer.name == "plain.py"
    assert not plan_patch(read_script("run.sh")).changed
    with pytest.raises(Refused, match="told to run a module, pkg.plain"):
        patched("torchrun -m pkg.plain --learning_rate 1\n", mode="attach", attach_path=True)


def test_an_interpreter_that_cannot_import_lorapatch_is_refused_with_the_remedies(folder: Path) -> None:
    python = folder / "bin" / "python3"
    python.write_text("#!/bin/bash\n[[ $PYTHONPATH == */has/it ]]\n")
    python.chmod(0o755)
    text = f"{python} plain.py --learning_rate 1\n"
    with pytest.raises(Refused) as refusal:
        patched(text)
    said = str(refusal.value)
    assert said.startswith(f"line 1: {python} cannot import lorapatch, which attach mode runs there; {python} -m pip install")
    assert "--no-deps lorapatch" in said and "--attach-path" in said
    assert "lorapatch.attach" in patched(f"PYTHONPATH=/has/it {text}")
    assert "lorapatch.attach" in patched(f"export PYTHONPATH=/has/it\n{text}")
    assert run("patch", "run.sh", "--attach-path", "--check").exit_code == 1


def test_an_interpreter_that_nobody_knows_yet_is_noted(folder: Path) -> None:
    plan = plan_patch(read_script(write("conda activate old\ndeepspeed plain.py --learning_rate 1\n")))
    assert any("was not checked (the script activates an environment)" in note for note in plan.notes)
    plan = plan_patch(read_script(write("/nowhere/bin/python plain.py --learning_rate 1\n")))
    assert any("was not checked (its python was not found here)" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("deepspeed plain.py --learning_rate 1\n", {"bits": 4}, "attach mode cannot quantize it"),
        ("torchrun --no_python plain.py --learning_rate 1\n", {}, "runs the trainer without python"),
        ("RUN='torchrun plain.py'\n$RUN --learning_rate 1\n$RUN --learning_rate 2\n", {"stage": "2"},
         "takes its trainer from the same words"),
        ("deepspeed toy.py --learning_rate 1\n", {}, "makes no transformers Trainer"),
    ],
)  # fmt: skip
def test_what_attach_mode_cannot_do_is_refused(folder: Path, text: str, options: dict[str, object], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        patched(text, PatchOptions(**options), mode="attach")  # type: ignore[arg-type]
    assert Path("run.sh").read_text() == text


def test_sixteen_bits_need_no_flag(folder: Path) -> None:
    assert "--bits" not in patched("deepspeed plain.py --learning_rate 1\n", PatchOptions(bits=16))


def test_the_commands_of_several_nodes_and_a_rendered_job_go_through_it_too(folder: Path) -> None:
    from lorapatch.run.nodes import node_commands
    from lorapatch.run.render import render

    patch_script(write("deepspeed plain.py --learning_rate 1 --output_dir out\n"))
    script = read_script("run.sh")
    (node,) = node_commands(script, script.launches[0], {"a": 2})
    assert " --module lorapatch.attach plain.py --learning_rate 1 " in node.command
    rendered = render(script, script.launches[0], "probe")
    (launch,) = read_source(rendered.text).launches
    assert launch.attached and launch.trainer.name == "plain.py"
