"""The argv oracle: bash itself runs a script whose commands are stubs, and says what each would have been given."""

from __future__ import annotations

import atexit
import os
import re
import selectors
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Call", "fault", "run_script"]

# Absolute interpreters in the cases live under this folder; the oracle moves it into its own.
CONDA = b"/opt/conda"
SECONDS = 30
LAUNCHERS = {"deepspeed", "torchrun", "accelerate", "python", "python3"}

# Everything that must not really run. Whatever else is not found is recorded as well (see BASH_ENV below).
STUBS = [
    "deepspeed", "torchrun", "accelerate", "python", "python3", "srun", "tee", "mkdir", "rm", "cp", "mv",
    "ln", "touch", "bash", "sh", "which", "sleep", "date", "hostname", "shuf", "nproc", "nvidia-smi",
    "scontrol",
]  # fmt: skip
# What a script may really use: none of these removes anything or reaches the network.
REAL = [
    "cat", "dirname", "basename", "realpath", "readlink", "seq", "head", "tail", "wc", "tr", "cut", "grep",
    "env", "nohup", "timeout", "nice", "stdbuf", "printf",
]  # fmt: skip
# Set by bash and by the oracle, not by the script.
OWN_ENVIRONMENT = {b"PATH", b"PWD", b"OLDPWD", b"SHLVL", b"_", b"HOME", b"BASH_ENV", b"LC_ALL"}

RECORD = r"""
record() {  # program, arguments…: one file a call, so that background commands cannot mix their bytes
    { printf '%s\0' "$1" "$(($# - 1))" "${@:2}"; "$ORACLE_ENV" -0; } > "$ORACLE_LOG/$EPOCHREALTIME.$BASHPID"
}
command_not_found_handle() { record "$@"; }
"""

STUB = r"""#!@BASH@
# Records how it was called; what wraps another command then runs it, as the real one does.
name=${0##*/}
case $name in
srun)
    own=()
    while [[ ${1-} == -* ]]; do
        case $1 in
        -[pnNJwcGtoe] | --jobid | --ntasks | --nodes | --partition | --gres) own+=("$1" "$2"); shift 2 ;;
        *) own+=("$1"); shift ;;
        esac
    done
    record srun "${own[@]}"
    exec "$@" ;;
bash | sh)
    if [[ ${1-} == -*c ]]; then exec @BASH@ "$@"; fi ;;
esac
record "$name" "$@"
case $name in
which) command -v "$1" ;;
tee) while read -r; do :; done ;;
mkdir) for folder; do [[ $folder == [-/.]* ]] || "$ORACLE_MKDIR" -p "$folder"; done ;;
date) echo 20240229 ;;
hostname | scontrol) echo node0 ;;
shuf) echo 29511 ;;
nproc) echo 8 ;;
nvidia-smi) echo "GPU 0" ;;
python*) [[ -z ${ORACLE_PRINT-} ]] || echo "$ORACLE_PRINT" ;;
esac
exit 0
"""


@dataclass(frozen=True)
class Call:
    """One command as the script started it: program name, arguments, and the environment the script gave it."""

    program: str
    argv: tuple[bytes, ...]
    environment: tuple[tuple[bytes, bytes], ...] = ()


def run_script(text: bytes, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> list[Call]:
    """Run ``text`` with real bash in a temporary folder where every launcher is a stub.

    Returns the calls in the order in which they began. Nothing but the stubs and a few harmless programs is on PATH.
    Raises AssertionError when the script does not end within 30 seconds.
    """
    bash = shutil.which("bash")
    assert bash is not None, "the oracle needs bash"
    tools = _tools(bash)
    with tempfile.TemporaryDirectory(prefix="oracle-") as folder:
        root = Path(folder)
        script = _furnish(root, text, tools / "stub")
        given = {
            "PATH": str(tools / "bin"),
            "HOME": str(root / "home"),
            "LC_ALL": "C",
            "BASH_ENV": str(tools / "record.sh"),
            "ORACLE_LOG": str(root / "log"),
            "ORACLE_ENV": str(shutil.which("env")),
            "ORACLE_MKDIR": str(shutil.which("mkdir")),
            **(environment or {}),
        }
        _run([bash, script.name, *arguments], script.parent, given)
        records = sorted((root / "log").iterdir(), key=lambda path: path.name)
        return [_parsed(path.read_bytes(), os.fsencode(tools), os.fsencode(folder)) for path in records]


@cache
def _tools(bash: str) -> Path:
    """The stubs and the real programs in ``bin``; made once, removed at the end. No script can change them."""
    root = Path(tempfile.mkdtemp(prefix="oracle-tools-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    (root / "bin").mkdir()
    (root / "record.sh").write_text(RECORD)
    stub = root / "stub"
    stub.write_text(STUB.replace("@BASH@", bash))
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    for name in REAL:
        found = shutil.which(name)
        if found is not None:
            (root / "bin" / name).symlink_to(found)
    for name in STUBS:
        (root / "bin" / name).symlink_to(stub)
    return root


def _furnish(root: Path, text: bytes, stub: Path) -> Path:
    """Lay out the script, whose interpreters under CONDA become stubs."""
    for name in ("home", "log", "work"):
        (root / name).mkdir()
    for path in set(re.findall(re.escape(CONDA) + rb"/[\w./-]+", text)):
        place = root / os.fsdecode(path).lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(stub)
    script = root / "work" / "script.sh"
    script.write_bytes(text.replace(CONDA, os.fsencode(root) + CONDA))
    return script


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run to the end, background commands included: all of them hold the writing end of a pipe."""
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, pass_fds=(writing,), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(writing)
        with selectors.DefaultSelector() as selector:
            selector.register(reading, selectors.EVENT_READ)
            ended = bool(selector.select(SECONDS))
        if not ended:
            os.killpg(process.pid, 9)
        process.wait()
        assert ended, f"the script was still running after {SECONDS} s"
    finally:
        os.close(reading)


def _parsed(record: bytes, *roots: bytes) -> Call:
    for root in roots:
        record = record.replace(root, b"")
    words = record.split(b"\0")
    count = int(words[1])
    pairs = (word.split(b"=", 1) for word in words[2 + count :] if b"=" in word)
    kept = {
        name: value
        for name, value in pairs
        if name not in OWN_ENVIRONMENT and not name.startswith((b"ORACLE_", b"BASH_FUNC_"))
    }
    return Call(os.fsdecode(words[0]), tuple(words[2 : 2 + count]), tuple(sorted(kept.items())))


def fault(
    before: Sequence[Call],
    after: Sequence[Call],
    flags: Mapping[str, str],
    trainer: str,
    mark: str,
    attach: Sequence[str] = (),
) -> str | None:
    """What is wrong with a patch that turned the calls ``before`` into ``after``; None when it is right.

    Right is: every launch with the word ``mark`` among its arguments, and at least one there is, has ``flags`` behind
    ``trainer``, and all other calls are equal. Their order does not count, for background commands have none, nor do
    exported variables that hold a command. With ``attach`` these words have to stand before the trainer as well.
    """
    if attach:
        after = [_detached(call, [word.encode() for word in attach], trainer) for call in after]
    before, after = _without_commands(before, trainer), _without_commands(after, trainer)
    rest = list(after)
    changed: list[Call] = []
    equal: list[Call] = []
    for call in before:
        (equal if call in rest else changed).append(call)
        if call in rest:
            rest.remove(call)
    meant = [call for call in before if call.program in LAUNCHERS and any(mark.encode() in word for word in call.argv)]
    if not meant:
        return "the launch to be patched never ran"
    if others := [call for call in changed if call not in meant]:
        return f"other calls changed: {others}"
    if len(changed) != len(rest):
        return f"{len(before)} calls became {len(after)}"

    def key(call: Call) -> tuple[bytes, ...]:
        return tuple(word for word, flag in _marked(call.argv, flags) if flag is None)

    pairs = list(zip(sorted(changed, key=key), sorted(rest, key=key)))
    pairs += [(call, call) for call in equal if call in meant]  # right already, or forgotten
    return next(filter(None, (_argv_fault(old, new, flags, trainer) for old, new in pairs)), None)


def _detached(call: Call, attach: list[bytes], trainer: str) -> Call:
    """``call`` without the words ``attach`` if they stand right before the trainer."""
    for at in range(len(call.argv) - len(attach)):
        if list(call.argv[at : at + len(attach)]) == attach and trainer.encode() in call.argv[at + len(attach)]:
            return Call(call.program, (*call.argv[:at], *call.argv[at + len(attach) :]), call.environment)
    return call


def _without_commands(calls: Sequence[Call], trainer: str) -> list[Call]:
    """The calls without the environment variables in which ``trainer`` is named."""
    return [
        Call(call.program, call.argv, tuple(pair for pair in call.environment if trainer.encode() not in pair[1]))
        for call in calls
    ]


def _argv_fault(before: Call, after: Call, flags: Mapping[str, str], trainer: str) -> str | None:
    """What is wrong with ``after``, which should be ``before`` with ``flags`` set; None when all is right.

    Right is: the same program and environment; flags that were there keep their place and have the wanted value, the
    others stand together at one place behind the trainer in the wanted order; every other word is the same.
    """
    if (before.program, before.environment) != (after.program, after.environment):
        return "program or environment changed"
    old, new = _marked(before.argv, flags), _marked(after.argv, flags)
    there = {flag for _, flag in old if flag is not None}
    added = [index for index, (_, flag) in enumerate(new) if flag is not None and flag not in there]
    if added and added != list(range(added[0], added[-1] + 1)):
        return "the new flags are not in one place"
    order = [flag for flag in dict.fromkeys(new[index][1] for index in added)]
    if order != [flag for flag in flags if flag not in there]:
        return f"new flags are {order}"
    if added and not any(trainer.encode() in word for word in after.argv[: added[0]]):
        return "the new flags stand before the trainer"
    kept = [pair for index, pair in enumerate(new) if index not in added]
    if len(kept) != len(old) or any(a != b and (a[1] is None or a[1] != b[1]) for a, b in zip(old, kept)):
        return "other words changed"
    for flag, value in flags.items():
        found = [word.decode() for word, owner in new if owner == flag]
        if found not in ([flag, value], [f"{flag}={value}"], *([[flag]] if value == "True" else [])):
            return f"{flag} is {found}"
    return None


def _marked(argv: Sequence[bytes], flags: Mapping[str, str]) -> list[tuple[bytes, str | None]]:
    """Each word with the flag of ``flags`` that it is or is the value of."""
    marked: list[tuple[bytes, str | None]] = []
    waiting: str | None = None
    for word in argv:
        name = word.split(b"=", 1)[0].decode(errors="replace")
        if word.startswith(b"--"):
            owner = name if name in flags else None
            waiting = owner if b"=" not in word else None
        else:
            owner, waiting = waiting, None
        marked.append((word, owner))
    return marked
