"""What works on this machine and what does not: interpreter, packages, GPUs, compilers, disk, ports."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lorapatch.run.doctor_probes import DEEPSPEED, PEFT, TORCH, VERSIONS, Answer, ask, ask_gpus, run_within
from lorapatch.run.doctor_rules import DRIVERS, IMPORT_ERRORS, misfits

__all__ = ["Finding", "examine"]

State = Literal["ok", "warn", "fail"]

QUICK_S, IMPORT_S = 20.0, 180.0
GIB = 2**30
PORT = 29500  # the rendezvous port of deepspeed and torchrun
_NEEDED = ("torch", "transformers", "peft", "accelerate", "deepspeed")
_OPTIONS = (
    ("use_rslora", "rsLoRA"),
    ("use_dora", "DoRA"),
    ("lora_bias", "LoRA with a bias"),
    ("exclude_modules", "exclude_modules"),
    ("target_parameters", "target_parameters"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the examination. ``remedy`` is what to do, empty where all is well."""

    id: str
    state: State
    sentence: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """In JSON's own types."""
        return asdict(self)


def examine(*, python: str | None = None, script_python: str | None = None) -> list[Finding]:
    """Look at everything a training run needs.

    ``python``: the interpreter to examine, a path or a name on PATH; else ``script_python``, the one a script names;
    else the one that runs lorapatch. Nothing heavy is imported here: each question is asked in a process of its own,
    and one that hangs or dies is a finding, not an error.
    """
    interpreter = _find_interpreter(python or script_python or sys.executable)
    if interpreter is None:
        wanted = python or script_python or sys.executable
        remedy = "give another one with --python, or make its environment again"
        return [
            Finding("python", "fail", f"the interpreter {wanted} is not there or cannot be run", remedy),
            *_machine(),
        ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        versions = pool.submit(ask, interpreter, VERSIONS, QUICK_S)
        gpus = pool.submit(ask_gpus, sys.executable, QUICK_S)
        torch = pool.submit(ask, interpreter, TORCH, IMPORT_S)
        peft = pool.submit(ask, interpreter, PEFT, IMPORT_S)
        deepspeed = pool.submit(ask, interpreter, DEEPSPEED, IMPORT_S)
        return list(_findings(interpreter, versions, gpus, torch, peft, deepspeed))


def _findings(interpreter: str, *answers: Future[Answer]) -> Iterator[Finding]:
    versions, gpus, torch, peft, deepspeed = (answer.result() for answer in answers)
    if versions.data is None:
        sentence = f"{interpreter} does not answer: {versions.error}"
        yield Finding("python", "fail", sentence, "give another interpreter with --python")
        yield from _gpus(gpus, None)
        yield from _machine()
        return
    found = versions.data["versions"]
    yield Finding("python", "ok", f"Python {versions.data['python']}, {versions.data['executable']}")
    yield from _packages(found)
    yield from _fit(versions.data)
    if "torch" in found:
        yield _torch(torch)
    if "peft" in found:
        yield from _peft(peft)
    if "deepspeed" in found:
        yield _deepspeed(deepspeed)
    yield from _launcher(interpreter)
    yield from _gpus(gpus, torch.data)
    yield from _compilers(interpreter, torch.data)
    yield from _machine()


def _find_interpreter(name: str) -> str | None:
    found = shutil.which(os.path.expanduser(name))
    return os.path.abspath(found) if found else None


# -- packages --------------------------------------------------------------------------------------------------------


def _packages(found: dict[str, str]) -> Iterator[Finding]:
    for name in _NEEDED:
        if name in found:
            yield Finding(name, "ok", f"{name} {found[name]}")
        else:
            yield Finding(name, "fail", f"{name} is not installed", f"pip install {name}")
    if "bitsandbytes" in found:
        yield Finding("bitsandbytes", "ok", f"bitsandbytes {found['bitsandbytes']}")
    else:
        sentence = "bitsandbytes is not installed: --bits 8 and 4 will not work"
        yield Finding("bitsandbytes", "warn", sentence, "pip install bitsandbytes, if you want them")


def _fit(data: dict[str, Any]) -> Iterator[Finding]:
    try:
        wrong = list(misfits(data["versions"], data["requires"], data["minimum"]))
    except ModuleNotFoundError:  # the patching half brings no `packaging`, every training environment has it
        yield Finding("versions", "warn", "the versions were not compared", "pip install packaging beside lorapatch")
        return
    if not wrong and len(data["versions"]) > 1:
        yield Finding("versions", "ok", "the installed versions fit each other")
    for misfit in wrong:
        state: State = "fail" if misfit.fails else "warn"
        yield Finding(f"versions-{misfit.name}", state, f"{misfit.sentence} ({misfit.source})", misfit.remedy)


def _torch(answer: Answer) -> Finding:
    if answer.data is None:
        return _import_failed("torch-import", "import torch", answer.error)
    if answer.data["cuda"]:
        devices = len(answer.data["devices"])
        if answer.data["available"]:
            return Finding(
                "torch-cuda", "ok", f"torch was built for CUDA {answer.data['cuda']} and sees {devices} GPU(s)"
            )
        sentence = f"torch was built for CUDA {answer.data['cuda']} but sees no GPU"
        return Finding("torch-cuda", "warn", sentence, "check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES")
    if answer.data["hip"]:
        return Finding("torch-cuda", "ok", f"torch was built for ROCm {answer.data['hip']}")
    return Finding(
        "torch-cuda", "warn", "torch is a CPU build: training runs on the CPU", "install a CUDA build of torch"
    )


def _peft(answer: Answer) -> Iterator[Finding]:
    statement = "from peft import LoraConfig, get_peft_model"
    if answer.data is None:
        yield _import_failed("peft-import", statement, answer.error)
        return
    yield Finding("peft-import", "ok", f"`{statement}` works")
    fields = answer.data["fields"]
    has = {label: name in fields for name, label in _OPTIONS}
    has |= {"PiSSA": answer.data["pissa"], "all-linear": answer.data["all_linear"]}
    there = ", ".join(label for label, present in has.items() if present) or "nothing beyond plain LoRA"
    missing = ", ".join(label for label, present in has.items() if not present)
    sentence = f"this peft has {there}" + (f"; it lacks {missing}" if missing else "")
    essential = has["rsLoRA"] and has["DoRA"] and has["PiSSA"] and has["all-linear"]
    yield Finding(
        "peft-options", "ok" if essential else "warn", sentence, "" if essential else "pip install --upgrade peft"
    )


def _deepspeed(answer: Answer) -> Finding:
    if answer.data is None:
        return _import_failed("deepspeed-import", "import deepspeed", answer.error)
    return Finding("deepspeed-import", "ok", f"`import deepspeed` works, accelerator {answer.data['accelerator']}")


def _import_failed(name: str, statement: str, error: str) -> Finding:
    known = next(((remedy, source) for text, remedy, source in IMPORT_ERRORS if text in error), None)
    remedy = (
        f"{known[0]} ({known[1]})" if known else f"run it by hand to see all of the message: python -c '{statement}'"
    )
    return Finding(name, "fail", f"`{statement}` fails: {error}", remedy)


def _launcher(interpreter: str) -> Iterator[Finding]:
    """The ``deepspeed`` that a script would find on PATH, and the Python behind it."""
    launcher = shutil.which("deepspeed")
    beside = Path(interpreter).parent / "deepspeed"
    if launcher is None:
        if beside.is_file():
            sentence = f"`deepspeed` is not on PATH, only at {beside}"
            yield Finding("launcher", "warn", sentence, f"export PATH={beside.parent}:$PATH")
        return
    first_line = _first_line(Path(launcher))
    behind = first_line[2:].strip().split(" ")[0] if first_line.startswith("#!") else ""
    if behind.startswith("/") and not behind.endswith(("sh", "env")) and not _same(behind, interpreter):
        sentence = f"`deepspeed` on PATH is {launcher}, which runs {behind}, not {interpreter}"
        remedy = f"activate the environment of {interpreter}, or examine the other with --python {behind}"
        yield Finding("launcher", "warn", sentence, remedy)
        return
    yield Finding("launcher", "ok", f"`deepspeed` on PATH is {launcher}")


def _first_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.readline(500).decode(errors="replace")
    except OSError:
        return ""


def _same(one: str, other: str) -> bool:
    """The same environment: symlinks of one folder count, two environments made from one Python do not."""
    return Path(one).parent == Path(other).parent or (os.path.abspath(one) == os.path.abspath(other))


# -- GPUs and compilers ----------------------------------------------------------------------------------------------


def _gpus(answer: Answer, torch: dict[str, Any] | None) -> Iterator[Finding]:
    data = answer.data
    if data is None or not data["gpus"]:
        reason = data["why_none"] or "the driver knows of no GPU" if data else answer.error
        missing = "pip install" in reason
        remedy = (
            "pip install nvidia-ml-py"
            if missing
            else "use a machine with an NVIDIA GPU: on the CPU only small models train"
        )
        yield Finding("nvml", "warn", f"no GPU memory can be read: {reason}", remedy)
        return
    yield Finding("nvml", "ok", f"NVML answers for {len(data['gpus'])} GPU(s)")
    yield _driver(data["driver"], torch)
    devices = torch["devices"] if torch else []
    for gpu in data["gpus"]:
        capability = tuple(devices[gpu["index"]]["capability"]) if gpu["index"] < len(devices) else None
        yield _gpu(gpu, capability, torch["architectures"] if torch else [])


def _driver(driver: str, torch: dict[str, Any] | None) -> Finding:
    cuda = torch["cuda"] if torch else None
    needed = DRIVERS.get(int(cuda.split(".")[0])) if cuda else None
    if needed and int(driver.split(".")[0]) < needed:
        sentence = f"driver {driver} is too old for torch's CUDA {cuda}, which needs {needed} or newer"
        return Finding(
            "driver", "fail", sentence, f"update the driver, or install a torch built for an older CUDA than {cuda}"
        )
    return Finding("driver", "ok", f"driver {driver}")


def _gpu(gpu: dict[str, Any], capability: tuple[int, ...] | None, architectures: Sequence[str]) -> Finding:
    name = f"gpu-{gpu['index']}"
    free = gpu["total"] - gpu["used"]
    sentence = f"GPU {gpu['index']}: {gpu['name']}, {free / GIB:.1f} of {gpu['total'] / GIB:.1f} GiB free"
    if capability:
        sentence += f", compute capability {capability[0]}.{capability[1]}"
        if architectures and not _is_built_for(capability, architectures):
            return Finding(name, "fail", f"{sentence}: torch has no code for it", "install a torch built for this GPU")
    if gpu["bf16"] is False:
        return Finding(name, "warn", f"{sentence}: no bf16, no TF32", "use --fp16 True, --bf16 False, --tf32 False")
    if gpu["used"] > gpu["total"] / 10:
        remedy = "end what else runs on it (nvidia-smi), or choose another with CUDA_VISIBLE_DEVICES"
        return Finding(name, "warn", f"{sentence}: somebody else uses it", remedy)
    return Finding(name, "ok", sentence)


def _is_built_for(capability: tuple[int, ...], architectures: Sequence[str]) -> bool:
    """Code for the same major version and no newer minor runs, and so does any older PTX (``compute_``)."""
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", architecture)
        if match:
            major, minor = int(match[2]), int(match[3])
            if match[1] == "compute" and (major, minor) <= capability:
                return True
            if major == capability[0] and minor <= capability[1]:
                return True
    return False


def _compilers(interpreter: str, torch: dict[str, Any] | None) -> Iterator[Finding]:
    """What DeepSpeed compiles its operators with, at the first run."""
    yield _tool("g++", "g++", "apt install g++ (DeepSpeed compiles its CPU operators at the first run)")
    beside = Path(interpreter).parent / "ninja"
    if shutil.which("ninja") is None and beside.is_file():
        yield Finding("ninja", "warn", f"ninja is not on PATH, only at {beside}", f"export PATH={beside.parent}:$PATH")
    else:
        yield _tool("ninja", "ninja", "pip install ninja (DeepSpeed builds its operators with it)")
    cuda = torch["cuda"] if torch else None
    if not cuda:
        here = shutil.which("nvcc")
        why = "torch is not a CUDA build" if torch else "there is no torch to compile for"
        yield Finding("nvcc", "ok", f"nvcc is {'at ' + here if here else 'not there'} and not needed: {why}")
        return
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        there = Path(home, "bin", "nvcc").is_file()
        remedy = "" if there else "point CUDA_HOME at a CUDA toolkit, or unset it"
        yield Finding(
            "cuda-home", "ok" if there else "warn", f"CUDA_HOME is {home}" + ("" if there else ", without nvcc"), remedy
        )
    yield _nvcc(home, cuda)


def _nvcc(home: str | None, cuda: str) -> Finding:
    nvcc = shutil.which(
        "nvcc",
        path=os.pathsep.join(filter(None, [home and f"{home}/bin", os.environ.get("PATH"), "/usr/local/cuda/bin"])),
    )
    if nvcc is None:
        sentence = "nvcc is not there: DeepSpeed cannot compile its CUDA operators (FusedAdam, CPUAdam for offload)"
        remedy = f"install the CUDA {cuda} toolkit, or keep the optimizer on the GPU with --optim adamw_torch"
        return Finding("nvcc", "warn", sentence, remedy)
    match = re.search(r"release (\d+)\.(\d+)", _output([nvcc, "--version"]))
    if match is None:
        return Finding("nvcc", "warn", f"{nvcc} does not say its version", "reinstall the CUDA toolkit")
    version = f"{match[1]}.{match[2]}"
    if match[1] != cuda.split(".")[0]:
        sentence = (
            f"nvcc is {version}, torch is built for CUDA {cuda}: DeepSpeed will not compile (op_builder/builder.py)"
        )
        return Finding(
            "nvcc", "fail", sentence, f"install the CUDA {cuda} toolkit and set CUDA_HOME, or set DS_SKIP_CUDA_CHECK=1"
        )
    return Finding("nvcc", "ok", f"nvcc {version} at {nvcc}")


def _tool(name: str, program: str, remedy: str) -> Finding:
    found = shutil.which(program)
    if found is None:
        return Finding(name, "warn", f"{program} is not on PATH", remedy)
    version = _output([found, "--version"]).splitlines()
    if not version:
        return Finding(name, "warn", f"{found} does not run", remedy)
    return Finding(name, "ok", f"{program}: {version[0]}")


def _output(command: Sequence[str]) -> str:
    try:
        done = run_within(QUICK_S, command)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


# -- the machine -----------------------------------------------------------------------------------------------------


def _machine() -> Iterator[Finding]:
    yield _disk("disk", Path.cwd(), warn_below=20 * GIB, fail_below=2 * GIB, use="checkpoints")
    if Path("/dev/shm").is_dir():
        yield _disk("shared-memory", Path("/dev/shm"), warn_below=GIB // 2, fail_below=0, use="data-loader workers")
    yield _port(PORT)


def _disk(name: str, folder: Path, *, warn_below: int, fail_below: int, use: str) -> Finding:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(name, "warn", f"{folder}: the free space cannot be read ({error.strerror})", "look with df -h")
    sentence = f"{free / GIB:.1f} GiB free at {folder} for {use}"
    if free >= warn_below:
        return Finding(name, "ok", sentence)
    remedy = (
        "docker run --shm-size=8g, or --dataloader_num_workers 0"
        if name == "shared-memory"
        else "make room, or set --output_dir elsewhere"
    )
    return Finding(name, "fail" if free < fail_below else "warn", f"{sentence}: little", remedy)


def _port(port: int) -> Finding:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            sentence = f"port {port}, which deepspeed and torchrun meet at, is taken"
            return Finding(
                "port", "warn", sentence, "give --master_port another number: another training may be running"
            )
    return Finding("port", "ok", f"port {port} is free")
