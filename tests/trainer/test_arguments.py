from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from zoo import Zoo

from lorapatch.trainer.arguments import parse
from lorapatch.trainer.errors import TrainerError

PLAN = """--version gemma --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
    --mm_use_im_patch_token False --image_size_aux 64 --bf16 True --num_train_epochs 1
    --per_device_train_batch_size 2 --per_device_eval_batch_size 4 --gradient_accumulation_steps 8
    --evaluation_strategy no --save_strategy steps --save_steps 100 --save_total_limit 1 --learning_rate 2e-5
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
    --report_to none --image_aspect_ratio pad --group_by_modality_length True --lora_enable True --lora_r 16
    --lora_alpha 32 --lora_dropout 0.1 --lora_bias none"""


def parsed(zoo: Zoo, output: Path, *more: str, **changes: Any) -> Any:
    return parse([*zoo.flags(output, **changes), *more])


def test_every_flag_of_the_plans_script_is_known(zoo: Zoo, tmp_path: Path) -> None:
    folders = ["--model_name_or_path", str(zoo.language), "--vision_tower", str(zoo.clip)]
    folders += ["--vision_tower_aux", str(zoo.aux), "--data_path", str(zoo.data), "--image_folder", str(zoo.images)]
    model, data, training = parse([*folders, "--output_dir", str(tmp_path), *PLAN.split()])
    assert (model.mm_vision_select_layer, data.image_size_aux, data.image_aspect_ratio) == (-2, 64, "pad")
    assert training.eval_strategy.value == "no"
    assert training.warmup_steps == 0.03
    assert training.get_warmup_steps(1000) == 30
    assert (training.lora_r, training.lora_alpha, training.lora_dropout, training.lora_bias) == (16, 32, 0.1, "none")
    assert training.gradient_checkpointing and training.bf16 and training.use_cpu


def test_defaults_are_upstreams(zoo: Zoo, tmp_path: Path) -> None:
    _, data, training = parsed(zoo, tmp_path, image_aspect_ratio=None, model_max_length=None)
    assert (training.lora_r, training.lora_alpha, training.lora_dropout, training.bits) == (64, 16, 0.05, 16)
    assert (data.image_aspect_ratio, training.model_max_length, training.lora_enable) == ("square", 512, False)
    assert data.max_bad_samples == 0.01


def test_flags_with_an_equals_sign_and_flags_without_a_value(zoo: Zoo, tmp_path: Path) -> None:
    _, _, training = parsed(zoo, tmp_path, "--local_rank=0", "--warmup_ratio=0.5", "--lora_enable")
    assert training.lora_enable and training.warmup_steps == 0.5


def test_steps_of_warm_up_win_over_a_ratio(zoo: Zoo, tmp_path: Path) -> None:
    _, _, training = parsed(zoo, tmp_path, "--warmup_ratio", "0.5", "--warmup_steps", "7")
    assert training.warmup_steps == 7


def test_retired_flags_are_accepted_and_said_to_do_nothing(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parsed(zoo, tmp_path, "--overwrite_output_dir", "--logging_dir", "logs", "--save_safetensors", "True")
    told = capsys.readouterr().err
    assert [line.split()[2] for line in told.splitlines()] == [
        "--overwrite_output_dir",
        "--logging_dir",
        "--save_safetensors",
    ]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--lora_rank", "4"], "--lora_rank is no flag of the trainer; did you mean --lora_r"),
        (["--evalution_strategy", "no"], "--evalution_strategy is no flag of the trainer; did you mean --eval"),
        (["stray"], "'stray' belongs to no flag"),
        (["--lora_r", "four"], "argument --lora_r: invalid int value: 'four'"),
        (["--lora_r", "0"], "--lora_r 0: at least 1"),
        (["--lora_alpha", "0"], "--lora_alpha 0: must be above 0"),
        (["--lora_dropout", "1"], "--lora_dropout 1.0: from 0 to below 1"),
        (["--lora_bias", "some"], "argument --lora_bias: invalid"),
        (["--bits", "3"], "--bits 3: 4, 8 or 16"),
        (["--bits", "4"], "--bits 4 needs --lora_enable True"),
        (["--max_bad_samples", "-1"], "--max_bad_samples -1.0: not below 0"),
        (["--image_grid", "2"], "--image_grid: the trainer cannot do this"),
        (["--mm_use_im_start_end", "True"], "--mm_use_im_start_end: the trainer cannot do this"),
        (["--optimize_vision_tower", "True"], "--optimize_vision_tower: the trainer cannot do this"),
        (["--lora_enable", "True", "--tune_mm_mlp_adapter", "True"], "exclude each other"),
        (["--lora_variant", "pissa", "--lora_enable", "True", "--bits", "8"], "pissa needs whole weights"),
        (["--deepspeed", "nowhere.json"], "nowhere.json"),
    ],
)
def test_what_cannot_be_right_is_one_sentence(zoo: Zoo, tmp_path: Path, more: list[str], sentence: str) -> None:
    with pytest.raises(TrainerError) as caught:
        parsed(zoo, tmp_path, *more)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["model_name_or_path", "vision_tower", "data_path"])
def test_what_is_missing_is_named(zoo: Zoo, tmp_path: Path, name: str) -> None:
    with pytest.raises(TrainerError, match=f"--{name} is missing"):
        parsed(zoo, tmp_path, **{name: None})


def test_quantised_weights_and_zero_3_exclude_each_other(zoo: Zoo, tmp_path: Path) -> None:
    config = tmp_path / "zero3.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}))
    with pytest.raises(TrainerError, match="ZeRO-3 exclude each other: use ZeRO-2"):
        parsed(zoo, tmp_path, deepspeed=config, bits=4, lora_enable=True)
