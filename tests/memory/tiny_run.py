"""A script with everything that an estimate reads beside it: tiny configurations, data, a DeepSpeed file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1000, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA_2B = {
    "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "vocab_size": 256000, "hidden_size": 2048,
    "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
    "head_dim": 256, "max_position_embeddings": 8192,
}  # fmt: skip
CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
CONVNEXT_L = {"model_cfg": {"embed_dim": 768, "vision_cfg": {"timm_model_name": "convnext_large"}}}
ZERO2 = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e7, "allgather_bucket_size": 5e7},
}
SAMPLES = [
    {"id": str(i), "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A digit. " * (i + 1)}]}
    for i in range(10)
]  # fmt: skip


def write_json(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def write_script(path: Path, launcher: str, flags: Mapping[str, object]) -> Path:
    words = [launcher, *(f"--{name} {value}" for name, value in flags.items())]
    path.write_text("#!/bin/bash\n" + " \\\n    ".join(words) + "\n")
    return path


def text_run(folder: Path, launcher: str = "python train.py", **flags: object) -> Path:
    """A plain text training in ``folder``: model/, data.json, train.sh."""
    write_json(folder / "model/config.json", LLAMA)
    write_json(folder / "data.json", SAMPLES)
    usual = {
        "model_name_or_path": "model", "data_path": "data.json", "output_dir": "out", "bf16": True, "learning_rate": 2e-5,
        "per_device_train_batch_size": 4, "gradient_checkpointing": True, "model_max_length": 256,
    }  # fmt: skip
    return write_script(folder / "train.sh", launcher, {**usual, **flags})


def mgm_run(folder: Path, launcher: str = "deepspeed --num_gpus 1 mgm/train/train.py", **flags: object) -> Path:
    """MGM-2B at its true size by its configurations, under ZeRO-2."""
    write_json(folder / "gemma/config.json", GEMMA_2B)
    write_json(folder / "clip/config.json", CLIP_L)
    write_json(folder / "convnext/open_clip_config.json", CONVNEXT_L)
    write_json(folder / "zero2.json", ZERO2)
    write_json(folder / "data.json", SAMPLES)
    usual = {
        "deepspeed": "zero2.json", "model_name_or_path": "gemma", "version": "gemma", "data_path": "data.json",
        "vision_tower": "clip", "vision_tower_aux": "convnext", "mm_projector_type": "mlp2x_gelu", "image_size_aux": 768,
        "bf16": True, "output_dir": "out", "learning_rate": 2e-5, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4, "gradient_checkpointing": True, "model_max_length": 2048,
    }  # fmt: skip
    return write_script(folder / "train.sh", launcher, {**usual, **flags})
