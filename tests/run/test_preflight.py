"""What a launch needs is looked at before it starts: paths, programs, the GPU, the disk."""
# ruff: noqa: E501 (scripts and logs as they stand)

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorapatch.errors import Refused
from lorapatch.launch import read_source
from lorapatch.run import preflight as module
from lorapatch.run.gpus import Gpu
from lorapatch.run.preflight import Preflight, look_at_paths, preflight

GIB = 1 << 30


class Machine:
    """The GPUs that the preflight is told of."""

    gpus: tuple[Gpu, ...] = (Gpu(0, "RTX 4090", 0, 24 * GIB), Gpu(1, "GTX 1080", 0, 8 * GIB))
    bf16: dict[int, bool] = {0: True, 1: False}
    why_none = ""

    def memory(self) -> tuple[Gpu, ...]:
        return self.gpus

    def supports_bf16(self, index: int) -> bool | None:
        return self.bf16.get(index)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Machine]]:
    found = types.new_class("Found", (Machine,))
    monkeypatch.setattr(module, "Gpus", found)
    monkeypatch.setattr(module, "_OTHER_ACCELERATORS", ())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "z.json").write_text("{}")
    yield found


LAUNCH = f"{sys.executable} train.py --learning_rate 1 --output_dir out"


def looked(tmp_path: Path, text: str, **options: object) -> Preflight:
    script = read_source(text.encode(), tmp_path / "train.sh")
    environment = options.pop("environment", {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "0"})
    return preflight(
        script, script.launches[-1], alone=bool(options.pop("alone", False)), environment=environment, **options
    )  # type: ignore[arg-type]


def test_paths_are_there_missing_made_earlier_or_not_known(tmp_path: Path) -> None:
    text = f"""
X=$(hostname)
python prepare.py --out data/made.json
{LAUNCH} --tune_mm_mlp_adapter True --output_dir out/one
{LAUNCH} --model_name_or_path ./model --deepspeed ./z.json --data_path data/made.json --image_folder data/none \\
    --pretrain_mm_mlp_adapter out/one/mm.bin --vision_tower openai/clip-vit --tokenizer_path $X/tok --logging_dir ./logs/x
"""
    script = read_source(text.encode(), tmp_path / "train.sh")
    found = {path.name: (path.state, path.missing) for path in look_at_paths(script, script.launches[-1])}
    assert found == {
        "--model_name_or_path": ("there", False),
        "--deepspeed": ("there", False),
        "--data_path": ("made by line 3", True),
        "--image_folder": ("missing", True),
        "--pretrain_mm_mlp_adapter": ("made by line 4", True),
        "--tokenizer_path": ("not known", False),
    }


def test_a_missing_path_is_refused_with_its_flag_and_line(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"line 2: --data_path no/thing.json is not there, and no earlier line makes it"):
        looked(tmp_path, f"\n{LAUNCH} --data_path no/thing.json\n")


def test_alone_a_stage_cannot_use_what_an_earlier_one_makes_unless_it_can_do_without(tmp_path: Path) -> None:
    text = f"python prepare.py --out data/made.json\n{LAUNCH} --data_path data/made.json\n"
    assert looked(tmp_path, text).drop == ()
    with pytest.raises(Refused, match=r"is not there yet: it is made by line 1 of the script, which has to run first"):
        looked(tmp_path, text, alone=True)
    text = f"{LAUNCH} --output_dir out/one\n{LAUNCH} --pretrain_mm_mlp_adapter out/one/mm.bin\n"
    found = looked(tmp_path, text, alone=True)
    assert found.drop == ("pretrain_mm_mlp_adapter",) and "the test goes without it" in found.notes[0]


def test_a_trainer_an_interpreter_and_a_launcher_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="line 1: the trainer src/none.py does not exist"):
        looked(tmp_path, "python src/none.py --learning_rate 1\n")
    with pytest.raises(Refused, match="line 1: /opt/none/bin/python does not exist"):
        looked(tmp_path, "/opt/none/bin/python train.py --learning_rate 1\n")
    with pytest.raises(Refused, match="line 1: deepspeed is not installed here; pip install deepspeed"):
        looked(tmp_path, "deepspeed train.py --learning_rate 1\n")
    with pytest.raises(Refused, match="line 1: torchrun is not installed here; activate its environment"):
        looked(tmp_path, "torchrun train.py --learning_rate 1\n")
    assert looked(tmp_path, "source activate env\ndeepspeed train.py --learning_rate 1\n").python is None


def test_deepspeed_has_to_be_in_the_launchs_interpreter(tmp_path: Path) -> None:
    bare = tmp_path / "bare python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    python = bare.with_name("python")
    bare.rename(python)
    with pytest.raises(Refused, match="has no deepspeed, which --deepspeed needs"):
        looked(tmp_path, f"{python} train.py --learning_rate 1 --deepspeed ./z.json\n")
    assert looked(tmp_path, f"{python} train.py --learning_rate 1\n").python == str(python)


def test_no_gpu_is_refused_where_one_is_wanted_and_not_where_the_cpu_will_do(
    tmp_path: Path, machine: type[Machine]
) -> None:
    machine.gpus, machine.why_none = (), "the NVIDIA driver does not answer (x)"
    with pytest.raises(Refused, match=r"line 1: --bf16 wants an NVIDIA GPU and there is none .*`lorapatch demo DIR`"):
        looked(tmp_path, f"{LAUNCH} --bf16 True\n")
    assert looked(tmp_path, f"{LAUNCH} --bf16 True --use_cpu True\n").cpu
    assert looked(tmp_path, f"{LAUNCH} --bf16 True\n", environment={"PATH": "/bin", "DS_ACCELERATOR": "cpu"}).cpu
    assert not looked(tmp_path, f"{LAUNCH} --bf16 False\n").cpu
    (tmp_path / "train.py").write_text("from lorapatch.trainer.train import main\n")
    assert looked(tmp_path, f"{LAUNCH} --bf16 True\n").cpu
    machine.why_none = "nvidia-ml-py is not installed: pip install nvidia-ml-py"
    (tmp_path / "train.py").write_text("")
    assert not looked(tmp_path, f"{LAUNCH} --bf16 True\n").cpu


def test_an_old_gpu_is_refused_for_bf16(tmp_path: Path) -> None:
    with pytest.raises(
        Refused, match=r"line 1: GPU 1 \(GTX 1080\) cannot compute in bf16; lorapatch patch SCRIPT --set bf16=False"
    ):
        looked(tmp_path, f"CUDA_VISIBLE_DEVICES=1 {LAUNCH} --bf16 True\n")
    looked(tmp_path, f"CUDA_VISIBLE_DEVICES=0 {LAUNCH} --bf16 True\n")


def test_a_budget_larger_than_the_gpu_is_refused(tmp_path: Path) -> None:
    looked(tmp_path, LAUNCH, budget_B=24 * GIB)
    with pytest.raises(Refused, match=r"a budget of 32.00 GiB is more than GPU 0 \(RTX 4090\) has: 24.00 GiB"):
        looked(tmp_path, LAUNCH, budget_B=32 * GIB)
    with pytest.raises(Refused, match="GPU 1"):
        looked(tmp_path, LAUNCH, budget_B=16 * GIB, environment={"PATH": "/bin"})  # all GPUs: the smallest counts


def test_memory_that_others_hold_is_worth_a_note(tmp_path: Path, machine: type[Machine]) -> None:
    assert looked(tmp_path, LAUNCH).notes == ()
    machine.gpus = (Gpu(0, "RTX 4090", 10 * GIB, 24 * GIB),)
    assert looked(tmp_path, LAUNCH).notes == ("GPU 0 already holds 10.00 GiB of other processes",)


def test_a_disk_too_small_for_the_checkpoints_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10, 5, 40 << 20)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    text = f"{LAUNCH} --model_name_or_path ./model --lora_enable True"
    looked(tmp_path, f"{text} --save_total_limit 0\n")
    with pytest.raises(Refused, match=r"has 0.04 GiB free, the checkpoints may take 0.05 GiB"):
        looked(tmp_path, f"{text} --save_total_limit 1\n")
