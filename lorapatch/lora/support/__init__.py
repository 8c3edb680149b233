"""Does the trainer really take LoRA? Its Python is read, never run."""

from __future__ import annotations

from lorapatch.lora.support.find_trainer import find_trainer
from lorapatch.lora.support.lora_flags import LoraFlag
from lorapatch.lora.support.option import Option
from lorapatch.lora.support.source import Place
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
