"""Questions asked of a Python interpreter, each in a process of its own and under a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["DEEPSPEED", "PACKAGES", "PEFT", "TORCH", "VERSIONS", "Answer", "ask", "ask_gpus",
           "run_within"]  # fmt: skip

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "numpy", "tokenizers",
            "safetensors", "huggingface_hub")  # fmt: skip
# The last line that starts with it is the answer: libraries print what they like before and after.
_MARK = "lorapatch-answer:"

# Without importing any of the packages: their metadata, and the versions that transformers asks of the others, which
# it keeps as constants in its files. Runs on every Python from 3.8 on.
VERSIONS = f"""
import importlib.metadata as metadata, importlib.util as util, json, os, re, sys
found, wants, minimum = {{}}, {{}}, {{}}
for name in {PACKAGES!r}:
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        continue
    found[name] = distribution.version
    wants[name] = distribution.requires or []
spec = util.find_spec("transformers")
if spec and spec.origin:
    folder = os.path.dirname(spec.origin)
    for file, pattern in (("utils/import_utils.py", "([A-Z]+)_MIN_VERSION = .([0-9.]+)"),
                          ("integrations/peft.py", "MIN_(PEFT)_VERSION = .([0-9.]+)")):
        try:
            with open(os.path.join(folder, file), encoding="utf-8") as text:
                minimum.update((k.lower(), v) for k, v in re.findall(pattern, text.read()))
        except OSError:
            pass
print("{_MARK}" + json.dumps({{"python": "%d.%d.%d" % sys.version_info[:3], "executable": sys.executable,
    "prefix": sys.prefix, "versions": found, "requires": wants, "minimum": minimum}}))
"""

PEFT = f"""
import json
from peft import LoraConfig, get_peft_model
import dataclasses, sys
config = sys.modules[LoraConfig.__module__].__file__
with open(config, encoding="utf-8") as text:
    source = text.read()
fields = [field.name for field in dataclasses.fields(LoraConfig)]
print("{_MARK}" + json.dumps({{"fields": fields, "pissa": "pissa" in source, "all_linear": "all-linear" in source}}))
"""

TORCH = f"""
import json, torch
devices = []
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        capability = list(torch.cuda.get_device_capability(i))
        devices.append({{"name": torch.cuda.get_device_name(i), "capability": capability}})
print("{_MARK}" + json.dumps({{"cuda": torch.version.cuda, "hip": getattr(torch.version, "hip", None),
    "available": torch.cuda.is_available(), "devices": devices,
    "architectures": torch.cuda.get_arch_list() if torch.cuda.is_available() else []}}))
"""

DEEPSPEED = f"""
import json, deepspeed
from deepspeed.accelerator import get_accelerator
print("{_MARK}" + json.dumps({{"accelerator": get_accelerator().device_name()}}))
"""

_GPUS = f"""
import json
from lorapatch.run.gpus import Gpus
gpus = Gpus()
print("{_MARK}" + json.dumps({{"why_none": gpus.why_none, "driver": gpus.driver, "gpus": [
    {{"index": gpu.index, "name": gpu.name, "used": gpu.used_B, "total": gpu.total_B,
      "bf16": gpus.supports_bf16(gpu.index)}} for gpu in gpus.memory()]}}))
"""


@dataclass(frozen=True)
class Answer:
    """``data`` of a probe that worked; otherwise None, and ``error`` is the last line it said."""

    data: dict[str, Any] | None
    error: str = ""


def run_within(timeout: float, command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end, or end it after ``timeout`` seconds with all that it has started, which else would
    keep its output open. Raises OSError, subprocess.TimeoutExpired.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def ask(python: str, program: str, timeout: float) -> Answer:
    """Run a probe under an interpreter; never raises. ``timeout`` in seconds."""
    try:
        done = run_within(timeout, [python, "-c", program])
    except subprocess.TimeoutExpired:
        return Answer(None, f"no answer within {timeout:g} s")
    except OSError as error:
        return Answer(None, error.strerror or str(error))
    output = done.stdout.decode(errors="replace")
    for line in reversed(output.splitlines()):
        if line.startswith(_MARK):
            return _read(line[len(_MARK) :])
    said = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    return Answer(None, said[-1] if said else f"it ended with status {done.returncode} and said nothing")


def ask_gpus(python: str, timeout: float) -> Answer:
    """The GPUs by the driver, in a process of its own since a broken driver can hang. ``python`` is lorapatch's own."""
    return ask(python, _GPUS, timeout)


def _read(text: str) -> Answer:
    try:
        data = json.loads(text)
    except ValueError:
        return Answer(None, "its answer cannot be read")
    return Answer(data) if isinstance(data, dict) else Answer(None, "its answer cannot be read")
