"""MGM: a language model from transformers that sees through two frozen towers, under upstream's parameter names."""

# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import CausalLMOutputWithPast

from lorapatch.trainer.errors import TrainerError
from lorapatch.trainer.head import LanguageHead
from lorapatch.trainer.mining import KeyProjector, ValueProjector, build_projector, build_query_projector, mine
from lorapatch.trainer.towers import ClipTower, ConvNextTower, image_statistics

__all__ = [
    "BRIDGE",
    "CAUSAL_SDPA",
    "IGNORE_INDEX",
    "MGMForCausalLM",
    "MGMGemmaForCausalLM",
    "MGMLlamaForCausalLM",
    "MGMMistralForCausalLM",
    "MGMQwen2ForCausalLM",
    "load_model",
    "mgm_config",
]

IGNORE_INDEX = -100
# The modules between towers and language model; all of them are trainable next to LoRA, as upstream has it.
BRIDGE = ("mm_projector", "vlm_uni_query_projector", "vlm_uni_aux_projector", "vlm_uni_val_projector")
IMAGES_AT_ONCE = 8
# sdpa for batches that need no mask. transformers makes none for an attention it has no mask function for; for its own
# sdpa it would look into the position ids first, and the CPU would wait for the GPU in every step.
CAUSAL_SDPA = "causal_sdpa"
AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)


class MGMForCausalLM(nn.Module):
    """What MGM adds to a causal language model; mixed into one class per backbone.

    The towers are no submodules: they are frozen, so neither PEFT, quantisation nor ZeRO has to know them, and every
    rank runs them without gathering anything. :func:`towers.tower_state` adds them where a full checkpoint is written.
    """

    _keys_to_ignore_on_load_unexpected: Any = [r"model\.vision_tower(_aux)?\."]  # noqa: RUF012 - transformers' own
    config: Any
    model: Any
    lm_head: Any
    clip: ClipTower
    aux: ConvNextTower | None
    pixel_scale: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # Same weight, tied or not, same partition: only its forward is new.
        self.lm_head.__class__ = LanguageHead
        model = self.model
        model.mm_projector = build_projector(config.mm_projector_type, config.mm_hidden_size, config.hidden_size)
        if config.mm_hidden_size_aux:
            model.vlm_uni_query_projector = build_query_projector(config.mm_hidden_size)
            model.vlm_uni_aux_projector = KeyProjector(config.mm_hidden_size_aux, config.mm_hidden_size)
            model.vlm_uni_val_projector = ValueProjector(config.mm_hidden_size_aux, config.mm_hidden_size)

    def attach_towers(self, clip: ClipTower, aux: ConvNextTower | None, mean: list[float], std: list[float]) -> None:
        """Give the model its eyes. ``mean`` and ``std`` are the image statistics of both towers (channel values 0–1)."""
        scale = torch.tensor([mean, std], dtype=torch.float32).view(2, 3, 1, 1) * 255
        for name, value in (("clip", clip), ("aux", aux), ("pixel_scale", scale)):
            object.__setattr__(self, name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Towers follow the model; rotary frequencies stay float32, whatever DeepSpeed casts (bf16 ones drift)."""
        modules: list[Any] = [m for m in self.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
        kept = [m.inv_freq for m in modules]
        super()._apply(fn, recurse)
        for module, frequencies in zip(modules, kept, strict=True):
            if frequencies.dtype == torch.float32 and module.inv_freq.dtype != torch.float32:
                module.inv_freq = frequencies.to(module.inv_freq.device)
        for tower in self.towers:
            tower._apply(fn, recurse)
        return self

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As torch does it, but frozen weights may be absent: checkpoints leave them to the base model."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        learning = {name for name, p in self.named_parameters() if p.requires_grad}
        odd = [key for key in result.missing_keys if key in learning] + list(result.unexpected_keys)
        if strict and odd:
            raise RuntimeError(f"{len(odd)} tensors are missing or too many, {odd[0]} among them")
        return result

    def train(self, mode: bool = True) -> Any:
        """As torch does it, but not again in every micro-step: walking 1,600 modules is 4 % of a small one's CPU time."""
        return self if mode and self.training else super().train(mode)

    @property
    def towers(self) -> list[nn.Module]:
        """The towers there are, CLIP first; empty before :meth:`attach_towers`."""
        return [t for t in (self.__dict__.get("clip"), self.__dict__.get("aux")) if t is not None]

    def encode_images(self, images: Tensor) -> Tensor:
        """Raw ``images`` [N, 3, S, S] uint8 (S: ``image_size_aux``) -> language tokens [N, grid², hidden]."""
        model = self.model
        tokens, maps = self._see(images)
        if maps:
            query = model.vlm_uni_query_projector(tokens)
            folded, offset = model.vlm_uni_aux_projector(query)
            recompute = self.training and getattr(model, "gradient_checkpointing", False)
            average = mine(folded, offset, maps, recompute=recompute)
            tokens = tokens + model.vlm_uni_val_projector(average)
        seen: Tensor = model.mm_projector(tokens)
        # Gemma multiplies its embeddings by sqrt(hidden); upstream's Gemma did so behind the image tokens too.
        scale = getattr(model.embed_tokens, "embed_scale", None)
        return seen if scale is None else seen * scale.to(seen.dtype)

    @torch.no_grad()
    def _see(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        first = next(self.clip.parameters())
        dtype = first.dtype
        if self.pixel_scale.device != images.device or first.device != images.device:
            object.__setattr__(self, "pixel_scale", self.pixel_scale.to(images.device))
            for tower in self.towers:
                tower.to(images.device)
        tokens, stages = [], []
        for part in images.split(IMAGES_AT_ONCE):
            pixels = (part.float() - self.pixel_scale[0]) / self.pixel_scale[1]
            small = (self.clip.image_size, self.clip.image_size)
            low = functional.interpolate(pixels, size=small, mode="bilinear", align_corners=False)
            tokens.append(self.clip(low.to(dtype)))
            stages.append([] if self.aux is None else self.aux(pixels.to(dtype)))
        maps = [s[0] if len(s) == 1 else torch.cat(s) for s in zip(*stages, strict=True)]
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens), maps

    def embed(self, input_ids: Tensor, images: Tensor | None, positions: Tensor | None, rows: Tensor | None) -> Tensor:
        """Embeddings [B, L, D] with image tokens laid over the places that ``positions`` (flat, in B·L) names.

        ``rows`` are the image tokens used, flat in N·grid² (all of them unless a sample was cut). ``input_ids`` at those
        places may be any valid id. Without ``positions`` the images are encoded all the same and change nothing: a batch
        of text makes the same calls on every rank.
        """
        embeddings: Tensor = self.model.embed_tokens(input_ids)
        if images is None:
            return embeddings
        seen = self.encode_images(images).flatten(0, 1).to(embeddings.dtype)
        if positions is None or rows is None:
            positions = rows = torch.empty(0, dtype=torch.long, device=seen.device)
        if len(rows) != len(seen):
            seen = seen.index_select(0, rows)
        return embeddings.flatten(0, 1).index_copy(0, positions, seen).view_as(embeddings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        images: Tensor | None = None,
        image_positions: Tensor | None = None,
        image_rows: Tensor | None = None,
        label_positions: Tensor | None = None,
        targets: Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits as the backbone gives them, or, with ``labels`` or ``targets``, the loss alone (``logits`` is None).

        ``input_ids``, ``labels`` [B, L]; ``label_positions`` [n], flat in B·L, name the positions whose next token is
        supervised and ``targets`` [n] those tokens: :mod:`data` makes both, so that the step needs no look at the GPU.
        The loss is the mean over the supervised positions of the batch (zero if there is none).
        """
        if inputs_embeds is None and input_ids is not None and images is not None:
            inputs_embeds = self.embed(input_ids, images, image_positions, image_rows)
            input_ids = None
        if labels is None and targets is None:
            return super().forward(  # type: ignore[no-any-return]
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **options
            )
        if targets is None or label_positions is None:
            following = functional.pad(cast(Tensor, labels)[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
            label_positions = (following != IGNORE_INDEX).nonzero().squeeze(-1)
            targets = following[label_positions]
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, use_cache=False
        ).last_hidden_state
        rows = hidden.flatten(0, 1).index_select(0, label_positions)
        if not len(targets):  # one row with no weight: the graph, and every rank's calls, stay the same
            rows, targets = hidden[:1, 0] * 0, torch.zeros(1, dtype=torch.long, device=hidden.device)
            return CausalLMOutputWithPast(loss=self.lm_head(rows, targets) * 0)
        return CausalLMOutputWithPast(loss=self.lm_head(rows, targets) / len(targets))


class MGMGemmaConfig(GemmaConfig):
    model_type = "mgm_gemma"


class MGMLlamaConfig(LlamaConfig):
    model_type = "mgm_llama"


class MGMQwen2Config(Qwen2Config):
    model_type = "mgm_qwen2"


class MGMMistralConfig(MistralConfig):
    model_type = "mgm_mistral"


class MGMGemmaForCausalLM(MGMForCausalLM, GemmaForCausalLM):
    config_class = MGMGemmaConfig


class MGMLlamaForCausalLM(MGMForCausalLM, LlamaForCausalLM):
    config_class = MGMLlamaConfig


class MGMQwen2ForCausalLM(MGMForCausalLM, Qwen2ForCausalLM):
    config_class = MGMQwen2Config


class MGMMistralForCausalLM(MGMForCausalLM, MistralForCausalLM):
    config_class = MGMMistralConfig


_BACKBONES: dict[str, tuple[Any, Any]] = {
    "gemma": (MGMGemmaConfig, MGMGemmaForCausalLM),
    "llama": (MGMLlamaConfig, MGMLlamaForCausalLM),
    "qwen2": (MGMQwen2Config, MGMQwen2ForCausalLM),
    "mistral": (MGMMistralConfig, MGMMistralForCausalLM),
}
for _config_class, _model_class in _BACKBONES.values():
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModelForCausalLM.register(_config_class, _model_class, exist_ok=True)


def mgm_config(folder: str | Path, **fields: Any) -> Any:
    """The configuration of ``folder``'s language model as an MGM one, with ``fields`` (``mm_vision_tower``, …) set.

    The backbone is told by ``model_type`` in ``config.json`` (gemma, llama, qwen2, mistral, or one of ours), never by
    the folder's name. Widths of the towers are read from their folders. Raises TrainerError.
    """
    file = Path(folder) / "config.json"
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        kind = str(written.get("model_type")).removeprefix("mgm_")
    except (OSError, ValueError, AttributeError) as error:
        raise TrainerError(f"--model_name_or_path {folder}: config.json cannot be read ({error})") from error
    if kind not in _BACKBONES:
        raise TrainerError(
            f"--model_name_or_path {folder} holds a {kind!r} model; the trainer knows {', '.join(sorted(_BACKBONES))}"
        )
    written.update(fields, model_type=f"mgm_{kind}")
    written.pop("architectures", None)
    config = _BACKBONES[kind][0].from_dict(written)
    if not getattr(config, "mm_vision_tower", None):
        raise TrainerError(f"{folder} is no MGM model: --vision_tower names no CLIP folder")
    for name, value in _DEFAULTS.items():
        if not hasattr(config, name):
            setattr(config, name, value)
    config.mm_hidden_size = int(ClipTower.read_config(config.mm_vision_tower).hidden_size)
    aux = config.mm_vision_tower_aux
    config.mm_hidden_size_aux = sum(cast(Any, ConvNextTower.read_config(aux)).hidden_sizes) if aux else None
    config.architectures = [_BACKBONES[kind][1].__name__]
    config.name_or_path = str(folder)
    return config


_DEFAULTS = {
    "mm_vision_tower_aux": None,
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_size_aux": 320,
    "image_aspect_ratio": "square",
    "use_mm_proj": True,
}


def load_model(
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    tower_dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    quantization: Any = None,
    device_map: Any = None,
) -> Any:
    """The model of ``config`` (made by :func:`mgm_config`), weights from the folder it was read from, towers attached.

    Bridge modules that the folder does not hold are new. ``quantization`` is a BitsAndBytesConfig or None. Under
    ZeRO-3 (transformers knows the DeepSpeed configuration) every rank keeps its share alone. Raises TrainerError.
    """
    model_class = _BACKBONES[config.model_type.removeprefix("mgm_")][1]
    options = {"config": config, "dtype": dtype, "quantization_config": quantization, "device_map": device_map}
    try:
        model, told = _from_pretrained(model_class, config.name_or_path, attn_implementation, options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainerError(f"the language model in {config.name_or_path} cannot be loaded: {reason}") from error
    missing = {key for key in told["missing_keys"] if key != "lm_head.weight"}
    for name in BRIDGE:
        if any(key.startswith(f"model.{name}.") for key in missing):
            _renew(getattr(model.model, name))
    if absent := sorted(key for key in missing if not key.startswith(tuple(f"model.{name}." for name in BRIDGE))):
        raise TrainerError(f"{config.name_or_path} lacks {len(absent)} tensors of the model, {absent[0]} among them")
    sight, aux = tower_dtype or dtype, None
    with _unpartitioned():
        clip = _quietly(ClipTower.from_folder, config.mm_vision_tower, config.mm_vision_select_layer, sight)
        if config.mm_vision_tower_aux:
            aux = _quietly(ConvNextTower.from_folder, config.mm_vision_tower_aux, sight)
    model.attach_towers(clip, aux, *image_statistics(config.mm_vision_tower, config.mm_vision_tower_aux))
    if aux is not None and config.image_size_aux % (4 * clip.grid):
        raise TrainerError(
            f"--image_size_aux {config.image_size_aux}: it has to be a multiple of {4 * clip.grid}, so that every patch "
            "of the vision tower has its own window of the aux tower's features"
        )
    return model


def _from_pretrained(model_class: Any, folder: str, attention: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' loading; an ``attention`` that this machine does not have is replaced by sdpa, and said so."""
    load = functools.partial(_quietly, model_class.from_pretrained, folder, output_loading_info=True, **options)
    try:
        return cast(tuple[Any, Any], load(attn_implementation=attention))
    except (ImportError, ValueError, OSError) as error:
        if attention == "sdpa":
            raise
        reason = str(error).strip().splitlines()[0]
        print(f"lorapatch trainer: {attention} is not to be had here ({reason}); sdpa is used", file=sys.stderr)
        return cast(tuple[Any, Any], load(attn_implementation="sdpa"))


def _renew(module: nn.Module) -> None:
    """Torch's own initial values, as upstream's new modules have them: drawn in float32, whatever the model's dtype."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            _fill(layer, nn.Linear(layer.in_features, layer.out_features))
        elif isinstance(layer, nn.LayerNorm):
            _fill(layer, nn.LayerNorm(layer.normalized_shape))


@torch.no_grad()
def _fill(layer: nn.Module, values: nn.Module) -> None:
    parameters = list(layer.parameters())
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed  # type: ignore[import-untyped]

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            for p, value in zip(parameters, values.parameters(), strict=True):
                p.copy_(value)
    else:
        for p, value in zip(parameters, values.parameters(), strict=True):
            p.copy_(value)


@contextlib.contextmanager
def _unpartitioned() -> Iterator[None]:
    """Keeps transformers from cutting what it loads into ZeRO-3's shares: every rank has whole towers."""
    from transformers.integrations import deepspeed as state

    kept, state._hf_deepspeed_config_weak_ref = state._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        state._hf_deepspeed_config_weak_ref = kept


def _quietly(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Without transformers' table of the keys it expectedly does not use (CLIP's text half, saved towers)."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return call(*args, **kwargs)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
