"""Rules about batch sizes, precision and the DeepSpeed configuration."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorapatch.errors import Refused
from lorapatch.launch import read_script
from lorapatch.lora.lint.facts import DeepSpeedFile, Facts, LaunchFacts, number, true
from lorapatch.lora.lint.rule import Found, rule

__all__: list[str] = []

_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# DeepSpeed's key, the flag it must agree with (transformers, integrations/deepspeed.py, trainer_config_process).
_AGREE = (
    ("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
    ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ("gradient_clipping", "max_grad_norm"),
    ("optimizer.params.lr", "learning_rate"),
    ("optimizer.params.weight_decay", "weight_decay"),
    ("bf16.enabled", "bf16"),
    ("fp16.enabled", "fp16"),
)


@rule(
    "LP401",
    "deepspeed-unreadable",
    "error",
    "the DeepSpeed configuration does not parse",
    "mend the JSON file",
)
def _unreadable(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.training:
        config = facts_of.deepspeed
        if config and config.data is None:
            yield Found(facts_of.at("deepspeed", "deepspeed_config"), f"{config.path}:{config.line}: {config.reason}")


@rule(
    "LP402",
    "deepspeed-disagrees",
    "error",
    "the DeepSpeed configuration and the flags disagree",
    'write "auto" into the JSON file, so that the flag counts',
)
def _disagrees(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.training:
        config = facts_of.deepspeed
        for key, flag in _AGREE if config and config.data is not None else ():
            there, given = _entry(config, key), facts_of.value(flag)
            if there in (None, "auto") or given is None or _equal(there, given):
                continue
            yield Found(facts_of.at(flag), f"--{flag} {given}, but {key} is {there} in {config.path if config else ''}")


def _entry(config: DeepSpeedFile | None, key: str) -> Any:
    value: Any = config.data if config else None
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _equal(there: Any, given: str) -> bool:
    if isinstance(there, bool):
        return there == true(given)
    return isinstance(there, (int, float)) and number(given) == float(there)


@rule(
    "LP403",
    "needless-offload",
    "warning",
    "the optimizer of a LoRA run is offloaded, though it is only megabytes",
    "use a ZeRO configuration without offload_optimizer: the steps get faster",
)
def _offload(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.training:
        config = facts_of.deepspeed
        offload = config.zero.get("offload_optimizer") if config else None
        if facts_of.lora and isinstance(offload, dict) and offload.get("device") in ("cpu", "nvme") and config:
            line = facts_of.at("deepspeed", "deepspeed_config")
            yield Found(line, f"{config.path.name} moves the optimizer to the {offload['device']} for a LoRA run")


@rule(
    "LP404",
    "ungathered-zero3",
    "warning",
    "ZeRO-3 spreads the adapter over the ranks, and nothing gathers it when it is saved",
    'set "stage3_gather_16bit_weights_on_model_save": true in zero_optimization, or use ZeRO-2',
)
def _ungathered(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.training:
        config = facts_of.deepspeed
        if not facts_of.lora or config is None or config.stage != 3:
            continue
        gathers = facts_of.attached or (facts_of.support is not None and facts_of.support.traits.gathers_shards)
        if not gathers and config.zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
            yield Found(
                facts_of.at("deepspeed", "deepspeed_config"), f"the adapter saved under {config.path.name} may be empty"
            )


@rule(
    "LP405",
    "4bit-zero3",
    "error",
    "4-bit weights under ZeRO-3 with a bitsandbytes that cannot do it",
    "pip install 'bitsandbytes>=0.43.3', or use ZeRO-2",
)
def _four_bit(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.training:
        config = facts_of.deepspeed
        four = facts_of.value("bits", "quantization_bit") == "4" or any(
            facts_of.flag(name) and true(facts_of.value(name)) for name in ("load_in_4bit", "q_lora", "use_qlora")
        )
        version = _bitsandbytes()
        if four and config and config.stage == 3 and version and _parts(version) < (0, 43, 3):
            line = facts_of.at("bits", "quantization_bit", "load_in_4bit", "q_lora", "use_qlora")
            yield Found(line, f"bitsandbytes {version} is too old for 4-bit weights under ZeRO-3")


def _bitsandbytes() -> str | None:
    """The version installed beside lorapatch."""
    try:
        return importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return None


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


@rule(
    "LP406",
    "no-bf16",
    "error",
    "bf16 or TF32 on a GPU that has neither",
    "use --fp16 True --bf16 False --tf32 False on this GPU",
)
def _no_bf16(facts: Facts) -> Iterator[Found]:
    if facts.bf16 is not False:
        return
    for facts_of in facts.training:
        for name in ("bf16", "tf32"):
            if facts_of.flag(name) and true(facts_of.value(name)):
                yield Found(facts_of.at(name), f"--{name} True, but the GPU's compute capability is below 8.0")


@rule(
    "LP407",
    "batch-changed",
    "warning",
    "the global batch size is not what it was, or not what the script asks for",
    "change the batch size per GPU and the accumulation together, so that their product stays",
)
def _batch(facts: Facts) -> Iterator[Found]:
    yield from _against_own_check(facts)
    original = _original(facts.path)
    if original is None:
        return
    before = {old.launch.number: old for old in original.launches}
    for facts_of in facts.training:
        old = before.get(facts_of.launch.number)
        was, now = (_product(old) if old else None), _product(facts_of)
        if was and now and was != now:
            line = facts_of.at(*_BATCH)
            yield Found(line, f"batch size per GPU × accumulation is {now:g}, in {original.path.name} it was {was:g}")


def _against_own_check(facts: Facts) -> Iterator[Found]:
    """A command with "batch" in its name and three numbers at its end: batch size, accumulation, what is wanted."""
    for index, command in enumerate(facts.script.outline.commands):
        words = facts.words(index)
        if len(words) < 4 or not any("batch" in Path(word).name.lower() for word in words[:3]):
            continue
        numbers = [number(word) for word in words[-3:]]
        if None in numbers or not all(n and n > 0 for n in numbers):
            continue
        batch, steps, wanted = (n or 0 for n in numbers)
        gpus = wanted / (batch * steps)
        if gpus != int(gpus):
            line = facts.script.line(command.start)
            yield Found(
                line, f"{batch:g} × {steps:g} is no divisor of {wanted:g}, so this check fails on any number of GPUs"
            )
            continue
        known = {count for facts_of in facts.training if (count := _gpus(facts_of))}
        if len(known) == 1 and gpus not in known:
            line, here = facts.script.line(command.start), known.pop()
            yield Found(
                line, f"{batch:g} × {steps:g} × {here} GPU(s) is {batch * steps * here:g}, the check wants {wanted:g}"
            )


def _gpus(facts_of: LaunchFacts) -> int | None:
    """How many GPUs the launch asks for by itself."""
    options = [str(word) for word in facts_of.launch.launcher_options]
    text = " ".join(options)
    match = re.search(r"--(?:num_gpus|nproc[-_]per[-_]node|num_processes)[= ](\d+)", text)
    if match:
        return int(match[1])
    include = re.search(r"--include[= ]\S*?:([\d,]+)", text)
    visible = next((word.value for name, word in facts_of.launch.environment if name == "CUDA_VISIBLE_DEVICES"), None)
    listed = include[1] if include else visible
    return len([part for part in listed.split(",") if part.strip()]) if listed else None


def _product(facts_of: LaunchFacts) -> float | None:
    batch, steps = (number(facts_of.value(name)) for name in _BATCH)
    return batch * steps * (_gpus(facts_of) or 1) if batch and steps else None


def _original(path: Path) -> Facts | None:
    """The backup that a patch left beside the script."""
    backup = path.with_name(f"{path.stem}_backup{path.suffix}")
    if not backup.is_file():
        return None
    try:
        return Facts(backup, read_script(backup))
    except Refused:
        return None
