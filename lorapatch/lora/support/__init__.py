"""Does the trainer really take LoRA? Its Python is read, never run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorapatch.lora.support.lora_flags import LoraFlag
    from lorapatch.lora.support.option import Option
    from lorapatch.lora.support.source import Place
    from lorapatch.lora.support.trainer_file import find_trainer
    from lorapatch.lora.support.trainer_support import FlagSupport, Recommendation, Setting, TrainerSupport, read_trainer

__all__ = [
    "FlagSupport",
    "LoraFlag",
    "Option",
    "Place",
    "Recommendation",
    "Setting",
    "TrainerSupport",
    "find_trainer",
    "read_trainer",
]

# Where a name lives, if not in trainer_support. Loaded on first use: a trainer that is not found needs no reader.
_HOME_OF = {"find_trainer": "trainer_file", "LoraFlag": "lora_flags", "Option": "option", "Place": "source"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF.get(name, 'trainer_support')}"), name)
