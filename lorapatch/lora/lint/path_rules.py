"""Rules about files and programs: what a launch names and what is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from lorapatch.launch.model import Flag
from lorapatch.lora.lint.facts import Facts, LaunchFacts
from lorapatch.lora.lint.rule import Found, rule

__all__: list[str] = []

_WRITES = re.compile(r"(?i)output|save|log(ging)?_|cache|_name$|hub_|push|export|result|wandb|tensorboard")
_READS = re.compile(
    r"(?i)path|dir|folder|file|root|tower|deepspeed|config|adapter|tokenizer|checkpoint|json|image|data"
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (".json", ".jsonl", ".yaml", ".yml", ".txt", ".csv", ".parquet", ".bin", ".pt", ".pth", ".safetensors")
_MAKE_NOTHING = ("cd", "pushd", "echo", "printf", "ls", "mkdir", "rm", "export", "source", ".", "test", "dirname")
_PROGRAM = re.compile(r"python[\d.]*|deepspeed|torchrun|accelerate|ds_run")


@rule(
    "LP301",
    "nothing-there",
    "error",
    "a flag names a file or folder that is not there, and that no earlier line makes",
    "correct the path, or the variable it is made of",
)
def _nothing_there(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.training:
        if facts_of.trainer_path is None:
            continue  # the script is not in its place, so its other paths say nothing
        for flag in facts_of.launch.flags:
            value = _path_value(flag)
            if value and facts_of.find(value) is None and not _made_before(facts, facts_of, value):
                yield Found(flag.line, f"{flag.name} {value} is not there")


def _path_value(flag: Flag) -> str | None:
    """A flag's value if it is a path to be read: a name on a model hub is not, nor what the run writes."""
    value = flag.value
    name = flag.name.lstrip("-")
    if (
        not value
        or "/" not in value
        or "://" in value
        or " " in value
        or _WRITES.search(name)
        or not _READS.search(name)
    ):
        return None
    if _HUB_NAME.fullmatch(value) and Path(value).suffix not in _FILES:
        return None
    return value


def _made_before(facts: Facts, facts_of: LaunchFacts, value: str) -> bool:
    """Whether an earlier launch writes there, or an earlier command is given this very path or one above it."""
    start = facts_of.launch.start
    for earlier in facts.launches:
        output = earlier.value("output_dir")
        if output and earlier.launch.start < start and _is_below(value, output):
            return True
    for index, command in enumerate(facts.script.outline.commands):
        if command.start >= start:
            break
        words = facts.words(index)
        if words and words[0] not in _MAKE_NOTHING and any(_may_make(facts_of, value, word) for word in words[1:]):
            return True
    return False


def _may_make(facts_of: LaunchFacts, value: str, word: str) -> bool:
    """A command that is given the path, or a folder above it that is not the whole toolkit's."""
    return word == value or (_is_below(value, word) and not _is_below(str(facts_of.script_dir), word))


def _is_below(path: str, folder: str) -> bool:
    inner, outer = Path(path).parts, Path(folder).parts
    return bool(outer) and folder.count("/") > 0 and inner[: len(outer)] == outer


@rule(
    "LP302",
    "no-interpreter",
    "error",
    "the interpreter or launcher that the script names is not there",
    "name the one of your environment, or plain `deepspeed` with the environment activated",
)
def _no_interpreter(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.launches:
        for word in facts_of.launch.launcher_words:
            value = word.value or ""
            if value.startswith("/") and _PROGRAM.fullmatch(Path(value).name) and not Path(value).exists():
                yield Found(facts_of.line, f"{value} is not there")


@rule(
    "LP303",
    "class-by-path",
    "error",
    "the trainer chooses the model's class by a word in its path, and the path lacks it",
    "rename the model's folder so that its path has the word",
)
def _class_by_path(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.training:
        words = facts_of.support.traits.path_words if facts_of.support else {}
        for name, looked_for in words.items():
            value = facts_of.value(name)
            family = _family(facts_of.find(value)) if value else None
            word = next((w for w in looked_for if family and w.lower() in family), None)
            if value and word and not any(w in value for w in looked_for):
                yield Found(
                    facts_of.at(name), f"the trainer looks for '{word}' in --{name}, but {value} has no such word"
                )


def _family(folder: Path | None) -> str | None:
    """The model's type and class names, by its ``config.json``."""
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    return f"{config.get('model_type', '')} {config.get('architectures', '')}".lower()
