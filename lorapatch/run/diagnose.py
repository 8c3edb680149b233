"""From a failed run's log, exit code and numbers to the cause in a sentence and the command that helps."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from lorapatch.run.symptoms import SYMPTOMS, Symptom

__all__ = ["Diagnosis", "Evidence", "diagnose", "is_exploding"]


@dataclass(frozen=True)
class Diagnosis:
    """What went wrong: the row's ``id``, the cause, a command that helps, the line or number that shows it.

    ``figures`` are the bytes that an out-of-memory message names: wanted_B, free_B, total_B, allocated_B.
    """

    id: str
    cause: str
    remedy: str
    evidence: str = ""
    figures: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """What is known about a run that ended. ``flags`` are the launch's, without dashes; ``losses`` in order.

    ``adapter_problems`` (a finding's id to its sentence) and ``adapter_modules`` come from its files,
    ``lora_parameters`` from the trainer (None: unknown). ``reached_end``: False when the last step was not reached
    though the exit code is 0. ``passed``: no line of the verdict fails, so what the log warns of has done no harm.
    """

    log: str
    exit_code: int
    state: str = "failed"
    kind: str = "full"
    script: str = "SCRIPT"
    python: str = "python"
    flags: Mapping[str, str] = field(default_factory=dict)
    losses: Sequence[float] = ()
    adapter_problems: Mapping[str, str] = field(default_factory=dict)
    adapter_modules: Sequence[str] = ()
    lora_parameters: int | None = None
    reached_end: bool = True
    passed: bool = False
    reason: str = ""
    budget_B: int | None = None


# What to install for a module whose package has another name.
_PACKAGES = {
    "PIL": "pillow", "cv2": "opencv-python", "sklearn": "scikit-learn", "yaml": "pyyaml", "google": "protobuf",
    "open_clip": "open-clip-torch", "skimage": "scikit-image", "bs4": "beautifulsoup4",
}  # fmt: skip
_SIGNALS = {4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 11: "SIGSEGV"}
_UNITS = {
    "bytes": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "KB": 1 << 10,
    "MB": 1 << 20,
    "GB": 1 << 30,
}
_SIZE = r"([\d.]+) (bytes|[KMGT]i?B)"
_OOM = re.compile(
    r"(?:CUDA|HIP|XPU|NPU) out of memory\.?[^\n]*(?:\n(?!\s*File|Traceback)[^\n]*){0,2}|CUBLAS_STATUS_ALLOC_FAILED"
)
_OOM_FIGURES = {
    "wanted_B": (rf"Tried to allocate {_SIZE}",),
    "total_B": (rf"total capacity of {_SIZE}", rf"{_SIZE} total capacity"),
    "free_B": (rf"of which {_SIZE} is free", rf"{_SIZE} free"),
    "allocated_B": (rf"{_SIZE} is allocated by PyTorch", rf"{_SIZE} already allocated"),
    "idle_B": (rf"{_SIZE} is reserved by PyTorch but unallocated",),
    "others_B": (rf"Process \d+ has {_SIZE} memory in use",),
}
_HOST_OOM = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory): you tried to allocate (?P<bytes>\d+) bytes|"
    r"return code = -9\b|Signal 9 \(SIGKILL\)|exitcode\s*: -9\b|^MemoryError|Cannot allocate"
    r" memory|\bKilled\b|oom-kill",
    re.MULTILINE,
)
_RETURN_CODE = re.compile(r"return code = -(\d+)\b|Signal (\d+) \(SIG|exitcode\s*: -(\d+)\b")
_ERROR_LINE = re.compile(
    r"^(?:\[rank\d+\]: )?((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b[^\n]*)$", re.MULTILINE
)


def diagnose(run: Evidence) -> Diagnosis | None:
    """Why ``run`` failed, or what is wrong with one that ended well; None when nothing is.

    The text of an error counts before the exit code, and both before what the numbers say.
    """
    failed = run.exit_code != 0 or not run.reached_end or run.state != "finished"
    again = _again(run)
    if run.state == "interrupted":
        return Diagnosis("interrupted", f"The run was ended from outside ({run.reason or 'a signal'}).", again)
    if run.state == "timeout":
        return Diagnosis("timeout", f"The run was ended at its time limit ({run.reason}).", again)
    found = _out_of_memory(run) if failed else None
    found = found or _from_table(
        run, [row for row in SYMPTOMS if not row.last and (failed or (row.always and not run.passed))]
    )
    if found is None and failed:
        found = _host_memory(run) or _signal(run) or _from_table(run, [row for row in SYMPTOMS if row.last])
    return found or _from_numbers(run) or _from_adapter(run) or (_unknown(run) if failed else None)


def _again(run: Evidence) -> str:
    """The command that goes on, or begins again. Probes and tuning runs are parts of a tuning, which needs its budget."""
    if run.kind in ("probe", "tune"):
        budget = f" --budget {run.budget_B}" if run.budget_B else ""
        return f"lorapatch tune {_q(run.script)}{budget} --resume"
    return f"lorapatch {run.kind} {_q(run.script)}" + (" --resume" if run.kind == "full" else "")


def _from_table(run: Evidence, rows: Iterable[Symptom]) -> Diagnosis | None:
    for row in rows:
        match = row.pattern.search(run.log)
        if match is not None:
            words = _words(run, match)
            return Diagnosis(
                row.id, row.cause.format_map(words), row.remedy.format_map(words), _line_at(run.log, match.start())
            )
    return None


def _words(run: Evidence, match: re.Match[str]) -> dict[str, str]:
    """What the sentences may name; a path is what any of a row's alternatives found."""
    groups = {name: (value or "").strip() for name, value in match.groupdict().items()}
    path = next((groups[name] for name in ("path", "file", "repo", "id", "folder", "model") if groups.get(name)), "")
    module = groups.get("module", "").split(".")[0]
    zero2 = _q(_zero2(run.flags.get("deepspeed", "zero2.json")))
    port = re.search(r"port[:=]? ?(\d{2,5})|[\]\d]:(\d{2,5})\b", _line_at(run.log, match.start()))
    return {
        **groups,
        "path": path or "the log does not say which",
        "package": _PACKAGES.get(module, module.replace("_", "-")),
        "port": f" {port[1] or port[2]}" if port else "",
        "script": _q(run.script),
        "python": _q(run.python),
        "output_dir": _q(run.flags.get("output_dir", "OUTPUT_DIR")),
        "images": _q(run.flags.get("image_folder", "IMAGE_FOLDER")),
        "zero2": zero2,
        "and_zero2": f" --set deepspeed={zero2}" if "deepspeed" in run.flags else "",
    }


def _zero2(path: str) -> str:
    """The ZeRO-2 configuration that stands beside ``path``."""
    name = re.sub(r"zero[-_]?3", "zero2", Path(path).name, flags=re.IGNORECASE)
    return str(Path(path).with_name(name.replace("_offload", "")))


def _out_of_memory(run: Evidence) -> Diagnosis | None:
    match = _OOM.search(run.log)
    if match is None:
        return None
    figures = {}
    for name, patterns in _OOM_FIGURES.items():
        size = next((found for pattern in patterns if (found := re.search(pattern, match[0]))), None)
        if size is not None:
            figures[name] = round(float(size[1]) * _UNITS[size[2]])
    shown = {name: f"{figures[name] / (1 << 30):.2f} GiB" for name in figures}
    cause = "The GPU's memory is full"
    if "wanted_B" in figures:
        cause += f": {shown['wanted_B']} more were wanted" + (
            f", {shown['free_B']} were free" if "free_B" in figures else ""
        )
    cause += f", of {shown['total_B']} in all." if "total_B" in figures else "."
    budget = f"{math.floor(figures['total_B'] / (1 << 30) * 10) / 10:g}GiB" if "total_B" in figures else "24GiB"
    remedy = f"lorapatch tune {_q(run.script)} --budget {budget}"
    if figures.get("others_B", 0) > 1 << 30:
        cause += f" Another process holds {shown['others_B']} of it."
        remedy = "nvidia-smi   # end the other process, or take another GPU: CUDA_VISIBLE_DEVICES=…"
    elif figures.get("idle_B", 0) > figures.get("wanted_B", 1 << 62):
        cause += f" {shown['idle_B']} are reserved but in pieces too small."
        remedy = f"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True lorapatch smoke {_q(run.script)}"
    return Diagnosis("cuda-oom", cause, remedy, _line_at(run.log, match.start()), figures)


def _host_memory(run: Evidence) -> Diagnosis | None:
    match = _HOST_OOM.search(run.log)
    if match is None and run.exit_code not in (137, 247):  # 128 + 9, and DeepSpeed's sys.exit(-9)
        return None
    figures = {"wanted_B": int(match["bytes"])} if match and match["bytes"] else {}
    config = run.flags.get("deepspeed", "")
    cause = "The machine ran out of RAM (host memory, not the GPU's), and the kernel ended the training (-9)."
    remedy = f"lorapatch patch {_q(run.script)} --set dataloader_num_workers=0"
    if "offload" in config:
        cause += (
            f" {Path(config).name} keeps the optimizer's states there, which LoRA does not need: they are megabytes."
        )
        remedy = f"lorapatch patch {_q(run.script)} --set deepspeed={_q(config.replace('_offload', ''))}"
    evidence = _line_at(run.log, match.start()) if match else f"exit code {run.exit_code}"
    return Diagnosis("host-oom", cause, remedy, evidence, figures)


def _signal(run: Evidence) -> Diagnosis | None:
    match = _RETURN_CODE.search(run.log)
    number = int(next(group for group in match.groups() if group)) if match else run.exit_code - 128
    if number not in _SIGNALS:
        return None
    cause = f"The trainer crashed in compiled code ({_SIGNALS[number]})"
    if number == 4:
        cause += ": an operation was compiled for another processor"
    evidence = _line_at(run.log, match.start()) if match else f"exit code {run.exit_code}"
    return Diagnosis("crash", cause + ".", "rm -rf ~/.cache/torch_extensions && lorapatch doctor", evidence)


def is_exploding(losses: Sequence[float]) -> bool:
    """Whether the last third of the losses lies more than twice, and more than 1, above the first third."""
    if len(losses) < 2:
        return False
    third = max(1, len(losses) // 3)
    first, last = median(losses[:third]), median(losses[-third:])
    return last > 2 * first and last > first + 1


def _from_numbers(run: Evidence) -> Diagnosis | None:
    losses = run.losses
    script = _q(run.script)
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        evidence = f"the loss of logged step {bad + 1} is {losses[bad]}"
        if run.flags.get("fp16", "").lower() == "true":
            cause = "The loss is no number any more: fp16 has overflowed."
            return Diagnosis("nan-loss", cause, f"lorapatch patch {script} --set fp16=False --set bf16=True", evidence)
        cause = "The loss is no number any more: the learning rate is too high, or a sample has no label left."
        return Diagnosis("nan-loss", cause, f"lorapatch patch {script} --learning-rate {_tenth(run)}", evidence)
    if losses and not any(losses):
        cause = (
            "The loss is exactly 0: no label is left (the conversation template does not fit, or"
            " model_max_length cuts them off)."
        )
        return Diagnosis("zero-loss", cause, f"lorapatch inspect {script}", f"{len(losses)} logged losses, all 0")
    if is_exploding(losses):
        cause = f"The loss explodes, from {losses[0]:.3g} to {losses[-1]:.3g}: the learning rate is too high."
        return Diagnosis(
            "exploding-loss", cause, f"lorapatch patch {script} --learning-rate {_tenth(run)}", _shown(losses)
        )
    return _flat(run)


def _flat(run: Evidence) -> Diagnosis | None:
    """Noise hides a slow fall in a few steps: it takes 30, and a learning rate of full tuning."""
    losses = run.losses
    rate = _learning_rate(run)
    third = len(losses) // 3
    if len(losses) < 30 or rate is None or rate > 5e-5 or run.lora_parameters == 0:
        return None
    first, last = losses[:third], losses[-third:]
    noise = median(abs(loss - median(losses)) for loss in losses)
    if median(first) - median(last) > noise / 2:
        return None
    cause = f"The loss does not fall: {rate:g} is a learning rate for full tuning, LoRA wants about ten times that."
    return Diagnosis(
        "flat-loss", cause, f"lorapatch patch {_q(run.script)} --learning-rate {rate * 10:g}", _shown(losses)
    )


def _from_adapter(run: Evidence) -> Diagnosis | None:
    script = _q(run.script)
    if run.lora_parameters == 0:
        cause = "The model has no LoRA parameter: the flags stand on another stage, or the trainer ignores them."
        return Diagnosis("no-lora", cause, f"lorapatch check {script}", "LoRA parameters: 0")
    if problem := run.adapter_problems.get("empty"):
        zero2 = _q(_zero2(run.flags.get("deepspeed", "zero2.json")))
        cause = "The saved adapter is empty: ZeRO-3's shards were not gathered."
        return Diagnosis("empty-adapter", cause, f"lorapatch patch {script} --set deepspeed={zero2}", problem)
    if problem := run.adapter_problems.get("moved"):
        cause = (
            "LoRA was not trained: no gradient reached it (enable_input_require_grads is missing), or it was frozen."
        )
        return Diagnosis("untrained-lora", cause, f"lorapatch patch {script} --mode attach", problem)
    vision = [
        module for module in run.adapter_modules if re.search(r"vision|clip|convnext|visual", module, re.IGNORECASE)
    ]
    if vision:
        cause = "LoRA also went into the vision tower, whose layers have the same names as the language model's."
        remedy = f"lorapatch patch {script} --mode attach --target-modules q_proj,v_proj,o_proj"
        return Diagnosis("lora-on-vision", cause, remedy, f"{len(vision)} modules, such as {vision[0]}")
    return None


def _unknown(run: Evidence) -> Diagnosis:
    errors = _ERROR_LINE.findall(run.log)
    last = next((line for line in reversed(run.log.splitlines()) if line.strip()), "")
    if run.exit_code == 0:
        cause = "The exit code is 0, but the last step was not reached: the launcher hid how its trainer ended."
        return Diagnosis("not-finished", cause, f"lorapatch smoke {_q(run.script)}", errors[-1] if errors else last)
    # The first error is the cause of those that follow it.
    cause = (
        f"The training failed: {errors[0]}"
        if errors
        else f"The training ended with exit code {run.exit_code}; its last line stands below."
    )
    return Diagnosis("unknown", cause, "lorapatch doctor", errors[0] if errors else last)


def _learning_rate(run: Evidence) -> float | None:
    try:
        return float(run.flags.get("learning_rate", ""))
    except ValueError:
        return None


def _tenth(run: Evidence) -> str:
    rate = _learning_rate(run)
    return f"{rate / 10:g}" if rate else "2e-5"


def _shown(losses: Sequence[float]) -> str:
    return "losses " + " ".join(f"{loss:.3g}" for loss in (*losses[:3], *losses[-3:]))


def _line_at(log: str, position: int) -> str:
    start = log.rfind("\n", 0, position) + 1
    end = log.find("\n", position)
    return log[start : end if end >= 0 else len(log)].strip()[:400]


def _q(text: str) -> str:
    return shlex.quote(text)
