"""From a script to what its runs are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_run import ZERO2, mgm_run, text_run, write_json
from tiny_runs import IMAGE_TEXT

import lorapatch
from lorapatch.errors import Refused, UsageError
from lorapatch.lora.choose import choose_launch
from lorapatch.lora.flags import PatchOptions
from lorapatch.memory.model import LoraSetup, RunSetup, Zero
from lorapatch.memory.setup import Described, Wanted, describe


def sides(script: Path, patch: PatchOptions | None = None, **wanted: Any) -> Mapping[str, Described]:
    read = lorapatch.read_script(script)
    return describe(read, choose_launch(read), patch, Wanted(**wanted), ("before", "after"))


def after(script: Path, patch: PatchOptions | None = None, **wanted: Any) -> RunSetup:
    return sides(script, patch, **wanted)["after"].setup


def test_a_full_script_becomes_full_before_and_the_plans_lora_after(tmp_path: Path) -> None:
    found = sides(mgm_run(tmp_path))
    before, lora = found["before"].setup, found["after"].setup
    assert (before.method, before.lora, lora.method) == ("full", None, "lora")
    assert lora.lora == LoraSetup(16, 32, 0.1, "none", "all-linear")
    for setup in (before, lora):
        assert (setup.family, setup.trainer, setup.micro_batch, setup.accumulation) == ("mgm", "upstream", 4, 4)
        assert setup.vision_tower == tmp_path / "clip" and setup.vision_tower_aux == tmp_path / "convnext"
        assert setup.zero == Zero(2, overlap_comm=True, reduce_bucket_size=50_000_000, allgather_bucket_size=50_000_000)
        assert (setup.dtype, setup.gradient_checkpointing, setup.model_max_length) == ("bf16", True, 2048)
        assert setup.sequence > 576 and setup.images == 1


def test_lora_that_the_script_has_stays_and_before_goes_without(tmp_path: Path) -> None:
    script = mgm_run(tmp_path, lora_enable=True, lora_r=8, bits=4)
    found = sides(script)
    assert found["after"].setup.lora == LoraSetup(8, 16, 0.05, "none", "all-linear")  # MGM's own defaults
    assert (found["after"].setup.bits, found["before"].setup.bits, found["before"].setup.method) == (4, 16, "full")


def test_a_patch_and_settings_change_what_is_after(tmp_path: Path) -> None:
    script = mgm_run(tmp_path, launcher="deepspeed lorapatch/trainer/train.py")
    setup = after(script, PatchOptions(preset="aggressive", r=4, bits=8), settings={"per_device_train_batch_size": 2})
    assert setup.trainer == "embedded"
    assert setup.lora is not None and (setup.lora.r, setup.lora.target_modules) == (4, "q_proj,v_proj")
    assert (setup.bits, setup.micro_batch) == (8, 2)


def test_settings_go_to_both_sides_and_none_takes_a_flag_out(tmp_path: Path) -> None:
    found = sides(mgm_run(tmp_path), settings={"deepspeed": None, "gradient_checkpointing": "False"})
    for side in found.values():
        assert side.setup.zero is None and not side.setup.gradient_checkpointing


def test_a_pretraining_launch_trains_the_projector_on_both_sides(tmp_path: Path) -> None:
    script = mgm_run(tmp_path, tune_mm_mlp_adapter=True)
    read = lorapatch.read_script(script)
    found = describe(read, choose_launch(read, "1"), None, Wanted(), ("before", "after"))
    assert {side.setup.method for side in found.values()} == {"pretrain"}


@pytest.mark.parametrize(
    ("launcher", "flags", "trainer"),
    [
        ("deepspeed --module lorapatch.trainer.train", {}, "embedded"),
        ("deepspeed mgm/train/train_mem.py", {}, "upstream"),
        ("deepspeed somewhere/train.py", {}, "upstream"),  # by --vision_tower_aux
        ("python train.py", {"vision_tower_aux": None, "vision_tower": None, "mm_projector_type": None}, "transformers"),
    ],
)
def test_the_trainer_is_told_by_its_file_and_flags(
    tmp_path: Path, launcher: str, flags: dict[str, Any], trainer: str
) -> None:
    assert after(mgm_run(tmp_path, launcher=launcher), settings=flags).trainer == trainer


def test_a_file_that_imports_lorapatchs_trainer_is_the_embedded_one(tmp_path: Path) -> None:
    script = mgm_run(tmp_path)
    (tmp_path / "mgm/train").mkdir(parents=True)
    (tmp_path / "mgm/train/train.py").write_text("from lorapatch.trainer.train import main\nmain()\n")
    assert after(script).trainer == "embedded"
    assert after(script, trainer="upstream").trainer == "upstream"  # unless the user knows better


def test_upstreams_train_mem_asks_for_flash_attention(tmp_path: Path) -> None:
    assert after(mgm_run(tmp_path, launcher="deepspeed mgm/train/train_mem.py")).attention == "flash_attention_2"
    assert after(mgm_run(tmp_path)).attention == "sdpa"


@pytest.mark.parametrize(
    ("launcher", "gpus"),
    [
        ("python train.py", 1),
        ("deepspeed --num_gpus 4 train.py", 4),
        ("deepspeed --num_gpus=2 --num_nodes 3 train.py", 6),
        ("deepspeed --include localhost:0,1,5 train.py", 3),
        ("deepspeed --include a:0,1@b:0,1 train.py", 4),
        ("CUDA_VISIBLE_DEVICES=0,3 deepspeed train.py", 2),
        ("torchrun --nproc_per_node 8 --nnodes 2 train.py", 16),
        ("accelerate launch --num_processes 5 train.py", 5),
        ("deepspeed --hostfile hosts train.py", 12),
    ],
)
def test_the_launcher_says_how_many_gpus(tmp_path: Path, launcher: str, gpus: int) -> None:
    (tmp_path / "hosts").write_text("one slots=8\ntwo slots=4\n")
    found = sides(text_run(tmp_path, launcher))["after"]
    assert found.setup.gpus == gpus
    assert not any("GPU" in note for note in found.assumed)


def test_one_gpu_is_assumed_where_nobody_says(tmp_path: Path) -> None:
    found = sides(text_run(tmp_path, "deepspeed train.py"))["after"]
    assert found.setup.gpus == 1
    assert any("does not say how many" in note for note in found.assumed)


def test_a_text_run_has_no_images_and_transformers_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapatch.memory.setup.versions_of", lambda python: {"torch": "2.13.0", "transformers": "5.23.0"})
    setup = after(text_run(tmp_path))
    assert (setup.family, setup.images, setup.optimizer, setup.use_reentrant) == ("causal_lm", 0, "adamw_torch_fused", False)
    monkeypatch.setattr("lorapatch.memory.setup.versions_of", lambda python: {"torch": "2.1.0", "transformers": "4.38.2"})
    setup = after(text_run(tmp_path))
    assert (setup.optimizer, setup.use_reentrant) == ("adamw_torch", True)


def test_a_multimodal_folder_is_an_image_text_run(tmp_path: Path) -> None:
    script = text_run(tmp_path)
    config = json.loads((tmp_path / "model/config.json").read_text())
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    write_json(tmp_path / "model/config.json", {"model_type": "llava", "text_config": config, "vision_config": vision})
    setup = after(script)
    assert (setup.family, setup.images) == ("image_text", 1)


def test_a_trainers_own_names_of_the_lora_flags_are_understood(tmp_path: Path) -> None:
    script = text_run(tmp_path, use_lora=True, rank=12)
    (tmp_path / "train.py").write_text(
        "import argparse\nfrom peft import LoraConfig, get_peft_model\nfrom transformers import Trainer\n"
        "p = argparse.ArgumentParser()\np.add_argument('--use_lora', default=False)\n"
        "p.add_argument('--rank', type=int, default=4)\np.add_argument('--scale', type=int, default=24)\n"
        "args, _ = p.parse_known_args()\n"
        "if args.use_lora:\n    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=args.scale))\n"
        "Trainer(model).train()\n"
    )
    lora = after(script).lora
    assert lora is not None and (lora.r, lora.alpha) == (12, 24)


def test_auto_in_the_deepspeed_file_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    zero = {"stage": 3, **{name: "auto" for name in ("reduce_bucket_size", "stage3_prefetch_bucket_size",
                                                     "stage3_param_persistence_threshold")}}  # fmt: skip
    write_json(tmp_path / "zero.json", {"zero_optimization": zero, "bf16": {"enabled": True}})
    setup = after(text_run(tmp_path, "deepspeed train.py", deepspeed="zero.json", bf16=False))
    assert setup.zero is not None and setup.dtype == "bf16"  # the file's own word
    assert (setup.zero.stage, setup.zero.overlap_comm) == (3, True)
    assert setup.zero.reduce_bucket_size == 64 * 64
    assert setup.zero.prefetch_bucket_size == int(0.9 * 64 * 64)
    assert setup.zero.param_persistence_threshold == 640


def test_deepspeeds_optimizer_takes_the_place_of_adam_on_the_cpu_unless_it_may_not(tmp_path: Path) -> None:
    zero = {**ZERO2["zero_optimization"], "offload_optimizer": {"device": "cpu"}}  # type: ignore[dict-item]
    found = {}
    for forced in (True, False):
        write_json(tmp_path / "zero.json", {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": forced})
        script = text_run(tmp_path, "deepspeed --num_gpus 1 train.py", deepspeed="zero.json", optim="adamw_torch")
        found[forced] = after(script).optimizer
    assert found == {True: "adamw_torch_fused", False: "adamw_torch"}


def test_offload_and_an_optimizer_of_deepspeeds_are_read(tmp_path: Path) -> None:
    target = {"device": "cpu", "pin_memory": True}
    zero = {**ZERO2["zero_optimization"], "offload_optimizer": target}  # type: ignore[dict-item]
    write_json(tmp_path / "zero.json", {"zero_optimization": zero, "optimizer": {"type": "AdamW"}})
    setup = after(text_run(tmp_path, "deepspeed train.py", deepspeed="zero.json"))
    assert setup.zero is not None and setup.zero.offload_optimizer and not setup.zero.offload_param
    assert setup.zero.pin_memory
    assert setup.optimizer == "adamw_torch_fused"


def test_a_deepspeed_file_that_is_not_here_is_guessed_by_its_name(tmp_path: Path) -> None:
    found = sides(text_run(tmp_path, "deepspeed train.py", deepspeed="configs/zero3_offload.json"))["after"]
    assert found.setup.zero is not None
    assert (found.setup.zero.stage, found.setup.zero.offload_optimizer) == (3, True)
    assert any("zero3_offload.json could not be read" in note for note in found.assumed)


def test_lengths_come_from_the_data_and_seq_and_images_win(tmp_path: Path) -> None:
    script = mgm_run(tmp_path)
    found = sides(script)["after"]
    assert found.low.sequence < found.setup.sequence <= found.high.sequence
    assert any("lengths from data.json: 10 samples" in note for note in found.assumed)
    fixed = sides(script, sequence=700, images=2)["after"]
    assert {s.sequence for s in (fixed.low, fixed.setup, fixed.high)} == {700} and fixed.setup.images == 2


def test_a_model_that_takes_images_of_any_size_says_how_large_they_were_taken(tmp_path: Path) -> None:
    script = text_run(tmp_path)
    write_json(tmp_path / "model/config.json", IMAGE_TEXT["qwen2_vl"])
    found = sides(script)["after"]
    assert "256 tokens an image: the model takes any size, here 448 x 448 pixels" in found.assumed
    (tmp_path / "data.json").unlink()
    assert sides(script, images=0, sequence=300)["after"].setup.labels == 300
    assert sides(script, images=1, sequence=300)["after"].setup.labels == 300 - 256


def test_without_data_the_longest_allowed_is_taken_and_nothing_is_sure(tmp_path: Path) -> None:
    script = text_run(tmp_path)
    (tmp_path / "data.json").unlink()
    found = sides(script)["after"]
    assert found.setup.sequence == 256 and found.low.sequence == 128 and not found.sure
    assert any("data.json is not here; say --seq" in note for note in found.assumed)


def test_what_cannot_be_modelled_is_said(tmp_path: Path) -> None:
    found = sides(text_run(tmp_path, fsdp="full_shard", use_liger_kernel=True))["after"]
    assert [note.split(":")[0] for note in found.not_modelled] == ["FSDP", "Liger kernels"]


def test_flash_attention_is_said_to_be_pytorchs_kernel(tmp_path: Path) -> None:
    said = "flash_attention_2 is counted as PyTorch's own flash kernel"
    assert said in sides(text_run(tmp_path, attn_implementation="flash_attention_2"))["after"].assumed
    for attention in ("sdpa", "eager"):
        assert said not in sides(text_run(tmp_path, attn_implementation=attention))["after"].assumed


def test_a_launch_without_a_model_is_refused_with_what_to_say(tmp_path: Path) -> None:
    script = text_run(tmp_path)
    script.write_text(script.read_text().replace("--model_name_or_path model", "--model_name_or_path $NOWHERE"))
    with pytest.raises(Refused, match="line 2: --model_name_or_path \\$NOWHERE is known only when it runs"):
        sides(script)
    assert after(script, settings={"model_name_or_path": "model"}).model == tmp_path / "model"


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [({"trainer": "mine"}, "no trainer called mine"), ({"sequence": 0}, "--seq has to be at least 1"),
     ({"images": -1}, "--images has to be at least 0")],
)  # fmt: skip
def test_values_out_of_range_are_usage_errors(wanted: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Wanted(**wanted)


TRAINER = """
import argparse
from peft import LoraConfig, get_peft_model
from transformers import Trainer
p = argparse.ArgumentParser()
p.add_argument('--use_lora', default=False)
p.add_argument('--rank', type=int, default=4)
args, _ = p.parse_known_args()
if args.use_lora:
    model = get_peft_model(model, LoraConfig(r=args.rank{more}))
Trainer(model).train()
"""


@pytest.mark.parametrize(
    ("more", "targets", "alpha"),
    [(", target_modules=['k_proj', 'down_proj'], lora_alpha=64", "k_proj,down_proj", 64),
     (", target_modules=find_them(model)", "all-linear", 8), ("", "q_proj,v_proj", 8)],
)  # fmt: skip
def test_modules_that_no_flag_names_are_those_in_the_trainers_source(
    tmp_path: Path, more: str, targets: str, alpha: int
) -> None:
    script = text_run(tmp_path, use_lora=True)
    (tmp_path / "train.py").write_text(TRAINER.replace("{more}", more))
    lora = after(script).lora
    assert lora is not None and (lora.r, lora.target_modules, lora.alpha) == (4, targets, alpha)


@pytest.mark.parametrize(
    "launch",
    ["PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python train.py",
     "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True\npython train.py"],
)  # fmt: skip
def test_an_allocator_setting_in_the_script_is_replayed(tmp_path: Path, launch: str) -> None:
    assert after(text_run(tmp_path, launch)).allocator == "expandable_segments:True"


def test_an_allocator_setting_of_the_environment_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert after(text_run(tmp_path)).allocator == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments")
    assert after(text_run(tmp_path)).allocator == ""
    assumed = sides(text_run(tmp_path))["after"].assumed
    assert any("is no name:value; PyTorch's defaults are counted" in note for note in assumed)


def test_lengths_that_differ_are_kept_and_equal_ones_are_not(tmp_path: Path) -> None:
    script = text_run(tmp_path, data_path="data.json")
    samples = [{"text": "word " * count} for count in (10, 10, 400)]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    lengths = after(script).lengths
    assert len(lengths) == 101 and lengths[-1] == after(script).sequence > lengths[0]
    assert lengths == tuple(sorted(lengths))
    (tmp_path / "data.json").write_text(json.dumps(samples[:2]))
    assert after(script).lengths == ()
