"""lorapatch's own trainer: the model that :mod:`lorapatch.trainer` builds, on the meta device, trained as it trains."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CLIPVisionModel

from lorapatch.errors import Refused
from lorapatch.memory.model import RunSetup
from lorapatch.memory.trace import quantised
from lorapatch.memory.trace.fake import made_on_meta
from lorapatch.memory.trace.subjects.plain import count
from lorapatch.memory.trace.subjects.subject import DTYPES, Subject
from lorapatch.memory.trace.subjects.towers import SELECT_LAYER, aux_config
from lorapatch.trainer.lora import add_lora
from lorapatch.trainer.mining import KeyProjector, ValueProjector
from lorapatch.trainer.model import BRIDGE, CAUSAL_SDPA, mgm_config
from lorapatch.trainer.towers import ClipTower, ConvNextTower, image_statistics

__all__ = ["build"]


def build(setup: RunSetup) -> Subject:
    """The model, frozen and wrapped as ``train.build_model`` does it; raises TrainerError or Refused."""
    dtype = DTYPES[setup.dtype]
    with _shapes_without_weights():
        config = mgm_config(
            setup.model,
            mm_vision_tower=str(setup.vision_tower),
            mm_vision_tower_aux=str(setup.vision_tower_aux) if setup.vision_tower_aux else None,
            mm_projector_type=setup.projector,
            mm_vision_select_layer=SELECT_LAYER,
            image_size_aux=setup.image_size_aux,
        )
    full = setup.method == "full"
    weights = torch.float32 if full and setup.zero is None else dtype
    with made_on_meta(weights):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=weights, attn_implementation=_attention(setup))
        model.tie_weights()
        quantised.replace(model, setup, skip=(*BRIDGE, "lm_head"))
    with made_on_meta(dtype):
        _attach_towers(model, setup)
    if model.config._attn_implementation == "sdpa":
        window = getattr(config, "sliding_window", None)
        if not window or window >= setup.model_max_length:
            model.set_attn_implementation(CAUSAL_SDPA)
    if setup.gradient_checkpointing:
        model.enable_input_require_grads()
    with made_on_meta(torch.float32):
        wrapped = _choose_trainable(model, setup)
    total, trainable, lora = count(wrapped)
    if setup.gradient_checkpointing:
        wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": setup.use_reentrant})
    wrapped.train()
    return Subject(
        model=wrapped,
        towers=model.towers,
        tensors=[(model, "pixel_scale")],
        leaves=(KeyProjector, ValueProjector),  # as train.py says
        make_batch=lambda length: _batch(setup, length, model),
        forward=lambda module, batch: module(**batch),
        vocabulary=int(config.vocab_size),
        total=total + sum(count(tower)[0] for tower in model.towers),
        trainable=trainable,
        lora=lora,
        assumed=["stochastic depth in the aux tower is off"],
    )


def _attention(setup: RunSetup) -> str:
    return "eager" if setup.attention == "eager" else "sdpa"


def _attach_towers(model: Any, setup: RunSetup) -> None:
    clip_config = ClipTower.read_config(str(setup.vision_tower))
    clip_config._attn_implementation = "sdpa"
    clip = ClipTower(clip_config, SELECT_LAYER, CLIPVisionModel(clip_config))
    aux = ConvNextTower(aux_config(setup.vision_tower_aux)) if setup.vision_tower_aux else None
    mean, std = image_statistics(str(setup.vision_tower), setup.vision_tower_aux)
    model.attach_towers(clip, aux, mean, std)
    if aux is not None and setup.image_size_aux % (4 * clip.grid):
        raise Refused(f"--image_size_aux {setup.image_size_aux}: it has to be a multiple of {4 * clip.grid}")


@contextmanager
def _shapes_without_weights() -> Iterator[None]:
    """``mgm_config`` asks the aux tower for its widths: they are known without the weights, too."""
    tower: Any = ConvNextTower
    before = tower.read_config
    tower.read_config = lambda folder: aux_config(Path(folder))
    try:
        yield
    finally:
        tower.read_config = before


def _choose_trainable(model: Any, setup: RunSetup) -> Any:
    """``train._choose_trainable`` without weights to restore."""
    wrapped = model
    if setup.method == "lora" and setup.lora is not None:
        lora = setup.lora
        variant = "lora" if lora.variant == "pissa" else lora.variant  # its first values are another matter
        wrapped = add_lora(
            model,
            SimpleNamespace(
                lora_r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, lora_bias=lora.bias,
                lora_target_modules=lora.target_modules, lora_variant=variant,
            ),
        )  # fmt: skip
    elif setup.method == "pretrain":
        model.requires_grad_(False)
        for name in BRIDGE:
            getattr(model.model, name, nn.Identity()).requires_grad_(True)
    dtype = DTYPES[setup.dtype] if setup.zero is not None else torch.float32
    for p in wrapped.parameters():
        if p.requires_grad and p.dtype != dtype and p.is_floating_point():
            p.data = p.data.to(dtype)
    return wrapped


def _batch(setup: RunSetup, length: int, model: Any) -> dict[str, Tensor]:
    """What ``Collator`` gives for ``micro_batch`` samples of that length, on the GPU; what they lack is of the answers."""
    samples = setup.micro_batch
    count = samples * setup.images
    seen = min(model.clip.grid**2 * setup.images, length) * samples
    size = setup.image_size_aux if model.aux is not None else model.clip.image_size
    labels = max(min(setup.labels, length) - (setup.sequence - length), 1) * samples
    return {
        "input_ids": torch.empty((samples, length), dtype=torch.long),
        "images": torch.empty((max(count, 1), 3, size, size), dtype=torch.uint8),
        "image_positions": torch.empty(seen, dtype=torch.long),
        "image_rows": torch.empty(seen, dtype=torch.long),
        "label_positions": torch.empty(labels, dtype=torch.long),
        "targets": torch.empty(labels, dtype=torch.long),
    }
