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
from lorapatch.memory.defaults import TOWERS

__all__ = [
    "ANY_SIZE", "ConvNext", "VisionTransformer", "bridge_parameters", "connector_parameters", "read_convnext", "read_vision",
    "vision_of",
]  # fmt: skip

ANY_SIZE = 448  # pixels a side of an image, where a model takes any

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
    """The vision half of an image-text model.

    ``kind``: clip, siglip (no class token, a bias at the patches), qwen2_vl and qwen2_5_vl (frames come in pairs, positions
    are rotary, no norm at the end; the latter's MLP is gated). ``merge`` x ``merge`` patches become one token; ``head``:
    SigLIP's pooling by attention, which costs parameters and is not used.
    """

    hidden: int
    intermediate: int
    layers: int
    image_size: int
    patch_size: int
    kind: str = "clip"
    merge: int = 1
    head: bool = False

    @property
    def patches(self) -> int:
        """Of an image, each a position in the tower."""
        return (self.image_size // self.patch_size // self.merge * self.merge) ** 2

    @property
    def tokens(self) -> int:
        """Of an image, for the language model."""
        return self.patches // self.merge**2

    @property
    def parameters(self) -> int:
        width, inner = self.hidden, self.intermediate
        patches = 3 * self.patch_size**2 * width
        if self.kind == "clip":
            outside = patches + (self.patches + 1) * width + 5 * width
        elif self.kind == "siglip":
            outside = patches + self.patches * width + 3 * width
        else:
            outside = 2 * patches
        gated = self.kind == "qwen2_5_vl"
        mlp = (3 if gated else 2) * width * inner + (2 if gated else 1) * inner + width
        layer = 4 * (width * width + width) + mlp + (2 if gated else 4) * width
        return outside + self.layers * layer + (layer - width if self.head else 0)


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
    inner, outer = config.get("vision_config"), str(config.get("model_type", "clip"))
    name = outer
    if isinstance(inner, dict):
        name = str(inner.get("model_type") or (outer if "qwen" in outer else "clip_vision_model"))
    name = name.removesuffix("_vision")
    written = {**TOWERS.get(name, {}), **(inner if isinstance(inner, dict) else config)}
    try:
        hidden = int(written.get("embed_dim") or written["hidden_size"])
        merge = int(written.get("spatial_merge_size") or 1)
        tower = VisionTransformer(
            hidden=hidden,
            intermediate=int(written.get("intermediate_size") or int(written.get("mlp_ratio", 4)) * hidden),
            layers=int(written.get("num_hidden_layers") or written["depth"]),
            image_size=int(written.get("image_size") or (ANY_SIZE if merge > 1 else 336)),
            patch_size=int(written.get("patch_size") or 14),
            kind=_tower_kind(name),
            merge=merge,
            head="siglip" in name and bool(written.get("vision_use_head", True)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"{where}: the vision tower's configuration has no {error}") from error
    if min(tower.hidden, tower.layers, tower.image_size, tower.patch_size, tower.merge) < 1:
        raise Refused(f"{where}: the vision tower's configuration has a size below 1")
    return tower


def _tower_kind(name: str) -> str:
    if "qwen" in name:
        return "qwen2_5_vl" if "qwen2_5" in name else "qwen2_vl"
    return "clip" if "clip" in name and "siglip" not in name else "siglip"


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


def connector_parameters(model_type: str, vision: VisionTransformer, language: int) -> int:
    """Parameters between the halves of transformers' image-text models, ``language`` being the width of the second.

    Qwen-VL's merger of several patches, PaliGemma's single layer, LLaVA's two.
    """
    if vision.merge > 1:
        wide = vision.hidden * vision.merge**2
        norm = vision.hidden if vision.kind == "qwen2_5_vl" else 2 * vision.hidden
        return norm + (wide + 1) * wide + (wide + 1) * language
    return bridge_parameters("linear" if model_type == "paligemma" else "mlp2x_gelu", vision.hidden, language, None)
