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
_TEXT = {name: value for name, value in LLAMA.items() if name != "architectures"}
_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
IMAGE_TEXT = {
    "llava": {
        "model_type": "llava", "text_config": _TEXT, "vision_config": CLIP, "image_token_id": 500,
        "image_token_index": 500, "vision_feature_layer": -2,
    },
    "paligemma": {
        "model_type": "paligemma", "text_config": GEMMA, "projection_dim": 64, "hidden_size": 64, "image_token_id": 500,
        "image_token_index": 500, "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
        },
    },
    "qwen2_vl": {
        "model_type": "qwen2_vl", "image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502,
        "vision_end_token_id": 503, "text_config": _TEXT | {
            "model_type": "qwen2_vl_text", "bos_token_id": 1, "eos_token_id": 2, "rope_parameters": _ROPE,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        },
        "vision_config": {
            "model_type": "qwen2_vl", "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        },
    },
}  # fmt: skip
IMAGE_TEXT["qwen2_5_vl"] = IMAGE_TEXT["qwen2_vl"] | {
    "model_type": "qwen2_5_vl", "text_config": IMAGE_TEXT["qwen2_vl"]["text_config"] | {"model_type": "qwen2_5_vl_text"},
    "vision_config": {
        "model_type": "qwen2_5_vl", "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2,
        "intermediate_size": 48, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        "fullatt_block_indexes": [1], "window_size": 112,
    },
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
