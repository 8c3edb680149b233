"""What a run is made of in parameters: the model's parts, which of them learn, how many bytes each takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lorapatch.errors import Refused
from lorapatch.memory.architecture import Language, Linear, language_in, read_config
from lorapatch.memory.model import RunSetup
from lorapatch.memory.towers import (
    ConvNext,
    VisionTransformer,
    bridge_parameters,
    connector_parameters,
    read_convnext,
    read_vision,
    vision_of,
)

__all__ = ["Parts", "parts_of"]

_CLIP_L = VisionTransformer(1024, 4096, 24, 336, 14)
_CONVNEXT_L = ConvNext(4, (3, 3, 27, 3), (192, 384, 768, 1536))


@dataclass(frozen=True)
class Parts:
    """The parts of a run's model. ``targets`` are the linear layers with LoRA, of one layer; counts in parameters."""

    language: Language
    vision: VisionTransformer | None
    aux: ConvNext | None
    bridge: int
    targets: tuple[Linear, ...]
    lora: int
    trainable: int
    notes: tuple[str, ...] = ()

    @property
    def towers(self) -> int:
        return sum(tower.parameters for tower in (self.vision, self.aux) if tower is not None)

    @property
    def total(self) -> int:
        return self.language.parameters + self.towers + self.bridge + self.lora

    @property
    def frozen(self) -> int:
        return self.total - self.trainable


@lru_cache(maxsize=512)
def parts_of(setup: RunSetup) -> Parts:
    """The parts of ``setup``'s model, from its folders' configurations.

    Towers that are not there are taken for CLIP ViT-L/14-336 and ConvNeXt-L, and ``notes`` says so. Raises Refused when the
    language model is not known and its name tells no size.
    """
    language = language_in(setup.model)
    notes = list(language.notes)
    vision, aux = _towers(setup, notes)
    bridge = 0
    if vision is not None and setup.family == "mgm":
        bridge = bridge_parameters(setup.projector, vision.hidden, language.hidden, aux.channels if aux else None)
    elif vision is not None:
        bridge = connector_parameters(str(read_config(setup.model).get("model_type")), vision, language.hidden)
    targets: tuple[Linear, ...] = ()
    if setup.lora is not None:
        targets = language.targets(setup.lora.target_modules)
        if not targets:
            targets = language.linears
            notes.append(f"no linear layer is called {setup.lora.target_modules}; LoRA was counted on all of them")
    lora = _lora(setup, language, targets)
    trainable = {"lora": lora + (bridge if setup.family == "mgm" else 0), "pretrain": bridge}.get(setup.method)
    if trainable is None:
        whole = language.parameters + bridge
        trainable = whole if setup.family == "mgm" or vision is None else whole + vision.parameters
    return Parts(language, vision, aux, bridge, targets, lora, trainable, tuple(notes))


def _lora(setup: RunSetup, language: Language, targets: tuple[Linear, ...]) -> int:
    if setup.lora is None:
        return 0
    pairs = sum(setup.lora.r * (linear.inputs + linear.outputs) for linear in targets)
    if setup.lora.variant == "dora":
        pairs += sum(linear.outputs for linear in targets)
    biased = {"all": language.linears, "lora_only": targets}.get(setup.lora.bias, ())
    return language.layers * (pairs + sum(linear.outputs for linear in biased if linear.bias))


def _towers(setup: RunSetup, notes: list[str]) -> tuple[VisionTransformer | None, ConvNext | None]:
    vision: Any = None
    aux: Any = None
    if setup.family == "image_text":
        config = read_config(setup.model)
        vision = vision_of(config, str(setup.model))
    elif setup.vision_tower is not None:
        try:
            vision = read_vision(setup.vision_tower)
        except Refused as refusal:
            notes.append(f"the vision tower was taken for CLIP ViT-L/14-336: {refusal}")
            vision = _CLIP_L
    if setup.vision_tower_aux is not None:
        try:
            aux = read_convnext(setup.vision_tower_aux)
        except Refused as refusal:
            notes.append(f"the auxiliary tower was taken for ConvNeXt-L: {refusal}")
            aux = _CONVNEXT_L
    return vision, aux
