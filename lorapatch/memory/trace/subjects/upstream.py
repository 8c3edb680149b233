"""MGM's own trainer, rebuilt on the installed transformers: logits at every position, keys and values of every window kept.

The structure follows mgm/model/mgm_arch.py and mgm/train/train.py (dvlab-research/MGM); no weights, no data.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionModel

from lorapatch.memory.model import RunSetup
from lorapatch.memory.trace.fake import made_on_meta
from lorapatch.memory.trace.subjects.plain import cast, count, read_config, version_of, wrapped
from lorapatch.memory.trace.subjects.subject import DTYPES, Subject
from lorapatch.memory.trace.subjects.towers import SELECT_LAYER, aux_config
from lorapatch.trainer.towers import ClipTower, ConvNextTower

__all__ = ["build"]


def build(setup: RunSetup) -> Subject:
    """Towers, bridge and language model as one module, frozen as ``train.py`` freezes them; raises Refused."""
    config = read_config(setup)
    language = wrapped("AutoModelForCausalLM", config, setup)
    with made_on_meta(torch.float32):  # what the trainer adds has torch's own dtype
        model = _Upstream(language, setup, int(config.hidden_size))
    if setup.method == "pretrain":
        model.requires_grad_(False)
        model.mm_projector.requires_grad_(True)
    if setup.zero is not None:
        cast(model, DTYPES[setup.dtype])
    model.train()
    total, trainable, lora = count(model)
    return Subject(
        model=model,
        make_batch=lambda length: _batch(setup, length, model),
        forward=lambda module, batch: module(batch),
        vocabulary=int(config.vocab_size),
        total=total,
        trainable=trainable,
        lora=lora,
        batches_at_once=version_of("transformers") >= (4, 46),
        assumed=["stochastic depth in the aux tower is off"],
    )


class _Upstream(nn.Module):
    """MGM's forward pass around a causal language model, which may carry LoRA."""

    def __init__(self, language: Any, setup: RunSetup, hidden: int) -> None:
        super().__init__()
        self.language = language
        clip_config = ClipTower.read_config(str(setup.vision_tower))
        self.clip = CLIPVisionModel(clip_config)
        self.aux = ConvNextTower(aux_config(setup.vision_tower_aux)) if setup.vision_tower_aux else None
        towers: list[Any] = [self.clip, self.aux]
        for tower in towers:
            if tower is not None:
                tower.requires_grad_(False).to(DTYPES[setup.dtype])
        width = int(clip_config.hidden_size)
        self.mm_projector = _projector(setup.projector, width, hidden)
        self.limit = setup.model_max_length
        self.dtype = DTYPES[setup.dtype]
        if self.aux is not None:
            stages = self.aux.hidden_size
            self.vlm_uni_query_projector = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
            self.vlm_uni_aux_projector = nn.Sequential(nn.LayerNorm(stages), nn.Linear(stages, width))
            self.vlm_uni_val_projector = nn.Sequential(nn.LayerNorm(stages), nn.Linear(stages, width))

    def forward(self, batch: dict[str, Any]) -> Any:
        features = self._encode(batch)
        embeds = self._join(batch["input_ids"], features)
        del features
        shape = embeds.shape[:2]
        mask = torch.empty(shape, dtype=batch["attention_mask"].dtype)
        labels = torch.empty(shape, dtype=torch.long)
        return self.language(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False)

    def _encode(self, batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            seen = self.clip(batch["images"].to(self.dtype), output_hidden_states=True)
            tokens = seen.hidden_states[SELECT_LAYER][:, 1:].to(batch["images"].dtype)
            del seen
        if self.aux is not None:
            maps = self._maps(batch["images_aux"].to(self.dtype)).to(tokens.dtype)
            tokens = tokens + self._mine(tokens, maps)
        projected: Tensor = self.mm_projector(tokens)
        return projected

    @torch.no_grad()
    def _maps(self, pixels: Tensor) -> Tensor:
        """Every stage on the first one's grid, in float32 one after the other, then all of them as one."""
        assert self.aux is not None
        stages, hidden = [], self.aux.embeddings(pixels)
        for stage in self.aux.encoder.stages:
            hidden = stage(hidden)
            stages.append(hidden)
        size = stages[0].shape[-2:]
        parts = [stages[0].contiguous()]
        for stage in stages[1:]:
            wide = functional.interpolate(stage.float().contiguous(), size=size, mode="bilinear", align_corners=False)
            parts.append(wide.to(stage.dtype))
        return torch.cat(parts, dim=1).contiguous()

    def _mine(self, tokens: Tensor, maps: Tensor) -> Tensor:
        """Softmax over each patch's window, in which every key and value is a tensor of its own."""
        count, channels, height, _ = maps.shape
        grid = round(tokens.shape[1] ** 0.5)
        side = height // grid
        maps = maps.permute(0, 2, 3, 1).reshape(count, grid, side, grid, side, channels).permute(0, 1, 3, 2, 4, 5)
        windows = maps.reshape(count, grid * grid, side * side, channels).contiguous()
        query = self.vlm_uni_query_projector(tokens)
        keys = self.vlm_uni_aux_projector(windows)
        values = self.vlm_uni_val_projector(windows)
        scores = query[:, :, None] @ (keys.transpose(-1, -2) / (keys.shape[-1] ** 0.5))
        scores = scores.nan_to_num()
        mined: Tensor = (scores.softmax(-1) @ values).mean(2)
        return mined

    def _join(self, input_ids: Tensor, features: Tensor) -> Tensor:
        """Sample by sample: text before the image, the image's tokens, text behind it; padded, then stacked."""
        embed = self.language.get_input_embeddings()
        joined = []
        each = len(features) // len(input_ids)
        for number, ids in enumerate(input_ids):
            text = embed(ids)
            images = [features[number * each + image] for image in range(each)]
            joined.append(torch.cat([text[:1], *images, text[1:]])[: self.limit])
        padded = [torch.cat((sample, torch.zeros((0, sample.shape[1]), dtype=sample.dtype)), dim=0) for sample in joined]
        return torch.stack(padded, dim=0)


def _projector(kind: str, width: int, hidden: int) -> nn.Module:
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    layers: list[nn.Module] = [nn.Linear(width, hidden)]
    for _ in range(1, int(match[1]) if match else 1):
        layers += [nn.GELU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*layers)


def _batch(setup: RunSetup, length: int, model: _Upstream) -> dict[str, Tensor]:
    """Images come to the GPU as float32, and DeepSpeed's run makes them 16 bits wide beside that."""
    clip: Any = model.clip.config
    clip_size = int(clip.image_size)
    grid = clip_size // int(clip.patch_size)
    count = setup.micro_batch * setup.images
    text = max(length - setup.images * grid * grid, 2)
    batch = {
        "input_ids": torch.empty((setup.micro_batch, text), dtype=torch.long),
        "labels": torch.empty((setup.micro_batch, text), dtype=torch.long),
        "attention_mask": torch.empty((setup.micro_batch, text), dtype=torch.bool),
    }
    for name, size in (("images", clip_size), ("images_aux", setup.image_size_aux)):
        loaded = torch.empty((count, 3, size, size), dtype=torch.float32)
        batch[f"{name}_as_loaded"] = loaded
        batch[name] = loaded.to(DTYPES[setup.dtype]) if setup.zero is not None else loaded
    return batch
