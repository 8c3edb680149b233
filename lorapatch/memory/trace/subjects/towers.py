"""The shapes of MGM's vision towers, known without their weights."""

# mypy: allow-untyped-calls
from __future__ import annotations

import json
from pathlib import Path

from transformers import ConvNextConfig

from lorapatch.trainer.towers import ConvNextTower

__all__ = ["SELECT_LAYER", "aux_config"]

SELECT_LAYER = -2  # MGM's --mm_vision_select_layer
# timm's ConvNeXt trunks: depths and widths by the name that open_clip_config.json has for them.
_TRUNKS = {
    "convnext_tiny": ([3, 3, 9, 3], [96, 192, 384, 768]),
    "convnext_small": ([3, 3, 27, 3], [96, 192, 384, 768]),
    "convnext_base": ([3, 3, 27, 3], [128, 256, 512, 1024]),
    "convnext_large": ([3, 3, 27, 3], [192, 384, 768, 1536]),
    "convnext_xlarge": ([3, 3, 27, 3], [256, 512, 1024, 2048]),
    "convnext_xxlarge": ([3, 4, 30, 3], [384, 768, 1536, 3072]),
}

_read_weights = ConvNextTower.read_config


def aux_config(folder: Path) -> ConvNextConfig:
    """The aux tower's shape, from its weights' sizes or, where they are not there, from the name in its configuration."""
    try:
        return _read_weights(folder)
    except Exception:
        written = Path(folder) / "open_clip_config.json"
        try:
            name = json.loads(written.read_text(encoding="utf-8"))["model_cfg"]["vision_cfg"]["timm_model_name"]
        except (OSError, ValueError, KeyError, TypeError):
            raise
        if name not in _TRUNKS:
            raise
        depths, widths = _TRUNKS[name]
        return ConvNextConfig(depths=depths, hidden_sizes=widths, layer_scale_init_value=1e-6)
