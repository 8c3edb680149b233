"""Plan the patch of a script: which edits give its launch the flags, in the script's own style."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from lorapatch.errors import Refused
from lorapatch.launch.find import read_source
from lorapatch.launch.model import Flag, Launch, Script, Word
from lorapatch.lora.attachment import attach_words, check_interpreter, why_attach
from lorapatch.lora.choose import choose_launch
from lorapatch.lora.dialect import Words, flags_for, trainer_support
from lorapatch.lora.flags import PatchOptions
from lorapatch.lora.proof import prove, unproved
from lorapatch.shell.command import check_not_cut, check_words
from lorapatch.shell.edit import Edit, apply_edits
from lorapatch.shell.syntax import syntax_error

if TYPE_CHECKING:
    from lorapatch.lora.support import TrainerSupport

__all__ = ["Patch", "Setting", "plan_patch", "set_flags"]

_PLAIN = re.compile(r"[\w./,:=+@%-]+")
# Names that LLaVA's descendants share; they say nothing of a dialect.
_KNOWN = frozenset("lora_r lora_alpha lora_dropout lora_bias lora_weight_path lora_target_modules lora_variant".split())
_TRUE = {"true", "1", "yes", "on", ""}
_FALSE = {"false", "0", "no", "off"}
_OPTIONAL = re.compile(r"\$(?:[@*]|\{[^}]*(?:[@*]|\+))")  # an array, all arguments, a word for the case that a variable is set
_CONTINUED = re.compile(rb"([ \t]*)\\\n([ \t]*)")
_LAST_LINE = re.compile(rb"\n[ \t]*$")


class Setting(NamedTuple):
    """One flag that the patch sets: what it was (None: not there) and what it is now."""

    flag: str
    before: str | None
    after: str
    line: int  # in the script as it was


@dataclass(frozen=True, slots=True)
class Patch:
    """A planned patch. ``text`` is the whole new script; ``changed`` is False when there is nothing to do."""

    script: Script
    launch: Launch
    settings: tuple[Setting, ...]
    edits: tuple[Edit, ...]  # of the launch; a merge block comes on top
    text: bytes
    notes: tuple[str, ...]
    attach: tuple[str, ...] = ()  # the words that let the launch go through lorapatch.attach

    @property
    def changed(self) -> bool:
        return self.text != self.script.source


def plan_patch(
    script: Script,
    options: PatchOptions | None = None,
    *,
    mode: Literal["auto", "flags", "attach"] = "auto",
    attach_path: bool = False,
    trainer_roots: Sequence[Path] = (),
    with_merge: bool = False,
) -> Patch:
    """The patch that gives the fine-tuning launch of ``script`` its LoRA flags, proved but not written.

    ``with_merge`` puts a block behind the launch that merges the adapter, so that later stages find a whole model.

    If the trainer's Python is found (under ``trainer_roots``, the script's folder or those above it), it is read, and
    the flags are those that it takes. A trainer without LoRA, or without a flag for what is asked, is run through
    `lorapatch.attach`. ``mode`` "flags" leaves it unread and only sets flags, "attach" always attaches;
    ``attach_path`` names lorapatch by its path in the launch. Raises Refused when it cannot be done.
    """
    options = options or PatchOptions()
    for launch in script.launches:  # a cut command ends the script, wherever it stands
        check_not_cut(launch.text.outline, launch.command)
    launch = choose_launch(script, options.stage)
    _check_takes_flags(launch)
    support = trainer_support(script, launch, trainer_roots) if mode != "flags" or launch.attached else None
    why = why_attach(launch, support, options, mode)
    if support is not None:
        _check_switched_off(support, launch)
    elif why is None:
        _check_dialect(launch)
    flags, notes = flags_for(support, options, attach=why is not None)
    words = () if why is None else attach_words(launch, by_path=attach_path)
    if words:
        notes.append(f"attach mode: {why}")
        if not attach_path and (unchecked := check_interpreter(script, launch)):
            notes.append(unchecked)
    patch = set_flags(script, launch, flags, words)
    if support is None and mode != "flags" and script.path is not None:
        notes.append(f"{launch.trainer.name} was not found, so nobody checked that it takes these flags")
    if with_merge:
        patch = _with_merge(patch)
    return replace(patch, notes=(*patch.notes, *notes, *_stage_notes(launch)))


def _with_merge(patch: Patch) -> Patch:
    """The patch with the merge block behind its launch. Raises Refused unless every launch stays as it is."""
    from lorapatch.lora.merge_block import merge_edits

    before = read_source(patch.text, patch.script.path, patch.script.values.environment)
    text = apply_edits(patch.text, merge_edits(before, before.launches[patch.launch.number - 1]))
    after = read_source(text, patch.script.path, patch.script.values.environment)
    words = [[[word.text for word in launch.words] for launch in script.launches] for script in (before, after)]
    if words[0] != words[1] or syntax_error(text) is not None:
        raise unproved(patch.launch)
    return replace(patch, text=text)


def _check_dialect(launch: Launch) -> None:
    """LoRA flags under other names than ours say that the trainer has its own; ours would be unknown to it."""
    if launch.flag("lora_enable") is not None:
        return
    for flag in launch.flags:
        name = flag.name.lstrip("-").replace("-", "_")
        if re.search(r"(^|_)(q?lora|peft)(_|$)", name) and name not in _KNOWN:
            raise Refused(
                f"line {flag.line}: {flag.name} says that the trainer has LoRA flags of its own, but its Python was not"
                " found to read them; name its folder with --trainer-root, or set them with --set"
            )


def _check_switched_off(support: TrainerSupport, launch: Launch) -> None:
    """A flag that keeps the trainer from LoRA would have to go; only flags are set here, never taken away."""
    for switch in support.switches:
        flag = launch.flag(switch.name)
        if switch.style == "absent" and flag is not None:
            raise Refused(f"line {flag.line}: {flag.name} keeps the trainer from LoRA ({switch.place}); take it out")


def _stage_notes(launch: Launch) -> list[str]:
    frozen = launch.flag("tune_mm_mlp_adapter")
    if frozen is None or not frozen.values or (frozen.value or "").lower() not in _TRUE:
        return []
    return [f"line {frozen.line}: {frozen.name} {frozen.text} freezes everything but the projector, LoRA included"]


def _check_takes_flags(launch: Launch) -> None:
    """Trainers that read their settings from a file or as key=value have no use for flags."""
    if launch.flags:
        return
    settings = [word.text for word in launch.arguments if re.match(r"[+~]{0,2}[A-Za-z_][\w./@-]*=", word.text)]
    files = [word.text for word in launch.arguments if re.search(r"\.(ya?ml|json|toml)[\"']?$", str(word))]
    for given, what in ((settings, "key=value settings"), (files, "a settings file")):
        if given:
            raise Refused(f"line {launch.line}: the trainer takes {what} ({given[0]}), not flags; set LoRA there")


def set_flags(script: Script, launch: Launch, flags: Mapping[str, Words], attach: Words = ()) -> Patch:
    """Set ``flags`` (name without dashes to value) in ``launch``: change those there are, add the others.

    ``attach`` are words that go before the trainer, such as ``--module lorapatch.attach``.

    The result is proved: parsed again its words are the old ones plus the flags, ``bash -n`` agrees, and bash itself
    splits the command into the same words. Raises Refused if that is not so.
    """
    check_not_cut(launch.text.outline, launch.command)
    check_words(launch.text.outline, launch.command)
    edits, settings, notes = _plan(script, launch, flags)
    written = tuple(_quoted(word, launch.trainer.word.where, "the path of lorapatch") for word in attach)
    if attach:
        edits.append(_before_trainer(script, launch, written))
    text = apply_edits(script.source, edits)
    if edits:
        after, now = prove(script, launch, text, flags, written)
        if _plan(after, now, flags)[0]:  # a second patch would change something: a flag is not what it should be
            raise unproved(launch)
    elif error := syntax_error(script.source):
        raise Refused(f"bash finds a syntax error already: {error}")
    return Patch(script, launch, tuple(settings), tuple(edits), text, tuple(notes), attach)


def _before_trainer(script: Script, launch: Launch, words: Words) -> Edit:
    """``words`` before the trainer's name, a blank behind each."""
    trainer = launch.trainer.word
    for other in script.launches:
        if other.number != launch.number and any(word.span == trainer.span for word in other.words):
            raise Refused(
                f"line {launch.line}: the launch on line {other.line} takes its trainer from the same words; give each its own"
            )
    at = trainer.span[0]
    if trainer.where == "string" and script.source[at - 1 : at] == b"\\":  # a quote there is written \"
        at -= 1
    return Edit(at, at, b"".join(word.encode("utf-8", "surrogateescape") + b" " for word in words))


def _plan(script: Script, launch: Launch, flags: Mapping[str, Words]) -> tuple[list[Edit], list[Setting], list[str]]:
    edits: list[Edit] = []
    settings: list[Setting] = []
    notes: list[str] = []
    missing: dict[str, Words] = {}
    for name, value in flags.items():
        _check_conditional(script, launch, name)
        found = list(launch.all_flags(name))
        if len(found) > 1:
            lines = ", ".join(str(flag.line) for flag in found)
            notes.append(f"{found[0].name} is given {len(found)} times (lines {lines}); the last counts")
        if not found:
            missing[name] = value
            settings.append(Setting(f"--{name}", None, " ".join(value), script.line(max(launch.insert_at, 0))))
            continue
        flag = _with_its_own(found[-1], value)
        if _same(flag, value):
            continue
        _check_not_shared(script, launch, flag)
        edits.append(_change(script.source, flag, value))
        settings.append(Setting(flag.name, flag.text, " ".join(value), flag.line))
    if missing:
        edits.append(_insertion(script, launch, missing))
    return edits, settings, notes


def _check_conditional(script: Script, launch: Launch, name: str) -> None:
    for start, end in launch.conditional_pieces:
        if re.search(rb"--?" + name.replace("_", "[-_]").encode() + rb"\b", script.source[start:end]):
            raise Refused(
                f"line {script.line(start)}: --{name} stands in a variable that is not always set the same way; move it"
                f" into the launch on line {launch.line}"
            )
    if not re.search("lora|bits", name):
        return  # of another flag the last one counts, which is ours
    hidden = re.compile(rf"(?<![\w/.}}-])--{name.replace('_', '[-_]')}\b")
    for word in launch.arguments:  # "${LORA:+--lora_r 8}", "$R" with R="--lora_r=8"
        if "$" not in word.text and "`" not in word.text:
            continue
        if not _is_flag(word) and (hidden.search(word.text) or hidden.match(str(word))):
            raise Refused(f"line {script.line(word.span[0])}: --{name} stands inside {word.text}; write it out as a flag")


def _check_not_shared(script: Script, launch: Launch, flag: Flag) -> None:
    """A flag in a variable that another launch uses too cannot be changed for this launch alone."""
    if flag.word.where == "command":
        return
    for other in script.launches:
        if other.number != launch.number and any(word.span == flag.word.span for word in other.arguments):
            raise Refused(
                f"line {flag.line}: {flag.name} stands in a variable that the launch on line {other.line} uses too;"
                f" give the launch on line {launch.line} its own"
            )


def _with_its_own(flag: Flag, words: Words) -> Flag:
    """``flag`` without what may expand to nothing behind a single value: ``"${EXTRA[@]}"``, ``${DEBUG:+--max_steps 5}``."""
    if len(words) == 1 and flag.values and all(_OPTIONAL.search(word.text) for word in flag.values[1:]):
        return flag._replace(values=flag.values[:1])
    return flag


def _same(flag: Flag, words: Words) -> bool:
    now = flag.value
    if now is None:
        return False
    value = " ".join(words)
    if now == value or not words:  # a flag alone means True
        return now.lower() in _TRUE if not words else True
    if value in ("True", "False"):
        return now.lower() in (_TRUE if value == "True" else _FALSE)
    try:
        return float(now) == float(value)
    except ValueError:
        return False


def _quoted(value: str, where: str, flag: str) -> str:
    """``value`` as a shell word; inside a string no further quotes can be put."""
    if _PLAIN.fullmatch(value):
        return value
    if where == "string":
        raise Refused(
            f"{flag} {value!r} would need quotes inside the string that holds the launch; write the launch as a command"
        )
    return shlex.quote(value)


def _change(source: bytes, flag: Flag, words: Words) -> Edit:
    """Replace the value and keep its quotes. Raises Refused where a word behind it may be no value of it."""
    if len(flag.values) > max(1, len(words)) and "target" not in flag.name:
        raise Refused(f"line {flag.line}: {flag.name} has more behind it than a value ({flag.text}); give it one alone")
    if flag.values and not words and (flag.value or "").lower() not in (*_TRUE, *_FALSE):
        raise Refused(f"line {flag.line}: {flag.name} takes no value, but {flag.text} stands behind it; move that away")
    value = words[0] if len(words) == 1 else ""
    if not flag.values:
        start = end = flag.word.span[1]
        return Edit(start, end, "".join(f" {_quoted(word, flag.word.where, flag.name)}" for word in words).encode())
    first, last = flag.values[0], flag.values[-1]
    if first.span[0] < 0 or last.span[1] < first.span[0]:
        raise Refused(f"line {flag.line}: the value of {flag.name} is put together from several places; write it out")
    start, end = first.span[0], last.span[1]
    quote = first.text[:1]
    if value and len(flag.values) == 1 and quote in "\"'" and first.text.endswith(quote) and _PLAIN.fullmatch(value):
        start, end = start + 1, end - 1
        if first.where == "string" and source[end - 1 : end] == b"\\":  # the quotes there are written \"
            end -= 1
        return Edit(start, end, value.encode())
    return Edit(start, end, " ".join(_quoted(word, first.where, flag.name) for word in words).encode())


def _insertion(script: Script, launch: Launch, flags: Mapping[str, Words]) -> Edit:
    """The new flags behind the last argument, in the command's own style."""
    if launch.insert_at < 0:
        raise Refused(f"line {launch.line}: {launch.obstacle}; write the launch as one command")
    for other in script.launches:
        if other.number != launch.number and other.insert_at == launch.insert_at:
            raise Refused(f"line {launch.line}: the launch on line {other.line} runs the same words; give each its own")
    separator = _separator(script, launch)
    equals = _equals_style(launch)
    lines: list[str] = []
    for name, words in flags.items():
        parts = [f"--{name}", *(_quoted(word, launch.insert_where, f"--{name}") for word in words)]
        lines.append("=".join(parts) if equals and len(parts) == 2 else " ".join(parts))
    return Edit(launch.insert_at, launch.insert_at, b"".join(separator + line.encode() for line in lines))


def _equals_style(launch: Launch) -> bool:
    with_value = [flag for flag in launch.flags if flag.values]
    return sum(flag.equals for flag in with_value) * 2 > len(with_value)


def _separator(script: Script, launch: Launch) -> bytes:
    """What stands before the last flag that begins a line; a blank if all stand on one line."""
    before = launch.trainer.word
    separator = b" "
    for word in launch.arguments:
        if word.where == launch.insert_where and word.span[0] >= before.span[1] >= 0 and before.where == word.where:
            gap = script.source[before.span[1] : word.span[0]]
            if _is_flag(word):
                separator = _line_break(gap, launch.insert_where) or separator
        before = word
    return separator


def _line_break(gap: bytes, where: str) -> bytes | None:
    """The break between two lines of a command, from what stands between two of its words."""
    if where != "array" and (breaks := list(_CONTINUED.finditer(gap))):
        return breaks[0][1] + b"\\\n" + breaks[-1][2]  # lines with nothing but a backslash may lie between
    if where == "command":
        return None
    found = _LAST_LINE.search(gap)
    return found[0] if found else None


def _is_flag(word: Word) -> bool:
    return word.text.lstrip("\"'").startswith("-")
