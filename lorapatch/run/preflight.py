"""Before a run: is everything there that the launch names, and does this machine fit it?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorapatch.errors import Refused
from lorapatch.launch.model import Flag, Launch, Script
from lorapatch.lora.attachment import check_interpreter
from lorapatch.lora.lint.facts import LaunchFacts, true
from lorapatch.run.gpus import Gpu, Gpus

__all__ = ["PathFlag", "Preflight", "look_at_paths", "preflight"]

GIB = 1 << 30
_WRITES = re.compile(r"output|save|logging|cache|run_name|hub|push|export|result|report")
_READS = re.compile(
    r"path|dir|folder|file|root|tower|deepspeed|config|adapter|tokenizer|checkpoint|json|image|data|model"
)
# A model may be named as on the Hugging Face hub, which looks like a path of two parts.
_HUB_FLAG = re.compile(r"model|tower|tokenizer|processor|adapter|dataset")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Weights of an earlier stage that a test can do without: they start at random then.
_OPTIONAL = ("pretrain_mm_mlp_adapter",)
_OTHER_ACCELERATORS = ("/dev/kfd", "/dev/davinci0", "/dev/accel", "/dev/dri/renderD128", "/dev/xpu")


@dataclass(frozen=True)
class PathFlag:
    """A flag that names a file or folder. ``state``: "there", "missing", "made by line N", or "not known"."""

    name: str
    value: str
    line: int
    state: str

    @property
    def missing(self) -> bool:
        """Whether it is not there now, made later or not."""
        return self.state not in ("there", "not known")


@dataclass(frozen=True)
class Preflight:
    """What was found: the path flags, flags that have to be left out of a test, the interpreter, notes in sentences."""

    paths: tuple[PathFlag, ...]
    drop: tuple[str, ...]
    python: str | None
    notes: tuple[str, ...]
    cpu: bool  # it will run on the CPU


def preflight(
    script: Script,
    launch: Launch,
    *,
    alone: bool,
    budget_B: int | None = None,
    environment: Mapping[str, str] | None = None,
    output: Path | None = None,
) -> Preflight:
    """Look at everything that ``launch`` needs, ``alone`` or behind the stages before it.

    Raises Refused, one sentence, for what would fail: no trainer, no launcher, no DeepSpeed, a path that is not there
    and that nothing makes, no GPU where one is wanted, a disk too small for the checkpoints, a budget larger than the
    GPU.
    """
    environment = os.environ if environment is None else environment
    folder = script.path.parent if script.path else Path.cwd()
    facts = LaunchFacts(launch, folder, ())
    _check_trainer(facts)
    python = _check_launcher(script, facts, environment)
    paths = look_at_paths(script, launch)
    drop, notes = _check_paths(paths, launch, alone)
    cpu, used = _check_gpu(facts, environment, budget_B)
    _check_disk(facts, output or _output(launch, folder))
    return Preflight(tuple(paths), tuple(drop), python, (*notes, *used), cpu)


# -- trainer and launcher --------------------------------------------------------------------------------------------


def _check_trainer(facts: LaunchFacts) -> None:
    word = facts.launch.trainer.word
    if not facts.launch.trainer.module and word.value is not None and facts.trainer_path is None:
        raise Refused(
            f"line {facts.line}: the trainer {word.value} does not exist; correct the path, or the variable it is"
            f" made of"
        )


def _check_launcher(script: Script, facts: LaunchFacts, environment: Mapping[str, str]) -> str | None:
    """The interpreter of the launch, where that is known before it runs."""
    activates = script.activates_environment(facts.launch.start)
    for word in facts.launch.launcher_words:
        program = word.value
        if not program or program.startswith("-") or " " in program:
            continue
        if shutil.which(program, path=environment.get("PATH")) is None:
            if "/" in program:
                raise Refused(f"line {facts.line}: {program} does not exist; name the one of your environment")
            if not activates:
                hint = (
                    f"pip install {program}" if program in ("deepspeed", "accelerate") else "activate its environment"
                )
                raise Refused(f"line {facts.line}: {program} is not installed here; {hint}")
        break
    python = facts.python
    if python is None or activates:
        return None
    if facts.flag("deepspeed") is not None and not _has_module(python, "deepspeed", environment):
        raise Refused(
            f"line {facts.line}: {python} has no deepspeed, which --deepspeed needs: {python} -m pip install deepspeed"
        )
    if facts.attached and facts.launch.runs_module:
        check_interpreter(script, facts.launch, environment)
    return str(python)


def _has_module(python: Path, name: str, environment: Mapping[str, str]) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    try:
        return (
            subprocess.run([python, "-c", code], env=dict(environment), timeout=30, capture_output=True).returncode == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return True  # the run itself will say it better


# -- paths -----------------------------------------------------------------------------------------------------------


def look_at_paths(script: Script, launch: Launch) -> list[PathFlag]:
    """Every flag of the launch that names a file or folder it reads, with whether that is there."""
    folder = script.path.parent if script.path else Path.cwd()
    facts = LaunchFacts(launch, folder, ())
    found = []
    for flag in launch.flags:
        if not _names_a_path(flag):
            continue
        value = flag.value
        if value is None:
            found.append(PathFlag(flag.name, flag.text, flag.line, "not known"))
        elif facts.find(value) is not None:
            found.append(PathFlag(flag.name, value, flag.line, "there"))
        elif not (_HUB_NAME.fullmatch(value) and _HUB_FLAG.search(flag.name)):
            line = _made_by(script, launch, value)
            found.append(PathFlag(flag.name, value, flag.line, "missing" if line is None else f"made by line {line}"))
    return found


def _names_a_path(flag: Flag) -> bool:
    name = flag.name.lstrip("-").lower()
    if _WRITES.search(name) or not _READS.search(name):
        return False
    return "/" in flag.text and "://" not in flag.text and " " not in (flag.value or "")


def _made_by(script: Script, launch: Launch, value: str) -> int | None:
    """The line of the earlier launch that saves there, or of the earlier command that is given this very path."""
    for earlier in script.launches:
        output = earlier.flag("output_dir")
        if earlier.start < launch.start and output and output.value and _is_below(value, output.value):
            return earlier.line
    for command in script.outline.commands:
        if command.start >= launch.start:
            break
        words = [
            script.value(script.source[slice(*span)].decode("utf-8", "replace"), span[0]) for span in command.words
        ]
        if len(words) > 1 and words[0] not in ("cd", "echo", "ls", "test", "[", "export") and value in words[1:]:
            return script.line(command.start)
    return None


def _is_below(path: str, folder: str) -> bool:
    inner, outer = Path(os.path.normpath(path)).parts, Path(os.path.normpath(folder)).parts
    return len(outer) > 1 and inner[: len(outer)] == outer


def _check_paths(paths: Sequence[PathFlag], launch: Launch, alone: bool) -> tuple[list[str], list[str]]:
    drop, notes = [], []
    for path in paths:
        if path.state == "missing":
            raise Refused(
                f"line {path.line}: {path.name} {path.value} is not there, and no earlier line makes it; correct"
                " the path, or the variable it is made of"
            )
        if alone and path.missing:
            if path.name.lstrip("-") not in _OPTIONAL:
                raise Refused(
                    f"line {path.line}: {path.name} {path.value} is not there yet: it is {path.state} of the"
                    f" script, which has to run"
                    " first"
                )
            drop.append(path.name.lstrip("-"))
            notes.append(
                f"{path.name} is {path.state}, which has not run: the test goes without it, what it would load is"
                f" random"
            )
    return drop, notes


# -- the machine -----------------------------------------------------------------------------------------------------


def _check_gpu(facts: LaunchFacts, environment: Mapping[str, str], budget_B: int | None) -> tuple[bool, list[str]]:
    """Whether the run will be on the CPU, and what is to be said about the GPUs otherwise."""
    on_cpu = any(true(facts.value(name)) for name in ("use_cpu", "no_cuda") if facts.flag(name))
    if on_cpu or environment.get("DS_ACCELERATOR") == "cpu":
        return True, []
    gpus = Gpus()
    try:
        visible = _visible(gpus.memory(), facts.launch, environment)
        if not visible:
            return _check_without_gpu(facts, gpus.why_none), []
        _check_budget(visible, budget_B)
        old = next((gpu for gpu in visible if gpus.supports_bf16(gpu.index) is False), None)
        if old is not None and facts.flag("bf16") and true(facts.value("bf16")):
            raise Refused(
                f"line {facts.at('bf16')}: GPU {old.index} ({old.name}) cannot compute in bf16;"
                " lorapatch patch SCRIPT --set bf16=False --set tf32=False --set fp16=True"
            )
        held = [gpu for gpu in visible if gpu.used_B > GIB]
        return False, [f"GPU {gpu.index} already holds {gpu.used_B / GIB:.2f} GiB of other processes" for gpu in held]
    finally:
        gpus.close()


def _check_without_gpu(facts: LaunchFacts, why: str) -> bool:
    """Whether it will run on the CPU; False where there may be an accelerator that cannot be asked."""
    if why.startswith("nvidia-ml-py") or any(Path(path).exists() for path in _OTHER_ACCELERATORS):
        return False
    if _runs_anywhere(facts):
        return True
    wants = [name for name in ("bf16", "fp16", "tf32") if facts.flag(name) and true(facts.value(name))]
    if wants:
        raise Refused(
            f"line {facts.at(wants[0])}: --{wants[0]} wants an NVIDIA GPU and there is none ({why}); run it on a"
            " machine with one, or try it on the CPU with `lorapatch demo DIR`, whose trainer does without"
        )
    return False


def _runs_anywhere(facts: LaunchFacts) -> bool:
    """Whether the trainer is the embedded one, which takes the CPU where there is nothing else."""
    path = facts.trainer_path
    if str(facts.launch.trainer.word).startswith("lorapatch.trainer"):
        return True
    try:
        return path is not None and "lorapatch.trainer" in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _visible(gpus: Sequence[Gpu], launch: Launch, environment: Mapping[str, str]) -> list[Gpu]:
    given = {name: word.value for name, word in launch.environment}
    chosen = given.get("CUDA_VISIBLE_DEVICES") or environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not re.fullmatch(r"[\d, ]+", chosen):
        return list(gpus)
    numbers = {int(number) for number in re.findall(r"\d+", chosen)}
    return [gpu for gpu in gpus if gpu.index in numbers]


def _check_budget(gpus: Sequence[Gpu], budget_B: int | None) -> None:
    smallest = min(gpus, key=lambda gpu: gpu.total_B)
    if budget_B is not None and budget_B > smallest.total_B:
        raise Refused(
            f"a budget of {budget_B / GIB:.2f} GiB is more than GPU {smallest.index} ({smallest.name}) has:"
            f" {smallest.total_B / GIB:.2f} GiB"
        )


def _check_disk(facts: LaunchFacts, output: Path | None) -> None:
    model = facts.value("model_name_or_path")
    folder = facts.find(model) if model else None
    if output is None or folder is None or not folder.is_dir():
        return
    weights = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    # LoRA of rank 64 on every layer of a 2B model, with Adam's moments and a master copy in fp32: some 6 % of it.
    one = max(weights * 6 // 100, 16 << 20) if facts.lora else weights * 7
    limit = facts.value("save_total_limit")
    needed = one * (int(limit) + 2 if limit and limit.isdigit() else 3)
    place = output
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise Refused(
            f"{place} has {free / GIB:.2f} GiB free, the checkpoints may take {needed / GIB:.2f} GiB; free some,"
            f" or give"
            " --output_dir a place on another disk"
        )


def _output(launch: Launch, folder: Path) -> Path | None:
    flag = launch.flag("output_dir")
    return folder / flag.value if flag is not None and flag.value else None
