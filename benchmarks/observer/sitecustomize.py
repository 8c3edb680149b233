"""Put on PYTHONPATH, it makes any trainer say at its end what memory it used, in one JSON line; it changes nothing."""

import atexit
import gc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
import time

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "tokenizers", "numpy")
GPU = int(os.environ.get("LOCAL_RANK", "0"))  # torch's current device is each thread's own


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
        "gpu": torch.cuda.get_device_name(GPU) if cuda else None,
        "peak_allocated_B": torch.cuda.max_memory_allocated(GPU) if cuda else None,
        "peak_reserved_B": torch.cuda.max_memory_reserved(GPU) if cuda else None,
        "device_used_B": max(_most["device"], _device_used() or 0) or None if cuda else None,
        "host_tensors_B": _most["host"] or None,
        "host_pinned_B": _most["pinned"] or None,
        "host_resident_B": _most["resident"] or None,
        "host_peak_B": _status("VmHWM"),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    print(f"\n{json.dumps(line)}\n", end="", flush=True)  # in one piece, as other ranks write here, too


def _watch() -> None:
    """Note what this process has of the GPU while it trains: at its end NCCL may have given its part back."""
    hooked = False
    while True:
        time.sleep(0.5)
        torch = sys.modules.get("torch")
        if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
            _most["device"] = max(_most["device"], _device_used() or 0)
        register = getattr(sys.modules.get("torch.optim.optimizer"), "register_optimizer_step_post_hook", None)
        if register is not None and not hooked:
            register(_note_host)
            hooked = True


_most = {"device": 0, "host": 0, "pinned": 0, "resident": 0}


def _note_host(*_: object) -> None:
    """Note the bytes of the CPU's tensors and their gradients, each storage once.

    The thread that trains calls it behind an optimizer's step: then its states are there, and no activation is, whose end
    the list of all objects would put off.
    """
    storages, pinned = {}, {}
    for found in gc.get_objects():
        if issubclass(type(found), sys.modules["torch"].Tensor):  # isinstance would wake objects that load lazily
            try:
                tensors = (found, found.grad if found.is_leaf else None)
                for tensor in tensors:
                    if tensor is not None and tensor.device.type == "cpu":
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
                        if tensor.is_pinned():
                            pinned[storage.data_ptr()] = storage.nbytes()
            except Exception:  # one without a storage: it has none to count, and the training goes on
                continue
    seen = {"host": sum(storages.values()), "pinned": sum(pinned.values()), "resident": _status("VmRSS") or 0}
    _most.update({name: max(_most[name], size) for name, size in seen.items()})


def _status(name: str) -> int | None:
    """Bytes of memory of whatever kind that this process has (VmRSS), or has had at most (VmHWM)."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))
    except (OSError, StopIteration):
        return None


def _device_used() -> int | None:
    """Bytes of the GPU that this process has now, as NVML counts them by process."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(GPU)
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
