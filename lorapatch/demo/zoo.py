"""The model zoo of the miniature toolkit: Gemma, CLIP and ConvNeXt, tiny or of the true sizes, in their own formats."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import CLIPVisionModel, GemmaForCausalLM

    from lorapatch.trainer.towers import ConvNextTower

__all__ = ["FOLDERS", "SIZES", "Size", "Zoo", "build", "save"]

FOLDERS = {
    "language": "LLM/gemma/gemma-2b-it",
    "vision": "OpenAI/clip-vit-large-patch14-336",
    "vision_aux": "OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
}
IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True)
class Size:
    """What the three models are made from: keywords of their configurations; ``embed`` is the ConvNeXt head's width."""

    language: dict[str, Any]
    vision: dict[str, Any]
    vision_aux: dict[str, Any]
    embed: int


SIZES = {
    # Same architecture, every dimension small. The grids fit at --image_size_aux 768: ConvNeXt's first stage has
    # 768 / 16 = 48 cells a side, CLIP 56 / 14 = 4 patches, so each patch mines a window of 12 x 12.
    "tiny": Size(
        language={
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 8192,
        },
        vision={
            "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": 56, "patch_size": 14, "projection_dim": 32,
        },
        vision_aux={"patch_size": 16, "depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 32, 64]},
        embed=32,
    ),
    # Gemma-2B, CLIP ViT-L/14-336, ConvNeXt-L as open_clip's convnext_large_d_320 has it.
    "true": Size(
        language={
            "vocab_size": 256_000, "hidden_size": 2048, "intermediate_size": 16_384, "num_hidden_layers": 18,
            "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 8192,
        },
        vision={
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 336, "patch_size": 14, "projection_dim": 768,
        },
        vision_aux={"patch_size": 4, "depths": [3, 3, 27, 3], "hidden_sizes": [192, 384, 768, 1536]},
        embed=768,
    ),
}


@dataclass
class Zoo:
    """The three models and the head that open_clip keeps behind ConvNeXt (tensors by open_clip's names)."""

    language: GemmaForCausalLM
    vision: CLIPVisionModel
    vision_aux: ConvNextTower
    head: dict[str, Tensor]

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters: language model, vision tower, auxiliary tower with its head."""
        return {
            "language": _count(self.language),
            "vision": _count(self.vision),
            "vision_aux": _count(self.vision_aux) + sum(tensor.numel() for tensor in self.head.values()),
        }


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def build(size: Size, *, tokens: int, device: str, dtype: torch.dtype) -> Zoo:
    """Random models of ``size``, made directly on ``device`` in ``dtype`` from torch's current seed.

    ``tokens`` is the tokenizer's vocabulary, which ``size.language`` may widen.
    """
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, GemmaConfig, GemmaForCausalLM

    from lorapatch.trainer.towers import ConvNextTower

    tokenizer = {"vocab_size": tokens, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Zoo(
                language=GemmaForCausalLM(GemmaConfig(**tokenizer | size.language)),
                vision=CLIPVisionModel(CLIPVisionConfig(**size.vision)),
                vision_aux=ConvNextTower(ConvNextConfig(**size.vision_aux, layer_scale_init_value=0.1)),
                head=_head(size.vision_aux["hidden_sizes"][-1], size.embed),
            )
    finally:
        torch.set_default_dtype(default)


def _head(width: int, embed: int) -> dict[str, Tensor]:
    """The norm and the two-layer projection of open_clip's convnext_*_d models (the second one has no bias)."""
    import torch

    return {
        "visual.trunk.head.norm.weight": torch.ones(width),
        "visual.trunk.head.norm.bias": torch.zeros(width),
        "visual.head.mlp.fc1.weight": torch.randn(2 * embed, width) * width**-0.5,
        "visual.head.mlp.fc1.bias": torch.zeros(2 * embed),
        "visual.head.mlp.fc2.weight": torch.randn(embed, 2 * embed) * (2 * embed) ** -0.5,
    }


def save(zoo: Zoo, size: Size, folder: Path) -> None:
    """Write the models below ``folder``, each as its publisher does: Hugging Face folders, an open_clip folder."""
    import torch

    from lorapatch.trainer.towers import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, to_open_clip

    language = {name: tensor for name, tensor in zoo.language.state_dict().items() if name != "lm_head.weight"}  # tied
    _save_hugging_face(zoo.language.config, language, "GemmaForCausalLM", folder / FOLDERS["language"])
    zoo.language.generation_config.save_pretrained(folder / FOLDERS["language"])
    # Published CLIP weights name their half; transformers 5 drops the name in memory.
    tower = {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in zoo.vision.state_dict().items()}
    vision = folder / FOLDERS["vision"]
    _save_hugging_face(zoo.vision.config, tower, "CLIPVisionModel", vision)
    _dump(vision / "preprocessor_config.json", _preprocessing(size.vision["image_size"]))
    aux = folder / FOLDERS["vision_aux"]
    aux.mkdir(parents=True, exist_ok=True)
    _dump(aux / OPEN_CLIP_CONFIG, _open_clip_config(size))
    state = to_open_clip(zoo.vision_aux.state_dict()) | zoo.head
    torch.save({name: tensor.cpu() for name, tensor in state.items()}, aux / OPEN_CLIP_WEIGHTS)


def _save_hugging_face(config: Any, state: dict[str, Tensor], architecture: str, folder: Path) -> None:
    """``config.json`` and ``model.safetensors`` (not by ``save_pretrained``, which starts DeepSpeed and talks)."""
    from safetensors.torch import save_file

    config.architectures = [architecture]
    config.dtype = next(iter(state.values())).dtype
    config.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, weights, {"format": "pt"})
    weights.chmod((folder / "config.json").stat().st_mode)  # safetensors makes files that nobody else may read


def _dump(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _preprocessing(side: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD,
        "do_convert_rgb": True,
    }


def _open_clip_config(size: Size) -> dict[str, Any]:
    vision = {
        "timm_model_name": "convnext_large", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "mlp",
        "timm_drop": 0.0, "timm_drop_path": 0.1, "image_size": 320,
    }
    return {
        "model_cfg": {"embed_dim": size.embed, "vision_cfg": vision},
        "preprocess_cfg": {"mean": IMAGE_MEAN, "std": IMAGE_STD},
    }
