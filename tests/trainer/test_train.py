from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zoo import Zoo

from lorapatch.trainer import train as training
from lorapatch.trainer.arguments import parse
from lorapatch.trainer.errors import TrainerError
from lorapatch.trainer.inference import answers, load, loss
from lorapatch.trainer.train import main

pytestmark = pytest.mark.train
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0}


@dataclass(frozen=True)
class Run:
    """What a run said on standard output, and what it left."""

    output: Path
    lines: list[dict[str, Any]]
    losses: list[float]

    def said(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["lorapatch"] == kind]


def finished(output: Path, text: str) -> Run:
    state = json.loads((output / "trainer_state.json").read_text())
    lines = [json.loads(line) for line in text.replace("\r", "\n").splitlines() if line.startswith('{"lorapatch"')]
    return Run(output, lines, [entry["loss"] for entry in state["log_history"] if "loss" in entry])


@pytest.fixture
def run(zoo: Zoo, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """A run in this process."""

    def start(name: str = "out", **changes: Any) -> Run:
        assert main(zoo.flags(tmp_path / name, **changes)) == 0
        return finished(tmp_path / name, capfd.readouterr().out)

    return start


def test_lora_run_says_what_learns_and_how_fast_and_leaves_all_its_files(run: Callable[..., Run]) -> None:
    done = run(**LORA, save_strategy="steps", save_steps=2, profile_steps=2)
    (line,) = done.said("lora")
    assert line["lora"] == 8192 and line["tensors"] == 28 and line["r"] == 4 and line["alpha"] == 8
    assert line["modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert line["trainable"] > line["lora"] and line["total"] > line["trainable"]
    *windows, last = done.said("speed")
    assert [w["steps"] for w in windows] == [1, 2] and last["steps"] == 3
    assert last["samples_per_s"] == pytest.approx(2 / last["step_time_s"], rel=0.01)
    assert last["tokens_per_s"] > last["samples_per_s"] and last["peak_allocated_B"] is None
    for folder in (done.output, done.output / "checkpoint-2", done.output / "checkpoint-4"):
        names = {file.name for file in folder.iterdir()}
        assert names >= {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin", "config.json"}
        assert names >= {"tokenizer.json", "trainer_state.json"}
    adapter = load_file(done.output / "adapter_model.safetensors")
    assert len(adapter) == 28 and all(t.abs().sum() > 0 for t in adapter.values())
    others = torch.load(done.output / "non_lora_trainables.bin", weights_only=True)
    assert "base_model.model.model.mm_projector.0.weight" in others


def test_full_run_writes_a_model_that_answers_and_whose_loss_fell(run: Callable[..., Run], zoo: Zoo) -> None:
    done = run(max_steps=12, learning_rate=3e-3)
    (line,) = done.said("model")
    assert line["trainable"] == 103_840 and line["total"] == 180_688
    assert done.losses[-1] < done.losses[0] - 1
    samples = json.loads(zoo.data.read_text())
    loaded = load(done.output)
    assert loss(loaded, samples, zoo.images) < done.losses[0] - 1
    pairs = [(zoo.images / "0.png", "What colour is it?"), (None, "Say the colour: red")]
    together = answers(loaded, pairs, max_new_tokens=12)
    assert together == [answers(loaded, [pair], max_new_tokens=12)[0] for pair in pairs]


def test_pre_training_moves_the_bridge_alone_and_fine_tuning_starts_from_it(run: Callable[..., Run]) -> None:
    first = run("pre", tune_mm_mlp_adapter=True, save_strategy="steps", save_steps=2)
    (line,) = first.said("model")
    assert line["trainable"] == 12_896
    written = torch.load(first.output / "mm_projector.bin", weights_only=True)
    assert sum(t.numel() for t in written.values()) == 12_896
    assert (first.output / "checkpoint-2" / "mm_projector.bin").is_file()
    second = run("fine", **LORA, pretrain_mm_mlp_adapter=first.output / "mm_projector.bin", learning_rate=0)
    others = torch.load(second.output / "non_lora_trainables.bin", weights_only=True)
    for name, tensor in written.items():
        assert torch.equal(others[f"base_model.model.{name}"], tensor)


def test_inference_of_an_adapter_folder_sees_what_the_run_saw(run: Callable[..., Run], zoo: Zoo) -> None:
    """One step over all samples without a learning rate: the logged loss is the loaded model's."""
    done = run(
        **LORA, max_steps=1, per_device_train_batch_size=24, learning_rate=0, save_strategy="steps", save_steps=1
    )
    samples = json.loads(zoo.data.read_text())
    for folder in (done.output, done.output / "checkpoint-1"):
        assert loss(load(folder), samples, zoo.images) == pytest.approx(done.losses[0], abs=2e-3)


def test_loss_of_a_step_is_the_mean_of_its_micro_batches_means(run: Callable[..., Run], zoo: Zoo) -> None:
    done = run(**LORA, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=24, learning_rate=0)
    samples = json.loads(zoo.data.read_text())
    loaded = load(done.output)
    each = [loss(loaded, [sample], zoo.images) for sample in samples]
    assert done.losses[0] == pytest.approx(sum(each) / len(each), abs=2e-3)


@pytest.mark.parametrize("kind", [LORA, {**LORA, "lora_variant": "pissa"}, {"tune_mm_mlp_adapter": True}, {}])
def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_happened(
    run: Callable[..., Run], kind: dict[str, Any], tmp_path: Path
) -> None:
    import shutil

    whole = run(**kind, save_strategy="steps", save_steps=2)
    last = {name: file.read_bytes() for name, file in weights(whole.output).items()}
    for file in list(weights(whole.output).values()):
        file.unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    resumed = run(**kind, save_strategy="steps", save_steps=2)
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-6)
    for name, file in weights(resumed.output).items():
        assert file.read_bytes() == last[name], name


def test_a_run_can_go_on_from_a_checkpoint_that_is_named(run: Callable[..., Run], tmp_path: Path) -> None:
    whole = run("whole", **LORA, save_strategy="steps", save_steps=2)
    named = run("other", **LORA, resume_from_checkpoint=whole.output / "checkpoint-2")
    assert named.losses == pytest.approx(whole.losses, abs=1e-6)


def test_stochastic_depth_of_the_aux_tower_is_on_unless_it_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    for asked, expected in (("True", True), ("False", False)):
        parsed = parse([*zoo.flags(tmp_path), "--drop_path", asked])
        model, _ = training.build_model(*parsed, training.load_tokenizer(parsed[0], parsed[2]))
        assert model.aux.training is expected and not model.clip.training


def weights(folder: Path) -> dict[str, Path]:
    return {
        f.name: f for f in folder.iterdir() if f.suffix in {".safetensors", ".bin"} and f.name != "training_args.bin"
    }


def test_a_checkpoint_of_another_kind_of_run_stops_the_run_with_one_sentence(
    run: Callable[..., Run], zoo: Zoo, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(SystemExit) as ended:
        main(zoo.flags(tmp_path / "out", **LORA))
    assert ended.value.code == 3
    told = capfd.readouterr().err
    assert "another kind of run, full fine-tuning, and this one is LoRA (r 4" in told
    assert "Traceback" not in told


def test_an_adapter_can_be_the_start_of_a_run(run: Callable[..., Run]) -> None:
    first = run("first", **LORA)
    second = run("second", **LORA, lora_weight_path=first.output, learning_rate=0)
    a, b = (load_file(done.output / "adapter_model.safetensors") for done in (first, second))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_other_learning_rates_for_the_projector_and_by_name(run: Callable[..., Run]) -> None:
    start = run("start", **LORA, learning_rate=0)
    still = run("still", **LORA, mm_projector_lr=0.0)
    also = run("also", **LORA, lr_multi="mm_projector:0,vlm_uni:0")
    names = ["base_model.model.model.mm_projector.0.weight", "base_model.model.model.vlm_uni_val_projector.1.weight"]
    before, one, two = (
        torch.load(r.output / "non_lora_trainables.bin", weights_only=True) for r in (start, still, also)
    )
    assert torch.equal(before[names[0]], one[names[0]]) and not torch.equal(before[names[1]], one[names[1]])
    assert torch.equal(before[names[0]], two[names[0]]) and torch.equal(before[names[1]], two[names[1]])


def test_bf16_frozen_weights_and_float32_adapter_without_deepspeed(run: Callable[..., Run]) -> None:
    exact = run("exact", **LORA, max_steps=2)
    rounded = run("rounded", **LORA, max_steps=2, bf16=True)
    assert rounded.losses == pytest.approx(exact.losses, abs=0.02)
    adapter = load_file(rounded.output / "adapter_model.safetensors")
    assert {t.dtype for t in adapter.values()} == {torch.float32}


def test_broken_samples_are_skipped_up_to_the_limit_and_then_end_the_run(
    run: Callable[..., Run], zoo: Zoo, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    samples = json.loads(zoo.data.read_text())
    for sample in samples[:3]:
        sample["image"] = "gone.png"
    data = tmp_path / "data.json"
    data.write_text(json.dumps(samples))
    run(**LORA, data_path=data, max_bad_samples=0.2, max_steps=12)
    with pytest.raises(SystemExit) as ended:
        main(zoo.flags(tmp_path / "limit", **LORA, data_path=data, max_steps=12, dataloader_num_workers=1))
    assert ended.value.code == 3
    told = capfd.readouterr().err
    assert "lorapatch trainer: 1 of 24 samples are broken, more than --max_bad_samples allows (0)" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("changes", "sentence", "code"),
    [
        ({"vision_tower": "/nowhere"}, "--vision_tower: /nowhere/config.json cannot be read", 3),
        ({"pretrain_mm_mlp_adapter": "/nowhere.bin"}, "/nowhere.bin cannot be read", 3),
        ({"lora_enable": True, "tune_mm_mlp_adapter": True}, "exclude each other", 2),
        ({"lora_enable": True, "lora_target_modules": "qkv"}, "is called qkv", 2),
        ({"lr_multi": "mm_projector"}, "--lr_multi mm_projector: pairs of name:factor", 2),
    ],
)
def test_a_fault_ends_the_process_with_one_sentence(
    zoo: Zoo, tmp_path: Path, changes: dict[str, Any], sentence: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(zoo.flags(tmp_path / "out", **changes))
    assert ended.value.code == code
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lorapatch trainer: ")]
    assert sentence in line


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "CUDA out of memory. Tried"),
        (OSError(28, "No space left on device", "out/x"), "No space left on device"),
    ],
)
def test_memory_and_disk_faults_end_with_one_sentence(
    error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: object) -> None:
        raise error

    monkeypatch.setattr(training, "train", fail)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 4
    assert capsys.readouterr().err.startswith(
        f"lorapatch trainer: rank 1: {sentence}" if "CUDA" in sentence else "lorapatch trainer: rank 1: [Errno 28]"
    )


def test_a_share_of_the_gpu_can_be_set_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: told.append(share))
    for kind, value in (("cuda", "0.3"), ("cpu", "0.4"), ("cuda", "")):
        monkeypatch.setenv("LORAPATCH_MEMORY_FRACTION", value)
        training._limit_memory(SimpleNamespace(device=torch.device(kind)))
    assert told == [0.3]
    monkeypatch.setenv("LORAPATCH_MEMORY_FRACTION", "much")
    with pytest.raises(TrainerError, match="LORAPATCH_MEMORY_FRACTION=much: a number from 0 to 1"):
        training._limit_memory(SimpleNamespace(device=torch.device("cuda")))


def zero(folder: Path, stage: int) -> Path:
    config = {
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage, "reduce_bucket_size": "auto", "stage3_gather_16bit_weights_on_model_save": False},
    }  # fmt: skip
    file = folder / f"zero{stage}.json"
    file.write_text(json.dumps(config))
    return file


def launched(zoo: Zoo, output: Path, *, ranks: int, stage: int, **changes: Any) -> Run:
    """A run that DeepSpeed's launcher starts through the two lines a toolkit has for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = output.parent / "train_mem.py"
    script.write_text("from lorapatch.trainer.train import main\nraise SystemExit(main())\n")
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
    command += ["--master_port", str(port), str(script)]
    flags = zoo.flags(output, deepspeed=zero(output.parent, stage), per_device_train_batch_size=1, **changes)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        [*command, *flags], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return finished(output, ended.stdout)


def test_ranks_and_zero_stages_change_neither_loss_nor_files(zoo: Zoo, tmp_path: Path, run: Callable[..., Run]) -> None:
    """Two ranks with accumulation 1, under ZeRO-2 and ZeRO-3, against one rank with twice the accumulation."""
    options = {**LORA, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    alone = launched(zoo, tmp_path / "one", ranks=1, stage=2, gradient_accumulation_steps=2, **options)
    plain = run("plain", **options, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    expected = load_file(alone.output / "adapter_model.safetensors")
    others = torch.load(alone.output / "non_lora_trainables.bin", weights_only=True)
    assert plain.losses == pytest.approx(alone.losses, abs=1e-4)
    for stage in (2, 3):
        both = launched(zoo, tmp_path / f"two{stage}", ranks=2, stage=stage, **options)
        assert both.losses == pytest.approx(alone.losses, abs=1e-4)
        assert both.said("lora") == alone.said("lora")
        assert len(both.said("speed")) == 1
        found = load_file(both.output / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-4, msg=name)
        bridge = torch.load(both.output / "non_lora_trainables.bin", weights_only=True)
        for name, tensor in bridge.items():
            torch.testing.assert_close(tensor, others[name], rtol=1e-2, atol=1e-4, msg=name)
        assert load_file(both.output / "checkpoint-1" / "adapter_model.safetensors").keys() == expected.keys()


def test_zero_3_in_bf16_saves_the_whole_full_model_and_resumes_it(
    zoo: Zoo, tmp_path: Path, run: Callable[..., Run]
) -> None:
    import shutil

    plain = run("plain", per_device_train_batch_size=1)
    options = {"save_strategy": "steps", "save_steps": 2, "bf16": True}
    whole = launched(zoo, tmp_path / "full3", ranks=1, stage=3, **options)
    assert whole.losses == pytest.approx(plain.losses, abs=0.03)
    expected = load_file(plain.output / "model-00001-of-00001.safetensors")
    shutil.rmtree(whole.output / "checkpoint-4")
    (whole.output / "model-00001-of-00001.safetensors").unlink()
    resumed = launched(zoo, tmp_path / "full3", ranks=1, stage=3, **options)
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-6)
    found = load_file(resumed.output / "model-00001-of-00001.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), expected[name], rtol=0.05, atol=0.02, msg=name)


def test_the_module_itself_is_a_program_and_its_faults_have_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorapatch.trainer.train", "--lora_rank", "4", "--output_dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert "lorapatch trainer: --lora_rank is no flag of the trainer; did you mean --lora_r?\n" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_weights_where_bitsandbytes_runs(run: Callable[..., Run], bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    plain = run("plain", **LORA, bf16=True)
    quantised = run("quantised", **LORA, bf16=True, bits=bits)
    assert quantised.said("lora") == plain.said("lora")
    assert quantised.losses != plain.losses
    assert quantised.losses == pytest.approx(plain.losses, abs=0.1)
    assert load(quantised.output).inner.config.model_type == "mgm_gemma"
