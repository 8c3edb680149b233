"""A trainer's own names for what lorapatch calls ``lora_enable``, ``lora_r``, ``lora_target_modules`` …"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lorapatch.lora.support.option import Option
from lorapatch.lora.support.origins import Origin
from lorapatch.lora.support.peft_use import PeftUse
from lorapatch.lora.support.source import Place

__all__ = [
    "CANONICAL",
    "LoraFlag",
    "Style",
    "find_lora_flags",
    "known_option",
    "lora_flag",
    "other_part",
    "spell_modules",
]

# value: "--f V". bool: "--f True". switch: "--f". choice: "--f lora". words: "--f a b". comma: "--f a,b".
# regex: one expression for the whole path of a module. repeat: "--f a --f b". literal: "--f [a,b]".
# rank: "--f R" turns LoRA on. off: "--f False". absent: it must not stand there.
Style = Literal[
    "value", "bool", "switch", "choice", "words", "comma", "regex", "repeat", "literal", "rank", "off", "absent"
]

CANONICAL = ("lora_enable", "lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_target_modules",
             "lora_weight_path",
             "use_rslora", "use_dora", "bits", "double_quant", "quant_type")  # fmt: skip
_CONFIG_KEYWORDS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "bias": "lora_bias",
    "target_modules": "lora_target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
# Names in public trainers, the commonest first; used where the code itself does not show the connection.
_KNOWN_NAMES = {
    "lora_enable": ("lora_enable", "use_lora", "enable_lora", "use_peft", "lora", "peft", "with_lora", "do_lora",
                    "is_lora", "lora_training", "train_lora", "lora_tuning"),
    "lora_r": ("lora_r", "lora_rank", "lora_dim", "peft_lora_r", "lora_attn_dim", "rank"),
    "lora_alpha": ("lora_alpha", "peft_lora_alpha"),
    "lora_dropout": ("lora_dropout", "peft_lora_dropout"),
    "lora_bias": ("lora_bias",),
    "lora_target_modules": ("lora_target_modules", "lora_target", "target_modules", "lora_modules", "lora_targets",
                            "lora_trainable"),
    "lora_weight_path": ("lora_weight_path",),
    "use_rslora": ("use_rslora", "lora_use_rslora", "rslora"),
    "use_dora": ("use_dora", "lora_use_dora", "dora"),
    "bits": ("bits", "quantization_bit", "quant_bits", "quantization_bits", "load_in_4bit", "use_4bit", "q_lora",
             "use_qlora", "qlora", "load_in_kbits", "load_in_8bit", "use_8bit"),
    "double_quant": ("double_quant", "use_nested_quant", "use_bnb_nested_quant", "bnb_4bit_use_double_quant",
                     "double_quantization"),
    "quant_type": ("quant_type", "bnb_4bit_quant_type", "quantization_type"),
}  # fmt: skip

# Parts of a multimodal model for which "lora" may be chosen apart from the language model.
OTHER_PARTS = ("vision", "vit", "backbone", "connector", "projector", "tower", "encoder", "image", "audio", "critic")


@dataclass(frozen=True)
class LoraFlag:
    """One of the trainer's options in its role: how it is given, and the word that chooses LoRA if it is a choice.

    ``because`` says how the role is known: from the code that builds the LoRA configuration, or by its name.
    """

    name: str
    style: Style
    place: Place
    because: str
    word: str | None = None


def find_lora_flags(use: PeftUse, options: dict[str, Option]) -> dict[str, LoraFlag]:
    """By canonical name, all but the switch: first what LoraConfig is built from, then known names."""
    found: dict[str, LoraFlag] = {}
    for config in use.configs:
        for keyword, canonical in _CONFIG_KEYWORDS.items():
            origin = config.arguments.get(keyword)
            if origin and origin.kind == "flag" and canonical not in found and not other_part(origin.options[0]):
                because = f"{config.name}({keyword}={origin.text}) at {config.place}"
                found[canonical] = lora_flag(options[origin.options[0]], because, canonical, origin)
    for canonical in CANONICAL[1:]:
        if canonical not in found and not _decided_elsewhere(use, canonical):
            option = known_option(canonical, options)
            if option:
                found[canonical] = lora_flag(option, "by its name", canonical)
    return found


def _decided_elsewhere(use: PeftUse, canonical: str) -> bool:
    """Whether LoraConfig gets this value, but not from a flag: then a flag of that name does something else."""
    keywords = [k for k, c in _CONFIG_KEYWORDS.items() if c == canonical]
    origins = [config.arguments[k] for config in use.configs for k in keywords if k in config.arguments]
    return any(origin.kind == "constant" for origin in origins)


def known_option(canonical: str, options: dict[str, Option]) -> Option | None:
    """The first of the trainer's options that public trainers use for this."""
    return next((options[name] for name in _KNOWN_NAMES[canonical] if name in options), None)


def lora_flag(option: Option, because: str, canonical: str, origin: Origin | None = None) -> LoraFlag:
    """The option in its role, with how it is given."""
    style: Style = "value"
    if option.kind in ("bool", "switch"):
        style = "switch" if option.kind == "switch" else "bool"
    elif option.kind == "list":
        style = "words"
    elif option.kind == "repeat" or option.kind == "literal":
        style = "repeat" if option.kind == "repeat" else "literal"
    elif canonical == "lora_target_modules":
        style = "regex" if origin and origin.separator == "regex" else "comma"
    return LoraFlag(option.name, style, option.place, because)


def other_part(name: str) -> bool:
    """Whether an option is about a part of the model other than the language model, by its name."""
    return any(part in name for part in OTHER_PARTS)


def spell_modules(style: Style, modules: Sequence[str]) -> tuple[tuple[str, ...], ...] | None:
    """The words behind a target-module flag, one tuple for each time that it is given; None if it cannot be said."""
    all_linear = tuple(modules) == ("all-linear",)
    if style == "regex":
        return (("all-linear",),) if all_linear else ((rf".*\.({'|'.join(modules)})",),)
    if all_linear:
        return None
    if style == "comma":
        return ((",".join(modules),),)
    if style == "words":
        return (tuple(modules),)
    if style == "repeat":
        return tuple((module,) for module in modules)
    if style == "literal":
        return ((f"[{','.join(modules)}]",),)
    return None
