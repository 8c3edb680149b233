"""The bytes of a run, found by training it on fake tensors under the interpreter and the libraries that it will use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lorapatch.errors import Refused
from lorapatch.memory.model import Breakdown, RunSetup
from lorapatch.memory.trace.exchange import breakdown_from, setup_to

__all__ = ["COMPUTE_CAPABILITY", "trace"]

# NVIDIA, "CUDA GPU Compute Capability": what libraries choose their workspaces by.
COMPUTE_CAPABILITY = {
    "V100": 70, "T4": 75, "A100": 80, "A800": 80, "A30": 80, "A10": 86, "A40": 86, "3090": 86, "A6000": 86,
    "4090": 89, "L4": 89, "L40": 89, "L40S": 89, "H100": 90, "H200": 90, "H800": 90, "H20": 90, "GH200": 90,
    "B200": 100, "5090": 120,
}  # fmt: skip
_PACKAGE_ROOT = Path(__file__).resolve().parents[3]


def trace(
    setup: RunSetup,
    *,
    python: str | None = None,
    timeout_s: float = 600,
    gpu: str = "H200",
    capacity: int | None = None,
) -> Breakdown:
    """Trace two optimizer steps of ``setup`` with the libraries of ``python`` (this interpreter's without it).

    No weights are read and no GPU is touched. ``gpu`` names the card as in COMPUTE_CAPABILITY (an unknown one counts as
    an A100), ``capacity`` is what the allocator may reserve of it in bytes (None: as much as it likes). Raises Refused with
    one sentence: no such interpreter, a library that it lacks, a model that cannot be built, or more than ``timeout_s``
    seconds.
    """
    interpreter = python or sys.executable
    question = {"setup": setup_to(setup), "architecture": COMPUTE_CAPABILITY.get(gpu, 80), "capacity": capacity}
    try:
        ended = subprocess.run(
            [interpreter, "-m", __name__], input=json.dumps(question), capture_output=True, text=True,
            env=_environment(), timeout=timeout_s, check=False,
        )  # fmt: skip
    except OSError as error:
        raise Refused(f"{interpreter} cannot be run ({error.strerror}): --python names the run's interpreter") from error
    except subprocess.TimeoutExpired as error:
        raise Refused(f"the trace of {setup.model} took longer than {timeout_s:g} s and was stopped") from error
    answer = _answer(ended.stdout)
    if answer is None:
        said = ended.stderr.strip().splitlines()
        reason = said[-1] if said else f"exit code {ended.returncode}"
        raise Refused(f"the trace of {setup.model} under {interpreter} ended without an answer: {reason}")
    if "refused" in answer:
        raise Refused(answer["refused"])
    return breakdown_from(answer["breakdown"])


def _answer(text: str) -> dict[str, Any] | None:
    """The JSON document on the last line, None if there is none."""
    try:
        found = json.loads(text.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _environment() -> dict[str, str]:
    """No GPU, no network, as many threads as there are cores; this package, wherever it is installed."""
    path = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
