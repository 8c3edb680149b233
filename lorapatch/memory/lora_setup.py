"""LoRA as a launch has it: the trainer's own flags, what its source says where there is none, and its defaults."""

from __future__ import annotations

import ast

from lorapatch.lora.lint.facts import LaunchFacts, number, true
from lorapatch.memory.architecture import Language
from lorapatch.memory.model import LoraSetup
from lorapatch.memory.trainers import Habits

__all__ = ["bits_of", "lora_of"]


def lora_of(facts: LaunchFacts, habits: Habits, trainer: str, language: Language) -> LoraSetup:
    """LoRA's numbers and modules. MGM's trainer, as LLaVA's, takes every linear layer of the language model."""
    own = _OwnNames(facts) if trainer == "transformers" else None

    def given(canonical: str) -> str | None:
        value = facts.value(canonical)
        return own.value(canonical) if value is None and own is not None else value

    if trainer == "upstream":
        targets = "all-linear"
    elif own is not None:
        targets = given("lora_target_modules") or own.targets() or language.peft_targets
    else:
        targets = given("lora_target_modules") or "all-linear"
    return LoraSetup(
        r=int(_number(given("lora_r"), habits.r)),
        alpha=int(_number(given("lora_alpha"), habits.alpha)),
        dropout=_number(given("lora_dropout"), habits.dropout),
        bias=given("lora_bias") or "none",
        target_modules=targets.replace(" ", ","),
        variant=facts.value("lora_variant") or "lora",
    )


class _OwnNames:
    """A trainer that has its own names, read from its source; it says nothing where that is not found."""

    def __init__(self, facts: LaunchFacts) -> None:
        self.facts, self.support = facts, facts.support

    def value(self, canonical: str) -> str | None:
        """The value of the trainer's flag for ``canonical``, or its default, or the constant in the source."""
        if self.support is None:
            return None
        flag = self.support.lora_flags.get(canonical)
        if flag is None:
            return self._constant(_ARGUMENTS.get(canonical, ""))
        value = self.facts.value(flag.name)
        if value is not None:
            return value
        option = self.support.command_line.options.get(flag.name)
        return _plain(option.default) if option is not None and option.default else None

    def targets(self) -> str | None:
        """The modules that the source names; all-linear where it works them out."""
        if self.support is None or self.support.target_modules is None:
            return "all-linear" if self.support is None else None
        if self.support.target_modules == "computed":
            return "all-linear"
        return self._constant("target_modules")

    def _constant(self, argument: str) -> str | None:
        assert self.support is not None
        origins = [config.arguments[argument] for config in self.support.use.configs if argument in config.arguments]
        return next((_plain(origin.text) for origin in origins if origin.kind == "constant"), None)


_ARGUMENTS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_bias": "bias"}


def _plain(source: str) -> str | None:
    """The value of a literal in Python's words; names with commas for a list of them."""
    try:
        value = ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return None
    if value is None:
        return None
    return ",".join(map(str, value)) if isinstance(value, (list, tuple, set)) else str(value)


def bits_of(facts: LaunchFacts) -> int:
    """16, or 8 and 4 by the flags that trainers have for them."""
    if true(facts.value("load_in_4bit")):
        return 4
    if true(facts.value("load_in_8bit")):
        return 8
    bits = int(_number(facts.value("bits", "quantization_bit"), 16))
    return bits if bits in (4, 8) else 16


def _number(text: str | None, default: float) -> float:
    found = number(text)
    return default if found is None else found
