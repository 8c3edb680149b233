"""Rules about the trainer: whether it takes these flags, and whether they do anything."""

from __future__ import annotations

from collections.abc import Iterator

from lorapatch.attach import FLAGS
from lorapatch.lora.lint.facts import Facts, LaunchFacts
from lorapatch.lora.lint.rule import Found, rule
from lorapatch.lora.support import TrainerSupport

__all__: list[str] = []


def _read(facts: Facts) -> Iterator[tuple[LaunchFacts, TrainerSupport]]:
    for facts_of in facts.training:
        if facts_of.support:
            yield facts_of, facts_of.support


@rule(
    "LP501",
    "unknown-flag",
    "error",
    "the trainer does not know a flag and will stop",
    "correct the flag's name, or take it out",
)
def _unknown(facts: Facts) -> Iterator[Found]:
    for facts_of, support in _read(facts):
        for flag in facts_of.launch.flags:
            if facts_of.attached and flag.name.lstrip("-").replace("-", "_") in FLAGS:
                continue  # lorapatch.attach takes it
            found = support.flag(flag.name)
            if found.state == "unknown":
                remedy = f"write {found.nearest} for it" if found.nearest else None
                yield Found(flag.line, found.sentence, remedy)


@rule(
    "LP502",
    "unused-flag",
    "warning",
    "the trainer takes a flag and never looks at it",
    "take it out, or look for the flag that does what you want",
)
def _unused(facts: Facts) -> Iterator[Found]:
    for facts_of, support in _read(facts):
        for flag in facts_of.launch.flags:
            found = support.flag(flag.name)
            if found.state == "unused":
                yield Found(flag.line, found.sentence)


@rule(
    "LP503",
    "no-lora-in-trainer",
    "error",
    "LoRA flags for a trainer that does no LoRA with them",
    "lorapatch patch --mode attach",
)
def _no_lora(facts: Facts) -> Iterator[Found]:
    for facts_of, support in _read(facts):
        given = [flag for flag in facts_of.launch.flags if flag.name.lstrip("-").startswith("lora_")]
        if given and not facts_of.attached and support.complete and not support.command_line.open_because:
            advice = support.recommend()
            if advice.mode != "flags":
                remedy = None if advice.mode == "attach" else "use a trainer that does LoRA"
                yield Found(given[0].line, f"{given[0].name} is given, but {advice.reason}", remedy)


@rule(
    "LP504",
    "field-declared-twice",
    "error",
    "two of the trainer's dataclasses declare the same flag, which stops its parser",
    "rename the field in one of them, or use the transformers release that the trainer was written for",
)
def _declared_twice(facts: Facts) -> Iterator[Found]:
    for facts_of, support in _read(facts):
        for name, first, second in support.command_line.declared_twice:
            yield Found(facts_of.line, f"--{name} is declared at {first.place} and again at {second.place}")


@rule(
    "LP505",
    "trainer-unreadable",
    "warning",
    "a file of the trainer cannot be read",
    "mend it: the trainer may not start either",
)
def _unreadable(facts: Facts) -> Iterator[Found]:
    for facts_of, support in _read(facts):
        for problem in support.problems:
            yield Found(facts_of.line, problem)


@rule(
    "LP506",
    "trainer-not-found",
    "warning",
    "the trainer's file is not found, so flags and paths were not checked",
    "run check where the trainer is, or name its folder with --trainer-root",
)
def _not_found(facts: Facts) -> Iterator[Found]:
    seen = set()
    for facts_of in facts.training:
        name = str(facts_of.launch.trainer.word)
        if facts_of.trainer_path is None and name not in seen:
            seen.add(name)
            yield Found(facts_of.line, f"{name} is not found: flags and paths were not checked")
