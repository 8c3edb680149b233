"""Shapes and parameters of vision towers and of MGM's bridge, from configuration files (or the sizes of weights)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapatch.errors import Refused
from lorapatch.memory.architecture import read_config

__all__ = ["ConvNext", "VisionTransformer", "bridge_parameters", "read_convnext", "read_vision"]

# timm's convnext.py: depths and widths.
_TIMM = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "xxlarge": ((3, 4, 30, 3), (384, 768, 1536, 3072)),
}


@dataclass(frozen=True)
class VisionTransformer:
    """CLIP's (or a like) vision half; ``class_token`` and norms as CLIP has them."""

    hidden: int
    intermediate: int
    layers: int
    image_size: int
    patch_size: int
    clip: bool = True

    @property
    def tokens(self) -> int:
        """Patches of an image, each a token for the language model."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def parameters(self) -> int:
        width = self.hidden
        patches = 3 * self.patch_size**2 * width + (0 if self.clip else width)
        positions = (self.tokens + self.clip) * width
        layer = 4 * (width * width + width) + 2 * width * self.intermediate + self.intermediate + 5 * width
        return patches + positions + (width if self.clip else 0) + self.layers * layer + (4 if self.clip else 2) * width


@dataclass(frozen=True)
class ConvNext:
    """ConvNeXt without its head: ``patch_size`` of the stem, blocks and widths of the stages."""

    patch_size: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Of all stages together: what patch-info mining reads."""
        return sum(self.widths)

    @property
    def parameters(self) -> int:
        stem = 3 * self.patch_size**2 * self.widths[0] + 3 * self.widths[0]
        blocks = sum(n * (8 * w * w + 58 * w) for n, w in zip(self.depths, self.widths, strict=True))
        pairs = zip(self.widths, self.widths[1:])
        return stem + blocks + sum(2 * narrow + 4 * narrow * wide + wide for narrow, wide in pairs)

    def map_elements(self, image_size: int) -> int:
        """Elements of all stages' maps for one image of ``image_size`` pixels a side."""
        side = image_size // self.patch_size
        return sum(width * (side >> stage) ** 2 for stage, width in enumerate(self.widths))


def read_vision(folder: Path) -> VisionTransformer:
    """The vision transformer in ``folder`` (CLIP, its vision half, SigLIP). Raises Refused."""
    return vision_of(read_config(folder), str(folder))


def vision_of(config: Mapping[str, Any], where: str) -> VisionTransformer:
    """The same from the configuration itself, or from the ``vision_config`` in it."""
    inner = config.get("vision_config")
    written = inner if isinstance(inner, dict) else config
    try:
        hidden = int(written.get("hidden_size") or written["embed_dim"])
        tower = VisionTransformer(
            hidden=hidden,
            intermediate=int(written.get("intermediate_size") or int(written.get("mlp_ratio", 4)) * hidden),
            layers=int(written.get("num_hidden_layers") or written["depth"]),
            image_size=int(written.get("image_size") or 336),
            patch_size=int(written.get("patch_size") or 14),
            clip="clip" in str(written.get("model_type", "clip")) and "siglip" not in str(written.get("model_type")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"{where}: the vision tower's configuration has no {error}") from error
    if min(tower.hidden, tower.layers, tower.image_size, tower.patch_size) < 1:
        raise Refused(f"{where}: the vision tower's configuration has a size below 1")
    return tower


def read_convnext(folder: Path) -> ConvNext:
    """The ConvNeXt in ``folder``: the sizes of open_clip's weights where they are, else what its configuration says.

    Raises Refused where neither tells.
    """
    if (folder / "open_clip_config.json").is_file():
        return _weighed(folder / "open_clip_pytorch_model.bin") or _named(folder / "open_clip_config.json")
    written = read_config(folder)
    try:
        widths, depths = (tuple(int(n) for n in written[name]) for name in ("hidden_sizes", "depths"))
        return ConvNext(max(int(written.get("patch_size", 4)), 1), depths[: len(widths)], widths[: len(depths)])
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"{folder}: config.json is not that of a ConvNeXt (no {error})") from error


def _weighed(weights: Path) -> ConvNext | None:
    if not weights.is_file():
        return None
    from lorapatch.adapter.tensors import read_tensors

    try:
        shapes = {name.removeprefix("visual.trunk."): t.shape for name, t in read_tensors(weights).items()}
    except Refused:
        return None
    depths: dict[int, int] = {}
    widths: dict[int, int] = {}
    for name, shape in shapes.items():
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.weight", name):
            stage = int(match[1])
            depths[stage], widths[stage] = max(depths.get(stage, 0), int(match[2]) + 1), shape[0]
    stem = shapes.get("stem.0.weight")
    if stem is None or not depths:
        return None
    return ConvNext(stem[-1], tuple(depths[i] for i in sorted(depths)), tuple(widths[i] for i in sorted(widths)))


def _named(path: Path) -> ConvNext:
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]["vision_cfg"]["timm_model_name"]
        depths, widths = _TIMM[str(name).removeprefix("convnext_").split("_")[0].split(".")[0]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} names no ConvNeXt that is known") from error
    return ConvNext(4, depths, widths)


def bridge_parameters(kind: str, vision: int, language: int, aux_channels: int | None) -> int:
    """Parameters of projector and, with an auxiliary tower, of MGM's three ``vlm_uni`` projectors."""
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    depth = int(match[1]) if match else 0 if kind == "identity" else 1
    projector = (vision + 1) * language + (depth - 1) * (language + 1) * language if depth else 0
    if aux_channels is None:
        return projector
    return projector + 2 * vision + (vision + 1) * vision + 2 * (2 * aux_channels + (aux_channels + 1) * vision)
