"""The command line from end to end, in a temporary folder, with its exact messages and exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lorapatch.cli import main
from lorapatch.resources import resource_dir

TRAIN = "#!/bin/bash\ndeepspeed train.py \\\n  --learning_rate 2e-5 \\\n  --output_dir out\n"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("train.sh")
    path.write_text(TRAIN)
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def test_patch_says_what_it_did(script: Path) -> None:
    result = run("patch", "train.sh")
    assert result.exit_code == 0
    assert result.stderr == "train.sh: note: train.py was not found, so nobody checked that it takes these flags\n"
    assert result.stdout == (
        "train.sh: patched the finetune launch on line 2 (backup: train_backup.sh)\n"
        "    --lora_enable True\n    --lora_r 16\n    --lora_alpha 32\n    --lora_dropout 0.1\n    --lora_bias none\n"
    )
    again = run("patch", "train.sh")
    assert again.stdout == "train.sh: nothing to do, the finetune launch on line 2 has its LoRA flags\n"
    assert run("restore", "train.sh").stdout == "train.sh: restored\n"
    assert script.read_text() == TRAIN and sorted(p.name for p in Path().iterdir()) == ["train.sh"]


def test_diff_shows_and_check_tells_and_neither_writes(script: Path) -> None:
    result = run("patch", "--diff", "train.sh")
    assert result.exit_code == 0
    assert [line for line in result.stdout.splitlines() if line.startswith("+ ")][1] == "+  --lora_enable True \\"
    assert run("patch", "--check", "train.sh").exit_code == 1
    assert script.read_text() == TRAIN and len(list(Path().iterdir())) == 1
    run("patch", "train.sh")
    assert run("patch", "--check", "train.sh").exit_code == 0


def test_the_difference_has_colours_on_a_terminal_and_none_in_a_pipe(script: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lorapatch.cli", "patch", "--diff", "train.sh"]
    subprocess.run(command, stdout=theirs, stderr=subprocess.DEVNULL, check=True)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # what Linux says at the end of a terminal
        while data := os.read(ours, 4096):
            seen += data
    os.close(ours)
    assert b"\x1b[32m+  --lora_r 16" in seen and b"\x1b[31m-  --output_dir out" in seen
    assert b"\x1b" not in subprocess.run(command, capture_output=True).stdout


def test_output_goes_elsewhere(script: Path) -> None:
    assert run("patch", "train.sh", "-o", "lora.sh").exit_code == 0
    assert "--lora_r 16" in Path("lora.sh").read_text() and script.read_text() == TRAIN


def test_output_into_the_script_itself_is_a_patch_in_place_with_its_backup(script: Path) -> None:
    Path("link.sh").symlink_to("train.sh")
    assert "(backup: train_backup.sh)" in run("patch", "train.sh", "-o", "link.sh").stdout
    assert Path("link.sh").is_symlink() and Path("train_backup.sh").read_text() == TRAIN


def test_a_refusal_of_one_script_does_not_stop_the_others(script: Path) -> None:
    Path("bad.sh").write_text("echo hello\n")
    result = run("patch", "bad.sh", "missing.sh", "train.sh")
    assert result.exit_code == 3
    assert result.stderr.splitlines()[:2] == [
        "lorapatch: bad.sh: no launch was found: no deepspeed, torchrun, accelerate launch or python command that runs"
        " a trainer",
        "lorapatch: missing.sh: no such file",
    ]
    assert "--lora_r 16" in script.read_text()


def test_json_is_one_document_and_nothing_else(script: Path) -> None:
    Path("bad.sh").write_text("echo hello\n")
    result = run("patch", "--json", "train.sh", "bad.sh", "--r", "8")
    document = json.loads(result.stdout)
    assert document["schema"] == 1 and result.exit_code == 3
    good, bad = document["scripts"]
    assert good["changed"] and good["backup"].endswith("/train_backup.sh") and good["launch"]["line"] == 2
    assert good["settings"][1] == {"flag": "--lora_r", "before": None, "after": "8", "line": 4}
    assert bad["refused"].startswith("bad.sh: no launch")
    assert json.loads(run("inspect", "--json", "train.sh").stdout)["launches"][0]["line"] == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["patch", "train.sh", "--r", "0"], "the rank must be at least 1"),
        (["patch", "train.sh", "--dropout", "1"], "the dropout must be"),
        (["patch", "train.sh", "--set", "x"], "--set wants NAME=VALUE"),
        (["patch", "train.sh", "--preset", "huge"], "Invalid value for '--preset'"),
        (["patch", "train.sh", "other.sh", "-o", "x"], "-o takes one script"),
        (["patch"], "Missing argument"),
        (["frobnicate"], "No such command"),
    ],
)
def test_wrong_usage_ends_with_2_and_touches_nothing(script: Path, arguments: list[str], sentence: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and sentence in result.stderr
    assert script.read_text() == TRAIN


TRAINER = """
from dataclasses import dataclass, field
from transformers import HfArgumentParser, Trainer, TrainingArguments
from peft import LoraConfig, get_peft_model

@dataclass
class Arguments(TrainingArguments):
    use_lora: bool = field(default=False)
    lora_rank: int = 8
    lora_alpha: int = 16

def main():
    args, = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    model = make_model()
    if args.use_lora:
        model = get_peft_model(model, LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=["q_proj"]))
    Trainer(model=model, args=args).train()

main()
"""


def test_a_trainer_with_names_of_its_own_gets_those(script: Path) -> None:
    Path("train.py").write_text(TRAINER)
    result = run("patch", "train.sh")
    assert (
        script.read_text() == TRAIN.rstrip("\n") + " \\\n  --use_lora True \\\n  --lora_rank 16 \\\n  --lora_alpha 32\n"
    )
    assert "has no flag for lora_dropout" in result.stderr and "has no flag for lora_bias" in result.stderr
    assert run("patch", "--check", "train.sh").exit_code == 0


def test_a_flag_that_the_trainer_would_reject_is_refused(script: Path) -> None:
    Path("train.py").write_text(TRAINER)
    result = run("patch", "train.sh", "--dropout", "0.2")
    assert result.exit_code == 3 and "has no flag for lora_dropout" in result.stderr
    result = run("patch", "train.sh", "--set", "nonsense=1")
    assert result.exit_code == 3 and "--nonsense is not one of its flags" in result.stderr
    result = run("patch", "train.sh", "--target-modules", "v_proj", "--mode", "flags")
    assert result.exit_code == 0 and "lorapatch.attach" not in script.read_text()


def test_a_trainer_without_lora_is_refused_unless_told_not_to_look(script: Path) -> None:
    Path("train.py").write_text(
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--learning_rate')\np.parse_args()\n"
    )
    result = run("patch", "train.sh")
    assert result.exit_code == 3 and "puts no LoRA on its model" in result.stderr
    assert run("patch", "train.sh", "--mode", "flags").exit_code == 0


def test_inspect_shows_launches_reasons_flags_and_values(script: Path) -> None:
    script.write_text("OUT=out/ft\ndeepspeed train.py --learning_rate 2e-5 --output_dir $OUT --x $(date) --lora_r 8\n")
    out = run("inspect", "train.sh").stdout
    assert "1 line 2: deepspeed train.py — finetune" in out
    assert "because --output_dir says finetune" in out
    assert any(line.split() == ["2", "--output_dir", "out/ft"] for line in out.splitlines())
    assert "unresolved: $(date)" in out


def test_inspect_says_what_is_odd(script: Path) -> None:
    script.write_text("deepspeed train.py --a 1 --a 2 \\  # why\n  --b 2\n")
    out = run("inspect", "train.sh").stdout
    assert "--a is given 2 times" in out and "line 1: a comment stands behind the backslash" in out


def test_values_of_the_environment_can_be_given(script: Path) -> None:
    script.write_text("deepspeed train.py --learning_rate 1 --output_dir $ROOT/x\n")
    assert "/data/x" in run("inspect", "train.sh", "--set-env", "ROOT=/data").stdout


def test_the_script_of_the_plan_gets_five_lines_and_loses_none(tmp_path: Path) -> None:
    original = resource_dir("original_scripts") / "train_mgm_2b_stage_1_10k_baseline.sh"
    path = tmp_path / original.name
    shutil.copy(original, path)
    assert run("patch", str(path)).exit_code == 0
    before, after = original.read_text().splitlines(), path.read_text().splitlines()
    at = after.index("    --lora_enable True \\")
    assert after[at : at + 5] == [
        "    --lora_enable True \\",
        "    --lora_r 16 \\",
        "    --lora_alpha 32 \\",
        "    --lora_dropout 0.1 \\",
        "    --lora_bias none \\",
    ]
    assert after[:at] + after[at + 5 :] == before
    assert "finetuning.log" in after[at + 5]
    assert (tmp_path / "train_mgm_2b_stage_1_10k_baseline_backup.sh").read_text() == original.read_text()


def test_help_and_version_load_neither_parser() -> None:
    for arguments in (["inspect", "--help"], ["--version"]):
        program = (
            "import sys\nfrom lorapatch.cli import main\n"
            f"try: main({arguments!r})\nexcept SystemExit: pass\n"
            "print('LOADED', [m for m in ('bashlex', 'tree_sitter', 'jinja2', 'torch', 'rich') if m in sys.modules])"
        )
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert ran.stdout.splitlines()[-1] == "LOADED []", ran.stderr


def test_patching_needs_none_of_the_training_libraries(script: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft', 'deepspeed', 'accelerate', 'numpy'): sys.modules[name] = None\n"
        "from lorapatch.cli import main\nmain(['patch', 'train.sh'])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0 and "patched the finetune launch" in ran.stdout, ran.stderr


def test_a_command_that_needs_more_says_what_to_install(script: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'numpy', 'PIL'): sys.modules[name] = None\n"
        "from lorapatch.cli import main\nmain(['demo', 'toolkit'])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 3 and len(ran.stderr.splitlines()) == 1, ran.stderr
    assert 'is not installed, and demo needs it: pip install "lorapatch[train]"' in ran.stderr


def test_a_closed_pipe_ends_quietly(script: Path) -> None:
    script.write_text("".join(f"deepspeed train.py --a{i} {i}\n" for i in range(3000)))
    ran = subprocess.run(
        f"{sys.executable} -m lorapatch.cli inspect train.sh | head -1", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in ran.stderr and ran.stdout.startswith("train.sh: 3000 launches")


def test_check_tells_file_line_rule_and_remedy(script: Path) -> None:
    script.write_text("deepspeed train.py --learning_rate 1 \\  # why\n  --b 2\n")
    result = run("check", "train.sh", "--select", "LP1")
    assert result.exit_code == 1
    assert result.stdout.startswith("train.sh:1: error LP10") and "remedy:" in result.stdout
    document = json.loads(run("check", "train.sh", "--json").stdout)
    assert document["schema"] == 1 and document["diagnostics"][0]["line"] == 1
    assert run("check", "train.sh", "--format", "github").stdout.startswith("::error file=train.sh,line=1")
    assert json.loads(run("check", "train.sh", "--format", "sarif").stdout)["version"] == "2.1.0"
    script.write_text("echo hello\n")
    assert run("check", "train.sh").exit_code == 0


@pytest.mark.parametrize("name", ["test_lora_minimal", "probe", "full", "sbatch", "multinode"])
def test_check_finds_no_fault_in_what_is_rendered(script: Path, name: str) -> None:
    plan = resource_dir("original_scripts") / "train_mgm_2b_stage_1_10k_baseline.sh"
    assert run("render", str(plan), "--template", name, "-o", "rendered.sh").exit_code == 0
    result = run("check", "rendered.sh")
    assert result.exit_code == 0 and ": 0 errors" in result.stdout, result.stdout


def test_check_knows_its_rules(script: Path) -> None:
    assert {"LP100", "LP101"} <= {line.split()[0] for line in run("check", "--list").stdout.splitlines()}
    result = run("check", "train.sh", "--select", "LP999")
    assert result.exit_code == 2 and "there is no rule LP999" in result.stderr
    assert run("check").exit_code == 2


def test_check_asks_the_gpus_of_this_machine_for_bf16(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script.write_text("deepspeed train.py --learning_rate 1e-4 --bf16 True\n")
    assert run("check", "train.sh", "--select", "LP406").exit_code == 0
    monkeypatch.setattr("lorapatch.run.gpus.Gpus.__len__", lambda gpus: 1)
    monkeypatch.setattr("lorapatch.run.gpus.Gpus.supports_bf16", lambda gpus, index: False)
    result = run("check", "train.sh", "--select", "LP406")
    assert result.exit_code == 1 and "train.sh:1: error LP406 [no-bf16] --bf16 True, but" in result.stdout


def test_doctor_speaks_of_the_interpreter_that_a_script_names(script: Path) -> None:
    script.write_text("/nonexistent/python train.py --learning_rate 1\n")
    result = run("doctor", "--script", "train.sh", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 1 and document["schema"] == 1
    assert any("/nonexistent/python" in finding["sentence"] for finding in document["findings"])


def test_with_merge_puts_a_block_behind_the_launch_and_restore_takes_it_away(script: Path) -> None:
    assert run("patch", "--with-merge", "train.sh").exit_code == 0
    text = script.read_text()
    assert text.index("--lora_bias none") < text.index("# >>> lorapatch merge >>>") < text.index('lorapatch merge "$')
    again = run("patch", "--with-merge", "train.sh")
    assert again.stdout.startswith("train.sh: nothing to do") and script.read_text() == text
    assert run("patch", "--r", "8", "train.sh").exit_code == 0
    assert script.read_text() == text.replace("--lora_r 16", "--lora_r 8").replace("--lora_alpha 32", "--lora_alpha 16")
    run("restore", "train.sh")
    assert script.read_text() == TRAIN


def test_verify_and_merge_refuse_what_is_no_adapter(script: Path) -> None:
    Path("empty").mkdir()
    for arguments in (["verify", "empty"], ["merge", "empty", "-o", "out"], ["verify", "nowhere"]):
        result = run(*arguments)
        assert result.exit_code in (1, 3) and len((result.stderr + result.stdout).splitlines()) >= 1
        assert "Traceback" not in result.output
    assert not Path("out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("output", "said", "code"), [(">/dev/full", "standard output: No space left on device", 3), (">&-", "", 0)]
)
def test_an_output_that_takes_nothing_ends_with_a_sentence(script: Path, output: str, said: str, code: int) -> None:
    for command in ("inspect", "inspect --json", "patch --diff"):
        ran = subprocess.run(
            f"{sys.executable} -m lorapatch.cli {command} train.sh {output}", shell=True, capture_output=True, text=True
        )
        errors = [line for line in ran.stderr.splitlines() if "note:" not in line]
        assert (ran.returncode, errors) == (code, [f"lorapatch: {said}"] if said else [])


def test_a_trainer_root_that_is_no_folder_is_wrong_usage(script: Path) -> None:
    for command in ("patch", "check"):
        result = run(command, "train.sh", "--trainer-root", "nowhere")
        assert result.exit_code == 2 and "'nowhere' does not exist" in result.stderr
