"""Rules about LoRA itself: the right stage, the right learning rate, the right scale, what comes after."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from lorapatch.lora.lint.facts import Facts, LaunchFacts, number, true
from lorapatch.lora.lint.rule import Found, rule

__all__: list[str] = []

FULL_TUNING_RATE = 5e-5  # LLaVA tunes all of a model with 2e-5, LoRA with 2e-4
TOO_HIGH_RATE = 2e-3
_EVALUATES = re.compile(
    r"(?i)(?<![a-z])(eval\w*|infer\w*|test\w*|bench\w*|serve|chat|vqa|textvqa|mmbench|mme|pope|sqa|gqa)"
)
_MERGES = re.compile(r"(?i)merge")
_FULL_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@rule(
    "LP201",
    "lora-on-pretraining",
    "error",
    "LoRA on a stage that freezes everything but the projector",
    "take the LoRA flags out of this launch; `lorapatch patch` puts them into the fine-tuning one",
)
def _wrong_stage(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.training:
        if not facts_of.lora or (facts_of.support and facts_of.support.always_on):
            continue
        line = facts_of.at(facts_of.name_of("lora_enable"))
        freezer = next((name for name in _freezers(facts_of) if true(facts_of.value(name))), None)
        if freezer:
            yield Found(
                line, f"LoRA is on, but --{freezer} on line {facts_of.at(freezer)} freezes it with all the rest"
            )
        elif facts_of.launch.stage.name == "pretrain":
            yield Found(line, f"LoRA is on in a pre-training stage ({facts_of.launch.stage.reasons[0]})")


def _freezers(facts_of: LaunchFacts) -> list[str]:
    """Flags under which the trainer freezes the whole model."""
    found = list(facts_of.support.traits.frozen_by) if facts_of.support else []
    names = dict.fromkeys([*found, "tune_mm_mlp_adapter"])
    return [name for name in names if not any(word in name for word in ("freeze", "lora", "peft"))]


@rule(
    "LP202",
    "full-tuning-rate",
    "warning",
    "LoRA with the learning rate of full fine-tuning",
    "lorapatch patch --learning-rate 2e-4",
)
def _learning_rate(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.training:
        rate = number(facts_of.value("learning_rate", "lr"))
        if not facts_of.lora or rate is None:
            continue
        line = facts_of.at("learning_rate", "lr")
        if rate <= FULL_TUNING_RATE:
            yield Found(line, f"{rate:g} is a learning rate for full fine-tuning; LoRA wants about ten times as much")
        elif rate > TOO_HIGH_RATE:
            yield Found(
                line, f"{rate:g} is so high that LoRA may diverge", "take 1e-4 to 5e-4, and watch the loss for spikes"
            )


@rule(
    "LP203",
    "unusual-scale",
    "warning",
    "alpha / r, the scale of the LoRA update, is unusual",
    "alpha equal to r, or twice r, is what most recipes use",
)
def _scale(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.training:
        if not facts_of.lora:
            continue
        r = _number_or_default(facts_of, "lora_r")
        alpha = _number_or_default(facts_of, "lora_alpha")
        rank_stabilised = true(facts_of.value("use_rslora")) or facts_of.value("lora_variant") == "rslora"
        if r and alpha and not rank_stabilised and not 0.5 <= alpha / r <= 4:
            line = facts_of.at(facts_of.name_of("lora_alpha"), facts_of.name_of("lora_r"))
            yield Found(line, f"alpha / r is {alpha:g} / {r:g} = {alpha / r:g}")


def _number_or_default(facts_of: LaunchFacts, canonical: str) -> float | None:
    """What the launch says, else the trainer's default."""
    name = facts_of.name_of(canonical)
    if facts_of.flag(name):
        return number(facts_of.value(name))
    option = facts_of.support.command_line.options.get(name) if facts_of.support else None
    return number(option.default) if option else None


@rule(
    "LP204",
    "checkpoint-of-another-kind",
    "error",
    "the output directory holds a checkpoint of another kind, from which the trainer would resume",
    "give --output_dir another name, or move the checkpoints away",
)
def _other_checkpoint(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.training:
        value = facts_of.value("output_dir")
        folder = facts_of.find(value) if value else None
        for checkpoint in sorted(folder.glob("checkpoint-*")) if folder and folder.is_dir() else []:
            is_adapter = (checkpoint / "adapter_config.json").is_file()
            is_full = any((checkpoint / name).is_file() for name in _FULL_WEIGHTS) and not is_adapter
            line = facts_of.at("output_dir")
            if facts_of.lora and is_full:
                yield Found(line, f"{checkpoint} is of a full fine-tuning, this is a LoRA run")
            elif not facts_of.lora and is_adapter:
                yield Found(line, f"{checkpoint} is of a LoRA run, this is a full fine-tuning")
            else:
                continue
            break


@rule(
    "LP205",
    "evaluation-of-an-adapter",
    "warning",
    "a later stage loads the adapter as if it were a whole model",
    "lorapatch patch --with-merge puts a merge between the two",
)
def _unmerged(facts: Facts) -> Iterator[Found]:
    outline = facts.script.outline
    for facts_of in facts.training:
        value = facts_of.value("output_dir")
        if not facts_of.lora or not value or facts_of.launch.stage.name == "pretrain":
            continue
        name = Path(value).name
        for index, command in enumerate(outline.commands):
            if command.start < facts_of.launch.end:
                continue
            words = facts.words(index)
            if any(_MERGES.search(word) for word in words[:3]):
                break
            programs = [word for word in words[:3] if word.endswith((".sh", ".py")) or "." in word]
            uses = any(word == name or word.rstrip("/").endswith(value) for word in words[1:])
            if uses and any(_EVALUATES.search(program) for program in programs):
                line = facts.script.line(command.start)
                yield Found(line, f"{programs[0]} gets {name}, which will hold an adapter and not a whole model")
                break


@rule(
    "LP206",
    "no-input-gradients",
    "warning",
    "gradient checkpointing without input gradients leaves LoRA untrained",
    "let the trainer call model.enable_input_require_grads(), or use --mode attach, which does",
)
def _input_gradients(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.training:
        support = facts_of.support
        if support is None or facts_of.attached or not facts_of.lora or not support.complete:
            continue
        through_peft = [applied for applied in support.use.applied if applied.through_peft]
        if true(facts_of.value("gradient_checkpointing")) and through_peft and not support.use.input_grads:
            place = through_peft[0].call.place
            line = facts_of.at("gradient_checkpointing")
            yield Found(line, f"the trainer never enables input gradients for the model it wraps at {place}")
