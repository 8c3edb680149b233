"""Sizes that a ``config.json`` may leave out: those of transformers' configuration classes.

A nested configuration is published without what its class has anyway (LLaVA's says of Llama hardly more than its name).
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["LANGUAGES", "TOWERS", "language_defaults"]

_NAMES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings",
)  # fmt: skip
# By model_type without "_text", in the order of _NAMES; no key-value heads: as many as heads.
LANGUAGES: Mapping[str, tuple[int | None, ...]] = {
    "llama": (32_000, 4096, 11_008, 32, 32, None, 2048),
    "mistral": (32_000, 4096, 14_336, 32, 32, 8, 131_072),
    "gemma": (256_000, 3072, 24_576, 28, 16, 16, 8192),
    "gemma2": (256_000, 2304, 9216, 26, 8, 4, 8192),
    "gemma3": (262_208, 2304, 9216, 26, 8, 4, 131_072),
    "qwen2": (151_936, 4096, 22_016, 32, 32, 32, 32_768),
    "qwen2_vl": (152_064, 8192, 29_568, 80, 64, 8, 32_768),
    "qwen2_5_vl": (152_064, 8192, 29_568, 80, 64, 8, 32_768),
    "qwen3": (151_936, 4096, 22_016, 32, 32, 32, 32_768),
    "qwen3_vl": (151_936, 4096, 22_016, 32, 32, 32, 128_000),
    "phi3": (32_064, 3072, 8192, 32, 32, None, 4096),
}
# By model_type without "_vision".
TOWERS: Mapping[str, Mapping[str, int]] = {
    "clip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 224, "patch_size": 32,
    },
    "siglip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 224, "patch_size": 16,
    },
    "qwen2_vl": {"embed_dim": 1280, "mlp_ratio": 4, "depth": 32, "patch_size": 14, "spatial_merge_size": 2},
    "qwen2_5_vl": {
        "hidden_size": 3584, "intermediate_size": 3420, "depth": 32, "patch_size": 14, "spatial_merge_size": 2,
    },
}  # fmt: skip


def language_defaults(kind: str) -> dict[str, int | None]:
    """What a language model of ``kind`` has where its configuration is silent; nothing for a kind that is not known."""
    return dict(zip(_NAMES, LANGUAGES.get(kind, ())))
