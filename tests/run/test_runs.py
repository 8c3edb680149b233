"""smoke and full from the outside: patched, rendered, run, judged, recorded; and refused where they cannot work."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from toykit import make_toykit

from lorapatch.errors import Refused, UsageError
from lorapatch.lora.flags import PatchOptions
from lorapatch.run.finish import Report
from lorapatch.run.folder import read_jsonl
from lorapatch.run.processes import COOKIE
from lorapatch.run.runs import RunOptions, full, smoke
from lorapatch.run.state import LoggedStep
from lorapatch.run.view import PlainView
from lorapatch.run.watch import MemorySample

GIB = 1 << 30
WORKS = "loaded with its base, the adapter works"


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("TOY_MODE", raising=False)
    return make_toykit(tmp_path / "kit")


def options(tmp_path: Path, **more: object) -> RunOptions:
    return RunOptions(runs=tmp_path / "runs", interval_s=0.3, **more)  # type: ignore[arg-type]


def lines(report: Report) -> dict[str, str]:
    return {line.what: line.state for line in report.verdict.lines}


def record(report: Report) -> dict[str, object]:
    found: dict[str, object] = json.loads((report.folder / "record.json").read_text())
    return found


def test_a_smoke_patches_runs_five_steps_judges_and_records(kit: Path, tmp_path: Path) -> None:
    said: list[str] = []
    report = smoke(kit, None, options(tmp_path, budget_B=8 * GIB), view=PlainView(said.append))
    assert report.passed, report.sentence
    assert {what for what, state in lines(report).items() if state != "pass"} == {WORKS}
    assert lines(report)[WORKS] == "not checked"  # the toy's model is none
    assert (kit.parent / "train toy_backup.sh").is_file() and b"--lora_enable True" in kit.read_bytes()
    assert any("patched" in sentence for sentence in said)
    assert any("pretrain_mm_mlp_adapter is made by line 8, which has not run" in sentence for sentence in said)
    assert not (kit.parent / "out").exists()  # the real run's directory is not touched
    steps = read_jsonl(report.folder / "metrics.jsonl")
    assert [(step["step"], step["loss"]) for step in steps] == [(i, pytest.approx(2.5 - 0.2 * i)) for i in range(1, 6)]
    assert steps[-1]["samples_per_s"] > 8  # 2 samples, 4 times, in 0.05 s
    assert read_jsonl(report.folder / "memory.jsonl")[0]["gpus"] == []
    assert (report.folder / "script.sh").read_bytes() == (kit.parent / "test_lora_minimal.sh").read_bytes()


def test_the_record_holds_everything_that_is_promised(kit: Path, tmp_path: Path) -> None:
    found = record(smoke(kit, None, options(tmp_path, predicted={"device_B": 5})))
    assert found["schema"] == 1 and found["kind"] == "smoke"
    script, launch = found["script"], found["launch"]
    assert "+    --lora_enable True" in script["diff"] and script["original_sha256"] != script["patched_sha256"]  # type: ignore[index]
    argv = launch["argv"]  # type: ignore[index]
    assert argv[1] == str(kit.parent / "train.py") and argv[argv.index("--max_steps") + 1] == "5"
    assert {path["name"]: path["state"] for path in launch["paths"]} == {  # type: ignore[index]
        "--model_name_or_path": "there", "--data_path": "there", "--pretrain_mm_mlp_adapter": "made by line 8",
    }  # fmt: skip
    versions = found["versions"]
    assert versions["python"].count(".") == 2 and "peft" in versions and "driver" in versions  # type: ignore[index]
    memory = found["memory"]
    assert memory["host_rss_peak_B"] > 1 << 20 and memory["predicted"] == {"device_B": 5}  # type: ignore[index]
    assert found["metrics"]["first_loss"] == pytest.approx(2.3)  # type: ignore[index]
    adapter = found["adapter"]
    assert len(adapter["sha256"]) == 64 and adapter["lora_parameters"] == 16 * 8  # type: ignore[index]
    assert found["checkpoints"] == ["checkpoint-2", "checkpoint-4"] and found["diagnosis"] is None
    assert found["next_step"] == f"lorapatch full '{kit}'"
    assert found["outcome"]["state"] == "finished" and found["outcome"]["started"][:4].isdigit()  # type: ignore[index]


def test_the_plans_record_is_appended_in_either_language(kit: Path, tmp_path: Path) -> None:
    smoke(kit, None, options(tmp_path))
    report = smoke(kit, None, options(tmp_path, language="zh"))
    text = report.markdown.read_text()
    assert report.markdown == tmp_path / "runs" / "RECORD.md"
    assert text.startswith("# Run record\n\n## 20") and text.count("\n## 20") == 2
    for label in ("- Time: ", "- Step: ", "- State: success", "- Memory: ", "- Problem: none", "- Next step: "):
        assert label in text
    for label in ("- 时间：", "- 步骤：小规模测试", "- 状态：成功", "- 显存使用：", "- 问题：无", "- 下一步："):
        assert label in text


def test_a_script_that_has_lora_is_left_as_it_is(kit: Path, tmp_path: Path) -> None:
    smoke(kit, PatchOptions(r=4), options(tmp_path))
    before = kit.read_bytes()
    report = smoke(kit, None, options(tmp_path))
    assert kit.read_bytes() == before and b"--lora_r 4" in before
    assert "+    --lora_r 4" in record(report)["script"]["diff"]  # type: ignore[index]
    assert report.record["adapter"]["rank"] == 4


def test_a_failed_training_is_diagnosed_with_its_figures(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_MODE", "oom")
    report = smoke(kit, None, options(tmp_path))
    assert not report.passed and report.exit_code == 1
    assert report.diagnosis is not None and report.diagnosis.figures["free_B"] == round(1.25 * GIB)
    assert report.sentence == (
        "The GPU's memory is full: 2.00 GiB more were wanted, 1.25 GiB were free, of 23.50 GiB in all."
        f" Try: lorapatch tune '{kit}' --budget 23.5GiB"
    )
    assert record(report)["diagnosis"]["id"] == "cuda-oom"  # type: ignore[index]
    assert "- Problem: The GPU's memory is full" in report.markdown.read_text()
    assert lines(report)["ran to the last step"] == "fail" and lines(report)["the adapter can be loaded"] == "fail"


@pytest.mark.parametrize(
    ("mode", "line", "id"),
    [
        ("nan", "the loss is finite and does not explode", "nan-loss"),
        ("still", "lora_B has moved from zero", "untrained-lora"),
    ],
)
def test_a_training_that_ends_well_but_learns_nothing_fails(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, line: str, id: str
) -> None:
    monkeypatch.setenv("TOY_MODE", mode)
    report = smoke(kit, None, options(tmp_path))
    assert report.exit_code == 0 and not report.passed
    assert lines(report)[line] == "fail" and report.diagnosis is not None and report.diagnosis.id == id


def test_a_budget_that_is_exceeded_fails(kit: Path, tmp_path: Path) -> None:
    report = smoke(kit, None, options(tmp_path, budget_B=1 << 20))
    assert lines(report)["the peak is under the budget"] == "fail" and not report.passed


def test_a_time_limit_ends_the_run_and_is_recorded(kit: Path, tmp_path: Path) -> None:
    report = smoke(kit, None, options(tmp_path, timeout_s=1.0), max_steps=500)
    assert report.record["outcome"]["state"] == "timeout" and report.diagnosis is not None
    assert report.diagnosis.id == "timeout"
    assert 0 < report.record["metrics"]["step"] < 500


def test_ctrl_c_ends_the_run_records_it_and_leaves_no_process(kit: Path, tmp_path: Path) -> None:
    def interrupt() -> None:
        while not list((tmp_path / "runs").glob("*/metrics.jsonl")) or not read_jsonl(
            next((tmp_path / "runs").glob("*/metrics.jsonl"))
        ):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    report = smoke(kit, None, options(tmp_path, timeout_s=60), max_steps=5000)
    assert report.record["outcome"]["state"] == "interrupted" and not report.passed
    assert "- State: interrupted" in report.markdown.read_text()
    left = [
        path
        for path in Path("/proc").glob("[0-9]*/environ")
        if COOKIE.encode() in _read(path) and str(kit).encode() in _read(path.with_name("cmdline"))
    ]
    assert left == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


class Deaf(PlainView):
    """A view whose terminal is gone."""

    def step(self, row: LoggedStep) -> None:
        raise BrokenPipeError

    def memory(self, sample: MemorySample) -> None:
        raise BrokenPipeError


def test_a_terminal_that_is_gone_does_not_end_a_training(kit: Path, tmp_path: Path) -> None:
    report = smoke(kit, None, options(tmp_path), view=Deaf(lambda line: None))
    assert report.passed and len(read_jsonl(report.folder / "metrics.jsonl")) == 5


# -- full ------------------------------------------------------------------------------------------------------------


def test_a_full_run_goes_through_every_stage(kit: Path, tmp_path: Path) -> None:
    said: list[str] = []
    report = full(kit, None, options(tmp_path), view=PlainView(said.append))
    assert report.passed, report.sentence
    assert (kit.parent / "evaluated.txt").read_text() == "evaluated toy\n"
    assert (kit.parent / "train toy_full.sh").is_file()
    assert {step["stage"] for step in read_jsonl(report.folder / "metrics.jsonl")} == {1, 2}
    found = record(report)
    assert found["metrics"]["stages"] == 2 and found["metrics"]["total_steps"] == 6  # type: ignore[index]
    assert found["next_step"] == f"lorapatch verify {kit.parent}/out/toy-finetune"
    assert "--lora_enable" in found["launch"]["argv"]  # type: ignore[index]


def test_finished_output_is_not_started_over(kit: Path, tmp_path: Path) -> None:
    full(kit, None, options(tmp_path))
    with pytest.raises(Refused, match=r"line 8: .*toy-pretrain holds a finished run \(mm_projector.bin of 20"):
        full(kit, None, options(tmp_path))
    with pytest.raises(
        Refused, match=r"adapter_model.safetensors is there: that run is finished, there is nothing to resume"
    ):
        full(kit, None, options(tmp_path), resume=True)


def test_a_run_killed_in_the_middle_is_told_and_goes_on_from_its_last_whole_checkpoint(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_MODE", "killed")
    killed = full(kit, None, options(tmp_path))
    assert killed.exit_code == 137 and killed.diagnosis is not None and killed.diagnosis.id == "host-oom"
    assert not (kit.parent / "evaluated.txt").exists()  # the script ends with its training
    half = kit.parent / "out" / "toy-finetune" / "checkpoint-4"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(Refused, match="--resume leaves that stage out"):
        full(kit, None, options(tmp_path))
    said: list[str] = []
    report = full(kit, None, options(tmp_path), resume=True, view=PlainView(said.append))
    assert report.passed, report.sentence
    assert f"the launch on line 16 goes on from {half.with_name('checkpoint-2')}" in said
    assert any("the launch on line 8 is not run again" in sentence for sentence in said)
    assert half.with_name("incomplete-checkpoint-4").is_dir()
    assert lines(report)["went on from step 2"] == "pass" and report.record["resumed_from"] == 2
    assert [step["step"] for step in read_jsonl(report.folder / "metrics.jsonl")] == [3, 4, 5, 6]
    assert (kit.parent / "evaluated.txt").is_file()


def test_there_may_be_nothing_to_resume_from(kit: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert full(kit, None, options(tmp_path), resume=True, view=PlainView(said.append)).passed
    assert "there is nothing to resume from: it starts from the beginning" in said


def test_a_checkpoint_of_a_full_fine_tuning_is_not_resumed_with_lora(kit: Path, tmp_path: Path) -> None:
    checkpoint = kit.parent / "out" / "toy-finetune" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    with pytest.raises(Refused, match="is of a full fine-tuning, a LoRA run cannot go on from it"):
        full(kit, None, options(tmp_path), resume=True)


# -- what cannot work is refused before anything runs ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("$HERE/train.py", "$HERE/trian.py", r"line 16: the trainer .*trian.py does not exist"),
        ("$HERE/model ", "$HERE/modle ", r"--model_name_or_path .*/modle is not there"),
        (
            "--data_path $HERE/data.json",
            "--data_path $HERE/nothing/data.json",
            r"--data_path .*/nothing/data.json is not there",
        ),
        ("PYTHON=", "PYTHON=/no/such", r"line \d+: /no/such.* does not exist"),
        ("--learning_rate 2e-4", "--learning_rate 2e-4 --bogus_flag 1", r"bogus_flag"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_started(
    kit: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    kit.write_text(kit.read_text().replace(old, new))
    with pytest.raises(Refused, match=message):
        smoke(kit, None, options(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_a_program_that_is_not_installed_is_named(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.write_text(kit.read_text().replace("$PYTHON $HERE", "deepspeed $HERE"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(
        Refused, match="line 8: deepspeed is not installed here; pip install deepspeed|line 16: deepspeed is not"
    ):
        smoke(kit, None, options(tmp_path))


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--interval has to be more than 0, not 0"):
        RunOptions(interval_s=0)
    with pytest.raises(UsageError, match="--num-gpus"):
        RunOptions(num_gpus=0)
    with pytest.raises(UsageError, match="choose en or zh"):
        RunOptions(language="fr")


def test_a_file_of_the_users_is_not_overwritten_by_the_test(kit: Path, tmp_path: Path) -> None:
    mine = kit.parent / "test_lora_minimal.sh"
    mine.write_text("# mine\n")
    report = smoke(kit, None, options(tmp_path))
    assert report.passed and mine.read_text() == "# mine\n"
    assert (report.folder / "test_lora_minimal.sh").is_file()


def test_arguments_are_handed_to_the_script(kit: Path, tmp_path: Path) -> None:
    kit.write_text(kit.read_text().replace("--learning_rate 2e-4", '--mode "$1" --learning_rate 2e-4'))
    report = smoke(kit, None, options(tmp_path, arguments=["still"]))
    assert lines(report)["lora_B has moved from zero"] == "fail"
