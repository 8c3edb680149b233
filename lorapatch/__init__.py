"""Turn a full fine-tuning launch script into a LoRA run that fits the GPU, and prove it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorapatch.errors import LorapatchError, Refused, RunFailed, UsageError
    from lorapatch.launch import Flag, Launch, Script, Stage, read_script
    from lorapatch.lora import PRESETS, Patch, PatchOptions, plan_patch
    from lorapatch.lora.patch import Patched, patch_script
    from lorapatch.memory.estimate import estimate
    from lorapatch.memory.model import Estimate
    from lorapatch.shell.files import restore

__version__ = "0.1.0"

# Where each public name lives. Loaded on first use, so that `import lorapatch` costs nothing.
_HOMES = {
    "errors": ("LorapatchError", "Refused", "RunFailed", "UsageError"),
    "launch": ("Flag", "Launch", "Script", "Stage", "read_script"),
    "lora": ("PRESETS", "Patch", "PatchOptions", "plan_patch"),
    "lora.patch": ("Patched", "patch_script"),
    "memory.estimate": ("estimate",),
    "memory.model": ("Estimate",),
    "shell.files": ("restore",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "PRESETS",
    "Estimate",
    "Flag",
    "Launch",
    "LorapatchError",
    "Patch",
    "PatchOptions",
    "Patched",
    "Refused",
    "RunFailed",
    "Script",
    "Stage",
    "UsageError",
    "estimate",
    "patch_script",
    "plan_patch",
    "read_script",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
