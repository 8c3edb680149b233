"""What an output directory holds decides whether a run may start, and from where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorapatch.errors import Refused
from lorapatch.launch import read_source
from lorapatch.run.output import Restart, look_at, plan_restart, set_aside, trainer_states


def checkpoint(folder: Path, step: int, *, lora: bool = True, complete: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / ("adapter_model.bin" if lora else "model.safetensors")).write_text("")
    if complete:
        (path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": 1.0}, 5]}))
    return path


def restart(tmp_path: Path, *, resume: bool) -> Restart:
    text = f"python t.py --learning_rate 1 --tune_mm_mlp_adapter True --output_dir {tmp_path}/one\n"
    text += f"python t.py --learning_rate 1 --lora_enable True --output_dir {tmp_path}/two\n"
    script = read_source(text.encode(), tmp_path / "train.sh")
    return plan_restart(script, script.launches[1], resume=resume)


def test_checkpoints_are_in_the_order_of_their_steps_and_half_ones_are_known(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        checkpoint(tmp_path, step, complete=step != 10)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    output = look_at(tmp_path)
    assert [(c.step, c.complete) for c in output.checkpoints] == [(2, True), (4, True), (10, False)]
    assert output.last is not None and output.last.step == 4 and output.finished is None
    assert trainer_states(output) == [{"step": 4, "loss": 1.0}]
    (tmp_path / "adapter_model.safetensors").write_text("")
    assert look_at(tmp_path).finished == tmp_path / "adapter_model.safetensors"
    assert look_at(tmp_path / "none").checkpoints == ()


def test_a_fresh_start_needs_empty_directories(tmp_path: Path) -> None:
    assert restart(tmp_path, resume=False).sentences == ()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "finetuning.log").write_text("")  # of the script's own tee
    assert restart(tmp_path, resume=False).skip == {}
    checkpoint(tmp_path / "two", 3)
    with pytest.raises(
        Refused, match=r"line 2: .*two holds checkpoint-3 of an interrupted run; --resume goes on from it"
    ):
        restart(tmp_path, resume=False)


def test_resuming_leaves_out_what_is_finished_and_goes_on_with_the_rest(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "mm_projector.bin").write_text("")
    last = checkpoint(tmp_path / "two", 3)
    half = checkpoint(tmp_path / "two", 6, complete=False)
    plan = restart(tmp_path, resume=True)
    assert list(plan.skip) == [1] and plan.resume_from is not None and plan.resume_from.path == last
    assert plan.incomplete == (half,) and len(plan.sentences) == 3
    set_aside(plan.incomplete)
    assert not half.exists() and (half.parent / "incomplete-checkpoint-6").is_dir()


def test_a_checkpoint_that_cannot_be_set_aside_is_named(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot be renamed to incomplete-checkpoint-1"):
        set_aside((tmp_path / "checkpoint-1",))


def test_a_full_fine_tunings_checkpoint_is_not_gone_on_from_with_lora(tmp_path: Path) -> None:
    checkpoint(tmp_path / "two", 3, lora=False)
    with pytest.raises(Refused, match="is of a full fine-tuning"):
        restart(tmp_path, resume=True)


def test_a_directory_that_only_a_run_can_name_is_not_looked_at(tmp_path: Path) -> None:
    script = read_source(b"python t.py --learning_rate 1 --output_dir $(date)\n", tmp_path / "train.sh")
    assert plan_restart(script, script.launches[0], resume=False).sentences == ()
