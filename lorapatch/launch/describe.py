"""A script's launches for people and for programs: the table of `inspect`, and its JSON."""

from __future__ import annotations

from typing import Any

from lorapatch.launch.model import Flag, Launch, Script, Word

__all__ = ["oddities", "script_dict"]


def script_dict(script: Script) -> dict[str, Any]:
    """The whole of what was read (schema 1). Offsets are bytes of the script, lines count from 1."""
    return {
        "schema": 1,
        "path": None if script.path is None else str(script.path),
        "bytes": len(script.source),
        "launches": [_launch_dict(launch) for launch in script.launches],
        "odd": oddities(script),
    }


def _launch_dict(launch: Launch) -> dict[str, Any]:
    return {
        "number": launch.number,
        "line": launch.line,
        "span": [launch.start, launch.end],
        "launcher": launch.launcher,
        "prefix": [word.text for word in launch.prefix],
        "launcher_options": [word.text for word in launch.launcher_options],
        "attached": launch.attached,
        "trainer": {"name": launch.trainer.name, "module": launch.trainer.module, "written": launch.trainer.word.text},
        "environment": {name: _word_dict(word) for name, word in launch.environment},
        "flags": [_flag_dict(flag) for flag in launch.flags],
        "redirects": list(launch.redirects),
        "piped": launch.piped,
        "context": list(launch.context),
        "stage": {"name": launch.stage.name, "training": launch.stage.training, "reasons": list(launch.stage.reasons)},
        "lora_flags": [flag.name for flag in launch.flags if "lora" in flag.name.lower()],
        "insert_at": launch.insert_at,
        "insert_in": launch.insert_where,
    }


def _flag_dict(flag: Flag) -> dict[str, Any]:
    return {
        "name": flag.name,
        "line": flag.line,
        "span": list(flag.word.span),
        "style": "equals" if flag.equals else "space" if flag.values else "alone",
        "values": [_word_dict(word) for word in flag.values],
    }


def _word_dict(word: Word) -> dict[str, Any]:
    described: dict[str, Any] = {"text": word.text, "value": word.value}
    if word.value is None:
        described["unresolved"] = word.reason
    return described


def oddities(script: Script) -> list[str]:
    """What is odd about a script, one sentence each."""
    from lorapatch.errors import Refused
    from lorapatch.shell.command import check_not_cut

    odd = list(script.notes)
    odd += [f"line {script.line(start)}: this part could not be read" for start, _ in script.outline.errors]
    for launch in script.launches:
        try:
            check_not_cut(launch.text.outline, launch.command)
        except Refused as refusal:
            odd.append(str(refusal))
        names = [flag.name for flag in launch.flags]
        for name in dict.fromkeys(names):
            if names.count(name) > 1:
                odd.append(f"line {launch.line}: {name} is given {names.count(name)} times; the last counts")
    return odd
