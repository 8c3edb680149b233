"""Image-text models of transformers (LLaVA, PaliGemma, Qwen-VL and their like) under its own Trainer."""

# mypy: allow-untyped-calls
from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from lorapatch.errors import Refused
from lorapatch.memory.model import RunSetup
from lorapatch.memory.towers import ANY_SIZE
from lorapatch.memory.trace.recorder import unset_fake_temporarily
from lorapatch.memory.trace.subjects import plain
from lorapatch.memory.trace.subjects.subject import Subject

__all__ = ["build"]

_TOWERS = ("vision", "visual", "image_tower", "projector", "connector", "merger", "lm_head")


def build(setup: RunSetup) -> Subject:
    """The model of ``setup.model``'s configuration; LoRA on its language model alone; raises Refused."""
    config = plain.read_config(setup)
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"  # image tokens are not counted: there are no values
    model = plain.wrapped("AutoModelForImageTextToText", config, setup, skip=_TOWERS)
    if setup.method == "pretrain":
        for name, p in model.named_parameters():
            p.requires_grad_(any(part in name for part in ("projector", "connector", "merger")))
    model.train()
    pixels = _pixels(config, setup)
    total, trainable, lora = plain.count(model)
    return Subject(
        model=model,
        make_batch=lambda length: _batch(setup, length, pixels, config),
        forward=_forward,
        vocabulary=int(config.get_text_config().vocab_size),
        total=total,
        trainable=trainable,
        lora=lora,
        batches_at_once=plain.version_of("transformers") >= (4, 46),
        assumed=[f"the weights are loaded in {setup.dtype}", pixels["said"]],
    )


def _pixels(config: Any, setup: RunSetup) -> dict[str, Any]:
    """Shape of the images' tensor and, where the model asks for it, the grid of patches of each image."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise Refused(f"{setup.model}/config.json has no vision_config: it is no image-text model")
    count = setup.micro_batch * setup.images
    if hasattr(vision, "spatial_merge_size"):  # Qwen-VL: patches of all images in one row, [n, channels · time · p · p]
        side = ANY_SIZE // vision.patch_size // vision.spatial_merge_size * vision.spatial_merge_size
        width = getattr(vision, "in_channels", 3) * getattr(vision, "temporal_patch_size", 2) * vision.patch_size**2
        said = f"images are {ANY_SIZE} x {ANY_SIZE} pixels"
        return {"shape": (count * side * side, width), "grid": [[1, side, side]] * count, "said": said}
    size = getattr(vision, "image_size", ANY_SIZE)
    size = size if isinstance(size, int) else size[0]
    return {"shape": (count, 3, size, size), "grid": None, "said": f"images are {size} x {size} pixels"}


def _batch(setup: RunSetup, length: int, pixels: dict[str, Any], config: Any) -> dict[str, Tensor]:
    shape = (setup.micro_batch, length)
    batch = {name: torch.empty(shape, dtype=torch.long) for name in ("input_ids", "labels", "attention_mask")}
    batch["pixel_values"] = torch.empty(pixels["shape"], dtype=torch.float32)
    if config.model_type == "paligemma":
        batch["token_type_ids"] = torch.empty(shape, dtype=torch.long)
    if pixels["grid"] is not None:
        with unset_fake_temporarily():  # its values decide shapes
            batch["image_grid_thw"] = torch.tensor(pixels["grid"], dtype=torch.long)
        batch["position_ids"] = torch.empty((3, *shape), dtype=torch.long)  # worked out from the grid, image by image
    return batch


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    weights = next(p for p in model.parameters() if p.is_floating_point())
    inputs = dict(batch)
    if not torch.is_autocast_enabled():
        inputs["pixel_values"] = inputs["pixel_values"].to(weights.dtype)
    return model(**inputs)
