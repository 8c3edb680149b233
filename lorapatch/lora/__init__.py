"""What makes a launch a LoRA launch: flags, presets, the plan of a patch."""

from __future__ import annotations

from lorapatch.lora.flags import ALL_MODULES, PRESETS, PatchOptions, Preset
from lorapatch.lora.plan import Patch, Setting, plan_patch

__all__ = ["ALL_MODULES", "PRESETS", "Patch", "PatchOptions", "Preset", "Setting", "plan_patch"]
