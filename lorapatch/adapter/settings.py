"""What adapter_config.json says: ranks, scales and targets of a LoRA adapter, as PEFT reads them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapatch.errors import Refused

__all__ = ["Settings", "is_vision", "read_json", "read_settings"]

# Modules that look at images: no LoRA belongs there when a language model is tuned.
_VISION = re.compile(r"vision_tower|vision_model|image_encoder|(?:^|\.)clip|convnext|(?:^|\.)visual\.", re.IGNORECASE)
_BRIDGE = re.compile(r"mm_projector|multi_modal_projector|vlm_uni|resampler")
# What this package knows how to merge or what does not matter to a merge; anything else that is set does.
_UNDERSTOOD = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "corda_config", "lora_ga_config", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_dora", "use_rslora", "megatron_core",
})  # fmt: skip
# These begin with another base than the one on the disk, found from data or by chance.
_OWN_BASE = ("corda", "loftq", "lora_ga", "mica", "pissa_niter")


@dataclass(frozen=True)
class Settings:
    """The LoRA part of ``adapter_config.json``; ``raw`` is all of it."""

    raw: Mapping[str, Any]

    @property
    def variant(self) -> str:
        """lora, rslora, dora, pissa or olora: how the update is computed."""
        if self.raw.get("use_dora"):
            return "dora"
        if self.initial in ("pissa", "olora"):
            return self.initial
        return "rslora" if self.raw.get("use_rslora") else "lora"

    @property
    def initial(self) -> str:
        """``init_lora_weights``, in small letters."""
        return str(self.raw.get("init_lora_weights", True)).lower()

    @property
    def ranks(self) -> frozenset[int]:
        """Every rank that it allows."""
        return frozenset({self.raw["r"], *(self.raw.get("rank_pattern") or {}).values()})

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """``modules_to_save``: trained and saved whole."""
        return tuple(self.raw.get("modules_to_save") or ())

    def rank(self, module: str) -> int:
        """The rank of the adapter of ``module``."""
        return int(_by_pattern(self.raw.get("rank_pattern"), module, self.raw["r"]))

    def scale(self, module: str) -> float:
        """What B·A is multiplied by: alpha / r, or alpha / √r for rsLoRA."""
        alpha = float(_by_pattern(self.raw.get("alpha_pattern"), module, self.raw["lora_alpha"]))
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.raw.get("use_rslora") else alpha / rank

    def targets(self, modules: Iterable[str]) -> set[str] | None:
        """Which of a model's ``modules`` should carry LoRA, towers and projectors left out; None if it is silent."""
        wanted = self.raw.get("target_modules")
        if not wanted:
            return None
        language = [module for module in modules if not _VISION.search(module) and not _BRIDGE.search(module)]
        return {module for module in language if self._is_target(module, wanted)}

    def _is_target(self, module: str, wanted: Any) -> bool:
        if _named(module, self.raw.get("exclude_modules")):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved_modules):
            return False
        if wanted == "all-linear":
            return not re.search(r"(^|\.)(lm_head|embed_tokens|wte|wpe|embed_out|score)$", module)
        if isinstance(wanted, str) or module in wanted:
            return _named(module, wanted)
        return _named(module, wanted) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        layers = self.raw.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.raw.get("layers_pattern") or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if match := re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module):
                return int(match["index"]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def unmergeable(self) -> str | None:
        """Why the adapter cannot be merged here, or None."""
        if self.initial.startswith(_OWN_BASE):
            return (
                f"it was trained with init_lora_weights {self.initial!r} and not converted, so its base is not the one "
                "on the disk; save it with path_initial_model_for_weight_conversion first"
            )
        odd = sorted(name for name, value in self.raw.items() if value and name not in _UNDERSTOOD)
        if odd:
            return f"adapter_config.json sets {', '.join(odd)}, which only PEFT's own merge_and_unload can merge"
        return None


def is_vision(module: str) -> bool:
    """Whether ``module`` is part of a vision tower."""
    return bool(_VISION.search(module))


def _named(module: str, names: Any) -> bool:
    """PEFT's way to name modules: a regular expression for the whole path, or the ends of paths."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_settings(directory: Path) -> Settings:
    """The settings in ``directory/adapter_config.json``. Raises Refused with what is wrong with them."""
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise Refused(f"{path} is missing: without it PEFT cannot load the adapter")
    raw = read_json(path)
    if raw.get("peft_type", "LORA") != "LORA":
        raise Refused(f"{path} describes a {raw['peft_type']} adapter; only LoRA is known here")
    for name in ("r", "lora_alpha"):
        value = raw.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise Refused(f"{path} is no LoRA configuration: {name} is {value!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(raw.get(name) or {}, dict):
            raise Refused(f"{path} is no LoRA configuration: {name} is {raw[name]!r}")
    return Settings(raw)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises Refused."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise Refused(f"{path} is not a JSON object")
    return content
