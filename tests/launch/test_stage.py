"""Stages are decided by evidence, and each decision says why."""

from __future__ import annotations

import pytest

from lorapatch.launch import read_source


def stage(text: str) -> tuple[str | None, bool]:
    found = read_source(text.encode()).launches[-1].stage
    assert found.reasons
    return found.name, found.training


@pytest.mark.parametrize(
    ("text", "name", "training"),
    [
        ("deepspeed train.py --learning_rate 1 --tune_mm_mlp_adapter True --output_dir o/finetune", "pretrain", True),
        (
            "deepspeed train.py --learning_rate 1 --tune_mm_mlp_adapter False --output_dir o/x-pretrain-ft",
            "finetune",
            True,
        ),
        ("deepspeed train.py --learning_rate 1 --pretrain_mm_mlp_adapter p.bin --output_dir o", "finetune", True),
        ("deepspeed train.py --learning_rate 1 --output_dir $PRETRAIN_DIR", "pretrain", True),
        ("deepspeed train.py --learning_rate 1 --output_dir o 2>&1 | tee pretrain.log", "pretrain", True),
        ("# stage 1: feature alignment\ntorchrun train.py --learning_rate 1", "pretrain", True),
        ("# 预训练\ntorchrun train.py --learning_rate 1", "pretrain", True),
        ("# 微调阶段\ntorchrun train.py --learning_rate 1", "finetune", True),
        ("torchrun train.py --learning_rate 1", "finetune", True),
        ("python run.py --num_train_epochs 1 --per_device_train_batch_size 2", "finetune", True),
        ("python -m pkg.eval.model_vqa --model-path pretrained/x", "evaluation", False),
        ("python inference.py --lora_path x", "inference", False),
        ("python -m pkg.serve.cli --load-4bit", "inference", False),
        ("python preprocess_train_data.py --out x", "preprocessing", False),
        ("python convert_checkpoint.py a b", "preprocessing", False),
        ("python tool.py --x", None, False),
    ],
)
def test_the_stage_of_a_launch(text: str, name: str | None, training: bool) -> None:
    assert stage(text + "\n") == (name, training)
