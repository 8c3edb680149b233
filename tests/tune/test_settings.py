"""A configuration in a script: read from it, and written where a person would write it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lorapatch.errors import Refused
from lorapatch.launch import read_source
from lorapatch.lora.flags import PatchOptions
from lorapatch.resources import resource_dir
from lorapatch.tune.configuration import Configuration
from lorapatch.tune.samples import cut_by, token_lengths
from lorapatch.tune.script import TunedScript, machine_of, read_tuned, set_values

LAUNCH = """deepspeed train.py \\
    --output_dir out/finetune \\
    --deepspeed $HERE/zero2_offload.json \\
    --per_device_train_batch_size {batch} \\
    --gradient_accumulation_steps {accumulation} \\
    --learning_rate 2e-5
"""


def changed(head: str, batch: str, accumulation: str, **flags: str) -> str:
    source = head + LAUNCH.format(batch=batch, accumulation=accumulation)
    script = read_source(source.encode(), Path("/kit/x.sh"))
    after = set_values(script, len(script.launches), {name: (value,) for name, value in flags.items()}).decode()
    assert after != source
    return after


def test_a_variable_is_changed_where_it_is_set() -> None:
    text = changed("HERE=/kit\nBATCH=4\nexport STEPS=\"32\"\n./check $BATCH $STEPS 128\n", "$BATCH", '"${STEPS}"',
                   per_device_train_batch_size="8", gradient_accumulation_steps="16")  # fmt: skip
    assert "BATCH=8\nexport STEPS=\"16\"\n./check $BATCH $STEPS 128\n" in text
    assert "--per_device_train_batch_size $BATCH" in text and '--gradient_accumulation_steps "${STEPS}"' in text


def test_what_the_script_computes_from_it_follows() -> None:
    text = changed("HERE=/kit\nBATCH=4\nSTEPS=$((128 / BATCH))\n", "$BATCH", "$STEPS",
                   per_device_train_batch_size="8", gradient_accumulation_steps="16")  # fmt: skip
    assert "BATCH=8\nSTEPS=$((128 / BATCH))\n" in text and "--gradient_accumulation_steps $STEPS" in text


def test_a_variable_of_another_launch_too_is_left_alone() -> None:
    head = "HERE=/kit\nBATCH=4\ndeepspeed train.py --tune_mm_mlp_adapter True --learning_rate 1e-3 --output_dir out/pretrain"
    text = changed(f"{head} --per_device_train_batch_size $BATCH\n", "$BATCH", "32", per_device_train_batch_size="8")
    assert "\nBATCH=4\n" in text and "pretrain --per_device_train_batch_size $BATCH\n" in text
    assert text.count("--per_device_train_batch_size 8") == 1


@pytest.mark.parametrize("head", ["BATCH=$(nproc)\n", "if true; then BATCH=2; else BATCH=4; fi\n", "BATCH=(4 8)\n"])
def test_a_variable_that_is_no_plain_value_is_replaced_in_the_launch(head: str) -> None:
    text = changed(f"HERE=/kit\n{head}", "$BATCH", "32", per_device_train_batch_size="8")
    assert head in text and "--per_device_train_batch_size 8" in text


def test_of_a_path_the_name_of_the_file_is_changed() -> None:
    text = changed("HERE=/kit\n", "4", "32", deepspeed="/kit/zero2.json")
    assert "--deepspeed $HERE/zero2.json \\" in text
    assert "--deepspeed /else/zero2.json" in changed("HERE=/kit\n", "4", "32", deepspeed="/else/zero2.json")


def kit(folder: Path, head: str = "BATCH=4\n") -> Path:
    for name, stage, device in (("zero2", 2, None), ("zero2_offload", 2, "cpu"), ("zero3", 3, None)):
        zero = {"stage": stage} | ({"offload_optimizer": {"device": device}} if device else {})
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    (folder / "other.json").write_text("[]")
    path = folder / "x.sh"
    path.write_text(f"HERE={folder}\n{head}" + LAUNCH.format(batch="$BATCH", accumulation="32"))
    return path


def tuned(folder: Path) -> TunedScript:
    return read_tuned(kit(folder), PatchOptions(r=8, target_modules="q_proj,v_proj"), None)


def test_the_start_is_what_the_script_is_set_to_with_lora(tmp_path: Path) -> None:
    start = tuned(tmp_path).start
    assert start == Configuration(
        4, 32, learning_rate=2e-5, deepspeed=f"{tmp_path}/zero2_offload.json", r=8, alpha=16,
        target_modules="q_proj,v_proj", offload=True,
    )  # fmt: skip
    assert start.words() == "4 × 32, no checkpointing, r 8 on q, v, zero2_offload.json, lr 2e-05"


def test_the_files_beside_its_deepspeed_configuration_are_known_by_what_they_do(tmp_path: Path) -> None:
    machine = machine_of(tuned(tmp_path), cpu=True, model=None, longest=None)
    assert dict(machine.siblings) == {"no_offload": f"{tmp_path}/zero2.json", "zero3": f"{tmp_path}/zero3.json"}
    assert machine.gpus == 0


def test_every_field_reaches_the_script_and_is_read_again(tmp_path: Path) -> None:
    first = tuned(tmp_path)
    wanted = replace(
        first.start, micro_batch=16, accumulation=8, checkpointing=True, max_length=1024, learning_rate=6.3e-5, r=32,
        alpha=64, target_modules="q_proj", bits=4, model="/models/small", deepspeed=f"{tmp_path}/zero2.json", offload=False,
    )  # fmt: skip
    script, launch = first.with_configuration(wanted)
    path = tmp_path / "again.sh"
    path.write_bytes(script.source)
    assert read_tuned(path, None, None).start == wanted
    assert "\nBATCH=16\n" in path.read_text() and "$HERE/zero2.json" in path.read_text()
    assert launch.flag("learning_rate").value == "6.3e-5"  # type: ignore[union-attr]


def test_what_the_trainer_has_no_flag_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import argparse\nfrom peft import LoraConfig, get_peft_model\np = argparse.ArgumentParser()\n"
        + "".join(f"p.add_argument('--{n}')\n" for n in ("output_dir", "deepspeed", "lora_r", "lora_alpha"))
        + "".join(f"p.add_argument('--{n}')\n" for n in ("learning_rate", "gradient_accumulation_steps"))
        + "p.add_argument('--per_device_train_batch_size')\np.add_argument('--lora_enable', type=bool)\na = p.parse_args()\n"
        + "if a.lora_enable:\n    m = get_peft_model(None, LoraConfig(r=a.lora_r, lora_alpha=a.lora_alpha))\n"
    )
    found = read_tuned(kit(tmp_path), None, None)
    assert "no flag for bits 4" in str(found.takes(replace(found.start, bits=4)))
    assert found.takes(replace(found.start, r=4, alpha=8)) is None


def test_a_value_that_is_no_number_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"x\.sh: line 6: --per_device_train_batch_size many is not a number"):
        read_tuned(kit(tmp_path, "BATCH=many\n"), PatchOptions(), None)


def test_the_script_of_the_plan_keeps_its_own_check_true(tmp_path: Path) -> None:
    name = "train_mgm_2b_stage_1_10k_baseline.sh"
    path = tmp_path / name
    path.write_bytes((resource_dir("original_scripts") / name).read_bytes())
    found = read_tuned(path, None, None)
    text = found.text(found.start.with_micro_batch(16)).decode()
    assert "\nFINETUNE_BATCH_SIZE_PER_GPU=16\nFINETUNE_GRADIENT_ACCUMULATION_STEPS=8\n" in text
    assert "\nPRETRAIN_BATCH_SIZE_PER_GPU=4\nPRETRAIN_GRADIENT_ACCUMULATION_STEPS=64\n" in text
    assert "$FINETUNE_BATCH_SIZE_PER_GPU $FINETUNE_GRADIENT_ACCUMULATION_STEPS 128`" in text


# -- samples -----------------------------------------------------------------------------------------------------------


def test_a_limit_says_how_many_samples_it_cuts() -> None:
    assert cut_by([10, 20, 30, 40], 25) == "25 tokens cut 2 of 4 samples (50 %), the longest has 40"


def test_samples_are_counted_by_the_models_own_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model, tower = tmp_path / "model", tmp_path / "tower"
    for folder in (model, tower):
        folder.mkdir()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(model / "tokenizer.json"))
    (tower / "config.json").write_text(json.dumps({"vision_config": {"image_size": 28, "patch_size": 14}}))
    turns = [{"from": "human", "value": "<image>\na a a"}, {"from": "gpt", "value": "a a"}]
    data = [{"image": "x.png", "conversations": turns}, {"conversations": turns[1:]}]
    (tmp_path / "data.json").write_text(json.dumps(data))
    flags = f"--data_path {tmp_path}/data.json --model_name_or_path {model} --vision_tower {tower}"
    launch = read_source(f"deepspeed train.py {flags}\n".encode(), tmp_path / "x.sh").launches[0]
    assert token_lengths(launch, tmp_path) == [1 + 5 + 4, 1 + 2]
    (tmp_path / "data.json").write_text("{")
    assert token_lengths(launch, tmp_path) is None
