"""The LoRA flags of the LLaVA family, the presets of the plan, and what values they may have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lorapatch.errors import UsageError

__all__ = ["ALL_MODULES", "PRESETS", "PatchOptions", "Preset", "wanted_flags"]

ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BIAS = ("none", "all", "lora_only")


class Preset(NamedTuple):
    """A LoRA configuration: rank, alpha, dropout, bias, target modules (LoRA, https://arxiv.org/abs/2106.09685)."""

    r: int
    alpha: int
    target_modules: tuple[str, ...]
    dropout: float = 0.1
    bias: str = "none"
    gradient_checkpointing: bool = False


PRESETS: Mapping[str, Preset] = {
    "conservative": Preset(16, 32, ("q_proj", "v_proj", "o_proj")),
    "aggressive": Preset(8, 16, ("q_proj", "v_proj"), gradient_checkpointing=True),
    "expressive": Preset(32, 64, ALL_MODULES),
}


@dataclass(frozen=True, slots=True)
class PatchOptions:
    """What a patch shall set. Values left at None come from the preset (without one: the conservative's five flags).

    ``target_modules`` is a comma-separated list or "all-linear"; ``stage`` a launch's number or a stage's name;
    ``extra`` further flags, name to value. Raises UsageError for a value out of its range.
    """

    preset: str | None = None
    r: int | None = None
    alpha: int | None = None
    dropout: float | None = None
    bias: str | None = None
    target_modules: str | None = None
    bits: int | None = None
    learning_rate: float | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    stage: str | None = None

    def __post_init__(self) -> None:
        _check(
            self.preset is None or self.preset in PRESETS,
            f"no preset is called {self.preset}; there are {', '.join(PRESETS)}",
        )
        _check(self.r is None or self.r >= 1, f"the rank must be at least 1, not {self.r}")
        _check(self.alpha is None or self.alpha >= 1, f"alpha must be at least 1, not {self.alpha}")
        _check(
            self.dropout is None or 0 <= self.dropout < 1,
            f"the dropout must be at least 0 and less than 1, not {self.dropout}",
        )
        _check(self.bias is None or self.bias in _BIAS, f"the bias must be one of {', '.join(_BIAS)}, not {self.bias}")
        _check(self.bits is None or self.bits in (4, 8, 16), f"bits must be 4, 8 or 16, not {self.bits}")
        _check(
            self.learning_rate is None or 0 < self.learning_rate < 1,
            f"the learning rate must be greater than 0 and less than 1, not {self.learning_rate}",
        )
        _check(
            self.target_modules is None
            or all(re.fullmatch(r"[\w.-]+", name) for name in self.target_modules.split(",")),
            f"target modules are names with commas between them, or all-linear, not {self.target_modules!r}",
        )
        for name in self.extra:
            _check(bool(re.fullmatch(r"(--?)?[A-Za-z][\w.-]*", name)), f"{name!r} is not the name of a flag")


def _check(good: bool, sentence: str) -> None:
    if not good:
        raise UsageError(sentence)


def wanted_flags(options: PatchOptions) -> dict[str, str]:
    """Flag (without dashes) to value, in the order in which new ones are written: the plan's five first."""
    preset = PRESETS[options.preset or "conservative"]
    r = preset.r if options.r is None else options.r
    alpha = options.alpha
    if alpha is None:  # a rank of one's own keeps the preset's ratio, the scale of the update
        alpha = preset.alpha if options.r is None else max(1, r * preset.alpha // preset.r)
    flags = {
        "lora_enable": "True",
        "lora_r": str(r),
        "lora_alpha": str(alpha),
        "lora_dropout": _number(preset.dropout if options.dropout is None else options.dropout),
        "lora_bias": options.bias or preset.bias,
    }
    if options.target_modules is not None:
        flags["lora_target_modules"] = options.target_modules
    elif options.preset is not None:
        flags["lora_target_modules"] = ",".join(preset.target_modules)
    if options.preset is not None and preset.gradient_checkpointing:
        flags["gradient_checkpointing"] = "True"
    if options.bits is not None:
        flags["bits"] = str(options.bits)
    if options.learning_rate is not None:
        flags["learning_rate"] = _number(options.learning_rate)
    for name, value in options.extra.items():
        flags[name.lstrip("-")] = value
    return flags


def _number(value: float) -> str:
    """0.1 as 0.1 and 0.0002 as 2e-4, as people write them."""
    text = f"{value:g}"
    if "e" in text:
        mantissa, _, exponent = text.partition("e")
        return f"{mantissa}e{int(exponent)}"
    if 0 < value < 0.001:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return text
