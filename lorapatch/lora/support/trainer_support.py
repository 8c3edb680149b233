"""Does a trainer take LoRA, under which names, and what does it do with each flag? Read from its source, never run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorapatch.lora.support.command_line import CommandLine, read_command_line
from lorapatch.lora.support.flow import Flow
from lorapatch.lora.support.lora_flags import LoraFlag, find_lora_flags, spell_modules
from lorapatch.lora.support.option import Option
from lorapatch.lora.support.peft_use import Call, PeftUse, read_peft_use
from lorapatch.lora.support.project import Project
from lorapatch.lora.support.reach import reachable_units
from lorapatch.lora.support.source import Place, Unit
from lorapatch.lora.support.switches import find_switches
from lorapatch.lora.support.traits import Traits, read_traits
from lorapatch.lora.support.transformers_fields import Release, releases_for, table_kind, table_span
from lorapatch.lora.support.usage import unused_options

__all__ = ["FlagSupport", "Recommendation", "Setting", "TrainerSupport", "read_trainer"]

State = Literal["accepted", "unknown", "unused", "unsure"]
Mode = Literal["flags", "attach"]


@dataclass(frozen=True)
class FlagSupport:
    """What the trainer does with one flag: one sentence, with the place where it is declared if it is.

    ``kind`` is how its value is given (see ``Option``); ``nearest`` the known flag that an unknown one looks like.
    """

    name: str
    state: State
    sentence: str
    place: Place | None = None
    kind: str | None = None
    choices: tuple[str, ...] = ()
    nearest: str | None = None


@dataclass(frozen=True)
class Recommendation:
    """``mode`` None: neither the trainer's own flags nor ``attach`` can make this a LoRA run; ``reason`` says why."""

    mode: Mode | None
    reason: str


@dataclass(frozen=True)
class Setting:
    """A flag and the words behind it, as they go into the launch."""

    flag: str
    words: tuple[str, ...]


@dataclass
class TrainerSupport:
    """What reading a trainer showed.

    ``files`` are those read, the launched one first. ``lora_flags`` holds the trainer's own flags by our canonical
    names, without those it never reads; ``switches`` what turns LoRA on, ``always_on`` that nothing needs to.
    ``traits``: its other habits that a LoRA run has to know of.
    ``target_modules``: how they are chosen; ``target_evidence`` the place and source text.
    ``problems``: files that could not be read, each with file and line.
    """

    trainer: Path
    files: tuple[Path, ...]
    command_line: CommandLine
    releases: tuple[Release, ...]
    unused: frozenset[str]
    use: PeftUse
    lora_flags: dict[str, LoraFlag]
    switches: tuple[LoraFlag, ...]
    always_on: bool
    switch_reason: str
    traits: Traits
    complete: bool
    problems: tuple[str, ...] = field(default=())

    # -- flags ---------------------------------------------------------------------------------------------------

    def flag(self, name: str) -> FlagSupport:
        """What the trainer does with a flag; ``name`` with or without its dashes, ``=value`` is ignored."""
        spelling = name.partition("=")[0]
        spelling = spelling if spelling.startswith("-") else f"--{spelling}"
        option = self.command_line.options.get(spelling)
        if option:
            return self._declared(spelling, option)
        if {spelling, spelling.lstrip("-").replace("-", "_")} & self.command_line.rewritten:
            return FlagSupport(spelling, "unsure", f"{self.trainer}: {spelling} may stand for another of its flags")
        return self._of_transformers(spelling) or self._abbreviated(spelling) or self._undeclared(spelling)

    def _declared(self, spelling: str, option: Option) -> FlagSupport:
        where = f"{option.place}: {spelling} is declared by {option.declared_in}"
        if option.dest in self.unused:
            sentence = f"{where} and read nowhere in the trainer, so it changes nothing"
            return FlagSupport(spelling, "unused", sentence, option.place, option.kind, option.choices)
        return FlagSupport(spelling, "accepted", where, option.place, option.kind, option.choices)

    def _of_transformers(self, spelling: str) -> FlagSupport | None:
        """A field of transformers' TrainingArguments, as far as the releases that count agree on it."""
        if not self.command_line.training_arguments or not spelling.startswith("--"):
            return None
        name = spelling[2:].replace("-", "_")
        if name.startswith("no_") and table_kind(name) is None and table_kind(name[3:]) == "bool":
            name = name[3:]
        with_it = [release.label for release in self.releases if name in release.fields]
        if with_it and len(with_it) == len(self.releases):
            sentence = f"{spelling} is one of TrainingArguments' own, in {with_it[0]}"
            return FlagSupport(spelling, "accepted", sentence, kind=table_kind(name) or "str")
        span = table_span(name)
        known = f"transformers has {spelling} {span}" if span else None
        if with_it:
            without = [release.label for release in self.releases if name not in release.fields]
            sentence = f"{known or spelling}: {', '.join(with_it)} takes it, {', '.join(without)} does not"
            return FlagSupport(spelling, "unsure", sentence, kind=table_kind(name) or "str")
        if known and not self.command_line.open_because:
            labels = ", ".join(release.label for release in self.releases)
            return FlagSupport(spelling, "unknown", f"{known}, so {labels} rejects it", nearest=_RENAMED.get(spelling))
        return None

    def _abbreviated(self, spelling: str) -> FlagSupport | None:
        """argparse takes the beginning of an option for the whole, if it is the beginning of one alone."""
        if not self.command_line.abbreviations or not spelling.startswith("--"):
            return None
        candidates = {n for n in self._names() if n.startswith(spelling)}
        if len(candidates) != 1:
            return None
        whole = self.flag(candidates.pop())
        return FlagSupport(
            spelling, whole.state, f"{spelling} is short for {whole.name}: {whole.sentence}", whole.place, whole.kind
        )

    def _undeclared(self, spelling: str) -> FlagSupport:
        close = difflib.get_close_matches(spelling, self._names(), n=1, cutoff=0.75)
        nearest = close[0] if close else None
        if self.command_line.open_because:
            place, reason = self.command_line.open_because[0]
            return FlagSupport(spelling, "unsure", f"{place}: {spelling} may pass: {reason}", place, nearest=nearest)
        if not self.complete:
            sentence = f"{self.trainer}: {spelling} was not found, but not all of the trainer's files could be read"
            return FlagSupport(spelling, "unsure", sentence, nearest=nearest)
        hint = f"; did you mean {nearest}?" if nearest else ""
        return FlagSupport(
            spelling, "unknown", f"{self.trainer}: {spelling} is not one of its flags{hint}", nearest=nearest
        )

    def _names(self) -> list[str]:
        own = [option.name for option in self.command_line.options.values()]
        library = sorted({f"--{name}" for release in self.releases for name in release.fields})
        return list(dict.fromkeys([*own, *(library if self.command_line.training_arguments else [])]))

    # -- LoRA ----------------------------------------------------------------------------------------------------

    @property
    def lora_names(self) -> dict[str, str]:
        """The trainer's own flag for each canonical name that it has one for; ``lora_enable`` is the first switch."""
        names = {canonical: flag.name for canonical, flag in self.lora_flags.items()}
        return {"lora_enable": self.switches[0].name, **names} if self.switches else names

    def settings(self, canonical: str, value: str | Sequence[str] = "True") -> list[Setting] | None:
        """How the trainer is told: no setting where nothing need be said, None where it cannot be said.

        ``value`` is the text of a number or word, for ``lora_target_modules`` the module names or ``["all-linear"]``.
        """
        if canonical == "lora_enable":
            if not self.switches:
                return [] if self.always_on else None
            return [Setting(s.name, _switch_words(s)) for s in self.switches if s.style not in ("rank", "absent")]
        flag = self.lora_flags.get(canonical)
        if flag is None:
            return None
        if canonical == "lora_target_modules":
            modules = [value] if isinstance(value, str) else list(value)
            spelled = spell_modules(flag.style, modules)
            return None if spelled is None else [Setting(flag.name, words) for words in spelled]
        text = value if isinstance(value, str) else ",".join(value)
        if canonical == "bits":
            return _bits(flag, text)
        if flag.style in ("switch", "bool"):
            return [Setting(flag.name, () if flag.style == "switch" else (text,))]
        return [Setting(flag.name, (text,))]

    @property
    def target_modules(self) -> Literal["flag", "constant", "computed"] | None:
        """How the target modules are chosen; None if no LoRA configuration names any."""
        kinds = [config.arguments["target_modules"].kind for config in self._with_targets]
        return next((kind for kind in ("flag", "computed", "constant") if kind in kinds), None)

    @property
    def target_evidence(self) -> tuple[str, Place] | None:
        """The source text that gives the target modules, and where it stands."""
        for config in self._with_targets:
            origin = config.arguments["target_modules"]
            if origin.kind == self.target_modules:
                return origin.text, origin.place
        return None

    @property
    def _with_targets(self) -> list[Call]:
        return [config for config in self.use.configs if "target_modules" in config.arguments]

    @property
    def calls(self) -> tuple[Call, ...]:
        """Every PEFT call of interest: configurations, what applies them, input gradients."""
        return (*self.use.configs, *(a.call for a in self.use.applied), *self.use.trl_config, *self.use.input_grads)

    @property
    def recommendation(self) -> Mode | None:
        """ "flags" or "attach" for a patch that asks for no target modules of its own; see ``recommend``."""
        return self.recommend().mode

    @property
    def reason(self) -> str:
        """Why ``recommendation`` is what it is."""
        return self.recommend().reason

    def recommend(self, *, target_modules: bool = False) -> Recommendation:
        """Which mode makes this trainer train LoRA; ``target_modules``: whether the user wants some of their own."""
        if self.trainer not in self.files:
            return Recommendation(None, self.problems[0])
        lacking = self._lacking()
        if lacking is None and target_modules and "lora_target_modules" not in self.lora_flags:
            lacking = f"its target modules are {self._target_words()}, no flag chooses them"
        if lacking is None:
            rank = self.lora_flags["lora_r"]
            switch = self.switches[0].name if self.switches else "LoRA is always on"
            names = ", ".join(dict.fromkeys((switch, rank.name)))
            return Recommendation("flags", f"it has LoRA flags of its own ({names} at {rank.place})")
        if self.use.trainers or (self.command_line.training_arguments and not self.complete):
            return Recommendation("attach", f"{lacking}; lorapatch.attach can put LoRA on what its Trainer trains")
        return Recommendation(None, f"{lacking}, and it makes no transformers Trainer that lorapatch.attach could hook")

    def _lacking(self) -> str | None:
        """Why its own flags do not do, in words; None if they do."""
        applied = bool(self.use.applied or self.use.trl_config)
        if not applied and (self.complete or "lora_r" not in self.lora_flags):
            return f"{self.trainer} puts no LoRA on its model"
        if "lora_r" not in self.lora_flags:
            builds = "builds LoRA" if self.use.configs else "adapts its model"  # PEFT has other methods than LoRA
            return f"{self.trainer} {builds}, but no flag sets a LoRA rank"
        if not self.switches and not self.always_on and applied:
            return f"{self.trainer} builds LoRA under a condition that no flag sets ({self.use.applied[0].call.place})"
        return None

    def _target_words(self) -> str:
        evidence = self.target_evidence
        if evidence is None:
            return "PEFT's default" if self.use.configs else "its own LoRA code's business"
        how = "fixed" if self.target_modules == "constant" else "computed"
        return f"{how} at {evidence[1]} ({evidence[0]})"

    def as_dict(self) -> dict[str, object]:
        """All of it in JSON's own types."""
        options = {option.name: option for option in self.command_line.options.values()}
        return {
            "schema": 1,
            "trainer": str(self.trainer),
            "files": [str(path) for path in self.files],
            "complete": self.complete,
            "problems": list(self.problems),
            "parsers": self.command_line.parsers,
            "open": [{"place": str(place), "reason": reason} for place, reason in self.command_line.open_because],
            "releases": [release.label for release in self.releases],
            "options": {name: _option_dict(option, option.dest in self.unused) for name, option in options.items()},
            "declared_twice": [[dest, str(a.place), str(b.place)] for dest, a, b in self.command_line.declared_twice],
            "lora_names": self.lora_names,
            "lora_flags": {
                canonical: {"flag": f.name, "style": f.style, "place": str(f.place), "because": f.because}
                for canonical, f in self.lora_flags.items()
            },
            "switches": [
                {"flag": f.name, "style": f.style, "word": f.word, "because": f.because} for f in self.switches
            ],
            "always_on": self.always_on,
            "target_modules": self.target_modules,
            "target_evidence": [self.target_evidence[0], str(self.target_evidence[1])]
            if self.target_evidence
            else None,
            "calls": [_call_dict(call) for call in self.calls],
            "frozen_by": {f"--{dest}": str(place) for dest, place in self.traits.frozen_by.items()},
            "trainer_classes": [str(call.place) for call in self.use.trainers],
            "recommendation": self.recommendation,
            "reason": self.reason,
        }


_RENAMED = {
    "--evaluation_strategy": "--eval_strategy",
    "--no_cuda": "--use_cpu",
    "--warmup_ratio": "--warmup_steps",
    "--group_by_length": "--train_sampling_strategy",
}


def read_trainer(trainer: Path, *, roots: Sequence[Path] = (), python: Path | None = None) -> TrainerSupport:
    """Read a trainer's Python and everything of its project that it imports. Nothing is imported or run.

    ``roots``: further folders that ``import`` may start from (PYTHONPATH, ``--trainer-root``); the trainer's own
    folder and those above it are tried anyway. ``python``: the interpreter that will run it, in whose environment
    transformers is looked at; without it the one beside lorapatch and the project's pin count.

    Raises Refused if the trainer's file cannot be read at all; what is wrong inside it, and in the files it imports,
    is in ``problems``.
    """
    trainer = Path(trainer).absolute()
    project, units, flow, line = _read_project(trainer, roots, installed=False)
    if not line.parsers:
        project, units, flow, line = _read_project(trainer, roots, installed=True)
    releases = releases_for(project.roots, line.training_arguments, python) if line.training_arguments else ()
    in_transformers = frozenset[str]().union(*(release.fields for release in releases))
    unused = frozenset(unused_options(project, set(line.options.values())) - in_transformers)
    options = {o.dest: o for o in line.options.values() if o.dest not in unused}
    use = read_peft_use(flow, options)
    switches, reason = find_switches(flow, use, options)
    return TrainerSupport(
        trainer=trainer,
        files=tuple(project.files),
        command_line=line,
        releases=releases,
        unused=unused,
        use=use,
        lora_flags=_with_rank_switch(find_lora_flags(use, options), switches),
        switches=tuple(switches),
        always_on=not switches and bool(reason),
        switch_reason=reason,
        traits=read_traits(units, options),
        complete=project.complete,
        problems=tuple(project.problems),
    )


def _read_project(
    trainer: Path, roots: Sequence[Path], *, installed: bool
) -> tuple[Project, list[Unit], Flow, CommandLine]:
    project = Project(trainer, roots, installed=installed)
    units = reachable_units(project)
    flow = Flow(project, units)
    return project, units, flow, read_command_line(flow, Place(trainer, 1))


def _with_rank_switch(flags: dict[str, LoraFlag], switches: Sequence[LoraFlag]) -> dict[str, LoraFlag]:
    """A rank that turns LoRA on by being above zero is the rank's flag, whatever it is called."""
    rank = next((switch for switch in switches if switch.style == "rank"), None)
    return {**flags, "lora_r": rank} if rank and "lora_r" not in flags else flags


def _switch_words(switch: LoraFlag) -> tuple[str, ...]:
    if switch.style == "switch":
        return ()
    if switch.style == "choice":
        return (switch.word or "lora",)
    return ("False",) if switch.style == "off" else ("True",)


def _bits(flag: LoraFlag, bits: str) -> list[Setting] | None:
    """``--bits 4`` where it is a number; ``--load_in_4bit`` and its like say four or eight bits, or nothing."""
    if flag.style not in ("bool", "switch"):
        return [Setting(flag.name, (bits,))]
    means = "8" if "8bit" in flag.name else "4"
    if bits == means:
        return [Setting(flag.name, () if flag.style == "switch" else ("True",))]
    return [] if bits == "16" else None


def _option_dict(option: Option, unused: bool) -> dict[str, object]:
    return {
        "spellings": list(option.spellings),
        "kind": option.kind,
        "declared_in": option.declared_in,
        "place": str(option.place),
        "default": option.default,
        "choices": list(option.choices),
        "unused": unused,
    }


def _call_dict(call: Call) -> dict[str, object]:
    arguments = {
        name: {"kind": origin.kind, "text": origin.text, "options": list(origin.options), "place": str(origin.place)}
        for name, origin in call.arguments.items()
    }
    return {"name": call.name, "place": str(call.place), "arguments": arguments}
