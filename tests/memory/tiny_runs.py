"""Runs of tiny models for the tests of the trace: folders with a config.json, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorapatch.memory.model import LoraSetup, RunSetup, Zero

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "projection_dim": 16,
}  # fmt: skip
CONVNEXT = {
    "model_type": "convnext", "patch_size": 4, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64],
    "layer_scale_init_value": 0.1,
}  # fmt: skip
TRUE_SIZE = {
    "language": {
        "model_type": "gemma", "vocab_size": 256_000, "hidden_size": 2048, "intermediate_size": 16_384,
        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
        "max_position_embeddings": 8192,
    },
    "clip": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip
ZERO2 = Zero(stage=2, overlap_comm=True, reduce_bucket_size=4096)
ZERO3 = Zero(stage=3, overlap_comm=True, reduce_bucket_size=4096, prefetch_bucket_size=4096, param_persistence_threshold=64)


def folder(path: Path, config: dict[str, Any], name: str = "config.json") -> Path:
    """``path`` with ``config`` in it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(json.dumps(config), encoding="utf-8")
    return path


def text_run(path: Path, **changes: Any) -> RunSetup:
    """LoRA of a tiny Llama under a plain Trainer, no DeepSpeed."""
    values: dict[str, Any] = {
        "family": "causal_lm", "trainer": "transformers", "model": folder(path / "llama", LLAMA), "method": "lora",
        "micro_batch": 2, "sequence": 32, "labels": 32, "lora": LoraSetup(r=4), "accumulation": 2,
        "optimizer": "adamw_torch_fused", "use_reentrant": False,
    }  # fmt: skip
    return RunSetup(**values | changes)


def mgm_run(path: Path, **changes: Any) -> RunSetup:
    """LoRA of a tiny MGM by the embedded trainer under ZeRO-2; a window of 4 x 4 for each of 16 patches."""
    values: dict[str, Any] = {
        "family": "mgm", "trainer": "embedded", "model": folder(path / "gemma", GEMMA), "method": "lora",
        "micro_batch": 2, "sequence": 48, "labels": 8, "vision_tower": folder(path / "clip", CLIP),
        "vision_tower_aux": folder(path / "convnext", CONVNEXT), "image_size_aux": 64, "lora": LoraSetup(r=4),
        "accumulation": 2, "zero": ZERO2,
    }  # fmt: skip
    return RunSetup(**values | changes)


def true_mgm_run(path: Path, **changes: Any) -> RunSetup:
    """MGM-2B at its true size, known by its configurations alone (the aux tower by its name)."""
    values: dict[str, Any] = {
        "model": folder(path / "true/gemma", TRUE_SIZE["language"]),
        "vision_tower": folder(path / "true/clip", TRUE_SIZE["clip"]),
        "vision_tower_aux": folder(
            path / "true/aux",
            {"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_large"}}},
            "open_clip_config.json",
        ),
        "image_size_aux": 768, "sequence": 620, "lora": LoraSetup(),
    }  # fmt: skip
    return mgm_run(path, **values | changes)
