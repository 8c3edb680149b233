"""The two frozen vision towers: CLIP for the low-resolution tokens, ConvNeXt for the high-resolution maps."""

# mypy: allow-untyped-calls
from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, ConvNextModel
from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextEncoder

from lorapatch.trainer.errors import TrainerError

__all__ = [
    "ClipTower",
    "ConvNextTower",
    "from_open_clip",
    "image_statistics",
    "stack_stages",
    "to_open_clip",
    "tower_state",
]

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_pytorch_model.bin"


class ClipTower(nn.Module):
    """CLIP's vision transformer, read at one of its hidden states, patch tokens only (LLaVA's and MGM's way).

    ``select_layer`` counts as transformers counts hidden states: -2 is the output of the last layer but one; layers
    behind it are kept (a checkpoint has them) but never run.
    """

    def __init__(self, config: CLIPVisionConfig, select_layer: int = -2, model: CLIPVisionModel | None = None) -> None:
        super().__init__()
        states = config.num_hidden_layers + 1
        if not -states <= select_layer < states:
            raise TrainerError(
                f"--mm_vision_select_layer {select_layer}: this vision tower has {states} hidden states, "
                f"from {-states} to {states - 1}"
            )
        self.config: Any = config
        self.depth = select_layer % states
        self.vision_tower = CLIPVisionModel(config) if model is None else model
        self.requires_grad_(False).eval()

    @classmethod
    def from_folder(cls, folder: str | Path, select_layer: int = -2, dtype: torch.dtype | None = None) -> ClipTower:
        """The tower of a Hugging Face folder (``config.json`` of CLIP or of its vision half, and weights)."""
        config = cls.read_config(folder)
        model = _pretrained(CLIPVisionModel, folder, "--vision_tower", config, dtype)
        return cls(config, select_layer, model)

    @staticmethod
    def read_config(folder: str | Path) -> CLIPVisionConfig:
        """The vision half of ``config.json``; raises TrainerError when there is none."""
        written = _read_json(Path(folder) / "config.json", "--vision_tower")
        if written.get("model_type") not in {"clip", "clip_vision_model"}:
            raise TrainerError(
                f"--vision_tower {folder} holds a {written.get('model_type')!r} model: a CLIP folder is needed"
            )
        config: CLIPVisionConfig = CLIPVisionConfig.from_pretrained(folder)
        return config

    @property
    def hidden_size(self) -> int:
        """Channels of a token (1024 for ViT-L/14)."""
        return int(self.config.hidden_size)

    @property
    def grid(self) -> int:
        """Patches along one side (24 for ViT-L/14 at 336)."""
        return int(self.config.image_size) // int(self.config.patch_size)

    @property
    def image_size(self) -> int:
        """Side of the square image it sees, pixels."""
        return int(self.config.image_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised ``pixels`` [N, 3, image_size, image_size] -> patch tokens [N, grid², hidden_size]."""
        tower = self.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers[: self.depth]:
            hidden = layer(hidden, None)
        tokens: Tensor = hidden[:, 1:]
        return tokens


class ConvNextTower(nn.Module):
    """ConvNeXt without its head; the output of every stage is kept, as MGM's patch-info mining reads them all."""

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__()
        self.config: Any = config
        self.embeddings = ConvNextEmbeddings(config)
        self.encoder = ConvNextEncoder(config)
        self.requires_grad_(False).eval()

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype | None = None) -> ConvNextTower:
        """The tower of an open_clip folder or of a Hugging Face ConvNeXt folder."""
        folder = Path(folder)
        if (folder / OPEN_CLIP_CONFIG).is_file():
            state = from_open_clip(_read_open_clip(folder))
            tower = cls(_config_of(state, _drop_path(folder)))
            if missing := tower.load_state_dict(state, strict=False).missing_keys:
                raise TrainerError(f"--vision_tower_aux {folder} lacks {len(missing)} tensors, {missing[0]} among them")
        else:
            model = _pretrained(ConvNextModel, folder, "--vision_tower_aux", cls.read_config(folder), dtype)
            tower = cls(model.config)
            tower.embeddings, tower.encoder = model.embeddings, model.encoder
            tower.requires_grad_(False).eval()
        return tower.to(dtype or torch.float32)

    @classmethod
    def read_config(cls, folder: str | Path) -> ConvNextConfig:
        """The tower's shape: from ``config.json``, or from the weights of an open_clip folder (their sizes only)."""
        folder = Path(folder)
        if (folder / OPEN_CLIP_CONFIG).is_file():
            return _config_of(from_open_clip(_read_open_clip(folder)), _drop_path(folder))
        written = _read_json(folder / "config.json", "--vision_tower_aux")
        if written.get("model_type") != "convnext":
            raise TrainerError(
                f"--vision_tower_aux {folder} holds a {written.get('model_type')!r} model: "
                f"an open_clip folder ({OPEN_CLIP_CONFIG}, {OPEN_CLIP_WEIGHTS}) or a ConvNeXt folder is needed"
            )
        config: ConvNextConfig = ConvNextConfig.from_pretrained(folder)
        return config

    @property
    def hidden_size(self) -> int:
        """Channels of all stages together (2,880 for ConvNeXt-L)."""
        return sum(self.config.hidden_sizes)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Normalised ``pixels`` [N, 3, S, S] -> one map a stage, [N, C_i, S / (4 · 2^i), S / (4 · 2^i)]."""
        maps = []
        hidden = self.embeddings(pixels.contiguous(memory_format=torch.channels_last))
        for stage in self.encoder.stages:
            hidden = stage(hidden)
            maps.append(hidden)
        return maps


def stack_stages(maps: list[Tensor]) -> Tensor:
    """All stages on the first one's grid (bilinear), channels one behind the other: [N, sum C_i, H_0, W_0]."""
    first, *rest = maps
    resized = [functional.interpolate(m, size=first.shape[-2:], mode="bilinear", align_corners=False) for m in rest]
    return torch.cat([first, *resized], dim=1)


# timm's words (which open_clip and MGM's checkpoints use) and transformers' for the same part.
_BLOCK = {
    "conv_dw": "dwconv",
    "norm": "layernorm",
    "mlp.fc1": "pwconv1",
    "mlp.fc2": "pwconv2",
    "gamma": "layer_scale_parameter",
}
_STEM = {"0": "patch_embeddings", "1": "layernorm"}


def from_open_clip(state: Mapping[str, Tensor], prefix: str = "visual.trunk.") -> dict[str, Tensor]:
    """An open_clip (timm) ConvNeXt ``state`` under :class:`ConvNextTower`'s names; heads and text half are left out."""
    found = {}
    for key, tensor in state.items():
        name = key.removeprefix(prefix)
        if name == key:
            continue
        if match := re.fullmatch(r"stem\.([01])\.(weight|bias)", name):
            found[f"embeddings.{_STEM[match[1]]}.{match[2]}"] = tensor
        elif match := re.fullmatch(r"stages\.(\d+)\.downsample\.([01])\.(weight|bias)", name):
            found[f"encoder.stages.{match[1]}.downsampling_layer.{match[2]}.{match[3]}"] = tensor
        elif match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+?)((?:\.weight|\.bias)?)", name):
            found[f"encoder.stages.{match[1]}.layers.{match[2]}.{_BLOCK[match[3]]}{match[4]}"] = tensor
    return found


def to_open_clip(state: Mapping[str, Tensor], prefix: str = "visual.trunk.") -> dict[str, Tensor]:
    """The inverse of :func:`from_open_clip`: a :class:`ConvNextTower` ``state`` under open_clip's names."""
    stem = {theirs: ours for ours, theirs in _STEM.items()}
    block = {theirs: ours for ours, theirs in _BLOCK.items()}
    named = {}
    for key, tensor in state.items():
        if match := re.fullmatch(r"embeddings\.(\w+)\.(weight|bias)", key):
            name = f"stem.{stem[match[1]]}.{match[2]}"
        elif match := re.fullmatch(r"encoder\.stages\.(\d+)\.downsampling_layer\.([01])\.(weight|bias)", key):
            name = f"stages.{match[1]}.downsample.{match[2]}.{match[3]}"
        elif match := re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(\w+?)((?:\.weight|\.bias)?)", key):
            name = f"stages.{match[1]}.blocks.{match[2]}.{block[match[3]]}{match[4]}"
        else:
            raise ValueError(f"{key} is no parameter of a ConvNextTower")
        named[prefix + name] = tensor
    return named


def image_statistics(clip: str | Path, aux: str | Path | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the ``clip`` folder's ``preprocessor_config.json`` (CLIP's own where it is silent).

    Both towers see the same pixels: raises TrainerError when the open_clip folder asks for others.
    """
    preprocessor, open_clip = Path(clip) / "preprocessor_config.json", Path(aux or "") / OPEN_CLIP_CONFIG
    written = _read_json(preprocessor, "--vision_tower") if preprocessor.is_file() else {}
    mean = list(written.get("image_mean", [0.48145466, 0.4578275, 0.40821073]))
    std = list(written.get("image_std", [0.26862954, 0.26130258, 0.27577711]))
    settings = _read_json(open_clip, "--vision_tower_aux") if aux and open_clip.is_file() else {}
    other = settings.get("preprocess_cfg", {})
    if (list(other.get("mean", mean)), list(other.get("std", std))) != (mean, std):
        raise TrainerError(f"{clip} and {aux} normalise images differently: the towers do not belong together")
    return mean, std


def tower_state(clip: ClipTower, aux: ConvNextTower | None) -> dict[str, Tensor]:
    """The towers' weights under the names a full MGM checkpoint has for them (``model.vision_tower…``)."""
    state = {}
    for key, tensor in clip.vision_tower.state_dict().items():
        state[f"model.vision_tower.vision_tower.vision_model.{key.removeprefix('vision_model.')}"] = tensor
    if aux is not None:
        for key, tensor in to_open_clip(aux.state_dict(), prefix="vision_").items():
            state[f"model.vision_tower_aux.{key}"] = tensor
    return state


def _pretrained(model_class: Any, folder: str | Path, flag: str, config: Any, dtype: torch.dtype | None) -> Any:
    """transformers' loading, which would fill what is missing with random values and go on."""
    try:
        model, told = model_class.from_pretrained(
            folder, config=config, dtype=dtype or torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainerError(f"{flag} {folder} cannot be loaded: {reason}") from error
    if missing := sorted(told["missing_keys"]):
        raise TrainerError(f"{flag} {folder} lacks {len(missing)} tensors of the tower, {missing[0]} among them")
    return model


def _config_of(state: Mapping[str, Tensor], drop_path: float) -> ConvNextConfig:
    """Depths and widths, read off the weights, so that a tower of any size is known without a table of names."""
    depths: dict[int, int] = {}
    widths: dict[int, int] = {}
    for key, tensor in state.items():
        if match := re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv\.weight", key):
            stage = int(match[1])
            depths[stage] = max(depths.get(stage, 0), int(match[2]) + 1)
            widths[stage] = tensor.shape[0]
    stem = state["embeddings.patch_embeddings.weight"]
    return ConvNextConfig(
        num_channels=stem.shape[1],
        patch_size=stem.shape[-1],
        num_stages=len(depths),
        depths=[depths[i] for i in sorted(depths)],
        hidden_sizes=[widths[i] for i in sorted(widths)],
        layer_scale_init_value=1e-6 if any(k.endswith("layer_scale_parameter") for k in state) else 0.0,
        drop_path_rate=drop_path,
    )


def _read_open_clip(folder: Path) -> dict[str, Tensor]:
    weights = folder / OPEN_CLIP_WEIGHTS
    if not weights.is_file():
        raise TrainerError(f"--vision_tower_aux {folder} has no {OPEN_CLIP_WEIGHTS}: download the tower again")
    try:
        state: dict[str, Tensor] = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a torn pickle raises whatever its bytes suggest
        raise TrainerError(f"{weights} is damaged ({type(error).__name__}): download the tower again") from error
    if not any(key.startswith("visual.trunk.stages.0.blocks.0.conv_dw") for key in state):
        raise TrainerError(f"{weights} holds no ConvNeXt (no visual.trunk.stages…): --vision_tower_aux needs one")
    return state


def _drop_path(folder: Path) -> float:
    written = _read_json(folder / OPEN_CLIP_CONFIG, "--vision_tower_aux")
    return float(written.get("model_cfg", {}).get("vision_cfg", {}).get("timm_drop_path") or 0.0)


def _read_json(file: Path, flag: str) -> dict[str, Any]:
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainerError(f"{flag}: {file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise TrainerError(f"{flag}: {file} is not JSON ({error})") from error
    if not isinstance(written, dict):
        raise TrainerError(f"{flag}: {file} is not a JSON object")
    return written
