"""Say a LoRA configuration in the trainer's own flags; what it has no flag for is said, never injected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorapatch.errors import Refused
from lorapatch.launch.model import Launch, Script
from lorapatch.lora.flags import PatchOptions, wanted_flags

if TYPE_CHECKING:
    from lorapatch.lora.support import TrainerSupport

__all__ = ["flags_for", "trainer_support"]

Words = tuple[str, ...]
# Canonical names that speak of LoRA; the others are flags of the trainer that go by their own name.
_LORA = ("lora_enable", "lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_target_modules", "bits")


def trainer_support(script: Script, launch: Launch, roots: Sequence[Path] = ()) -> TrainerSupport | None:
    """What the trainer of ``launch`` takes, read from its Python; None if its file is not found."""
    from lorapatch.lora.support.trainer_file import find_trainer

    if script.path is None:
        return None
    paths = [word.value for name, word in launch.environment if name == "PYTHONPATH" and word.value]
    roots = [*roots, *(script.path.parent / folder for path in paths for folder in path.split(":") if folder)]
    trainer = launch.trainer
    file = find_trainer(trainer.name, module=trainer.module, script_dir=script.path.parent, roots=roots)
    if file is None:
        return None
    from lorapatch.lora.support.trainer_support import read_trainer

    return read_trainer(file, roots=roots)


def flags_for(
    support: TrainerSupport | None, options: PatchOptions, *, attach: bool = False
) -> tuple[dict[str, Words], list[str]]:
    """The flags to set (name without dashes to the words behind it) and notes.

    With ``attach`` what the trainer has no flag for is said to lorapatch.attach: all of LoRA, or, where the trainer
    builds LoRA itself, rank, scale and what was asked for. Raises Refused when the trainer would reject a flag.
    """
    wanted = wanted_flags(options)
    if attach:
        _check_bits(support, options)
    if support is None:
        return {name: (value,) for name, value in wanted.items() if not (attach and name == "bits")}, []
    from lorapatch.attach import FLAGS  # argparse, runpy and more come with it

    flags: dict[str, Words] = {}
    notes: list[str] = []
    asked_for = _asked_for(options)
    own = bool(support.use.applied or support.use.trl_config)
    ours = set(FLAGS) & (asked_for | {"lora_r", "lora_alpha"} | _of_preset(options) if own else set(FLAGS))
    for name, value in wanted.items():
        if attach and name in FLAGS and not (own and support.settings(name, value.split(",")) is not None):
            if name in ours:
                flags[name] = (value,)
            continue
        if attach and name == "bits" and options.bits == 16 and support.settings("bits", "16") is None:
            continue
        found = _lora_setting(support, name, value) if name in _LORA else _plain_setting(support, name, value)
        if isinstance(found, str):
            if name in asked_for:
                raise Refused(found)
            notes.append(found)
        else:
            flags.update(found)
    return flags, notes


def _of_preset(options: PatchOptions) -> set[str]:
    return set() if options.preset is None else {"lora_dropout", "lora_target_modules"}


def _check_bits(support: TrainerSupport | None, options: PatchOptions) -> None:
    """lorapatch.attach takes the model as the trainer has loaded it."""
    if options.bits in (None, 16) or (support is not None and support.settings("bits", str(options.bits)) is not None):
        return
    raise Refused(
        f"--bits {options.bits}: the trainer loads its model itself and has no flag for it, so attach mode cannot quantize it;"
        " leave --bits out"
    )


def _asked_for(options: PatchOptions) -> set[str]:
    """The flags whose values the user named, not the preset."""
    named = {
        "lora_r": options.r,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "lora_bias": options.bias,
        "lora_target_modules": options.target_modules,
        "bits": options.bits,
        "learning_rate": options.learning_rate,
    }
    extra = {name.lstrip("-") for name in options.extra}
    return {"lora_enable"} | {name for name, value in named.items() if value is not None} | extra


def _lora_setting(support: TrainerSupport, name: str, value: str) -> Mapping[str, Words] | str:
    words = value.split(",") if name == "lora_target_modules" else value
    settings = support.settings(name, words)
    if settings is not None:
        return {setting.flag.lstrip("-"): setting.words for setting in settings}
    if name == "lora_target_modules" and (evidence := support.target_evidence) is not None:
        return f"{evidence[1]}: the trainer chooses its target modules itself ({evidence[0]}), so {value} was not set"
    remedy = "; --mode attach sets it" if name != "bits" and support.use.trainers else ""
    return f"{support.trainer}: has no flag for {name} that does what it says, so {value} was not set{remedy}"


def _plain_setting(support: TrainerSupport, name: str, value: str) -> Mapping[str, Words] | str:
    flag = support.flag(name)
    if flag.state == "unknown":
        return f"{flag.sentence}; it was not set"
    return {name: (value,)}
