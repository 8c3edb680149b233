"""Put on PYTHONPATH, it makes any trainer say at its end what memory it used, in one JSON line; it changes nothing."""

import atexit
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
import time

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "tokenizers", "numpy")


def _run_hidden() -> None:
    """The sitecustomize that this one stands before."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [folder for folder in sys.path if os.path.abspath(folder) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _say() -> None:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    cuda = torch.cuda.is_initialized()
    line = {
        "lorapatch": "observer",
        "rank": os.environ.get("RANK", "0"),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "peak_allocated_B": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_reserved_B": torch.cuda.max_memory_reserved() if cuda else None,
        "device_used_B": max(_most[0], _device_used() or 0) or None if cuda else None,
        "versions": {name: _version(name) for name in PACKAGES},
    }
    print("\n" + json.dumps(line), flush=True)


def _watch() -> None:
    """Note what this process has of the GPU while it trains: at its end NCCL may have given its part back."""
    while True:
        time.sleep(0.5)
        torch = sys.modules.get("torch")
        if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
            _most[0] = max(_most[0], _device_used() or 0)


_most = [0]


def _device_used() -> int | None:
    """Bytes of the GPU that this process has now, as NVML counts them by process."""
    torch = sys.modules["torch"]
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        mine = [p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
    except (ImportError, pynvml.NVMLError):
        return None
    return mine[0] if mine and mine[0] else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


_run_hidden()
if os.environ.keys() & {"RANK", "OBSERVE_PYTHON"}:  # a trainer, not its launcher
    atexit.register(_say)
    threading.Thread(target=_watch, name="observer", daemon=True).start()
