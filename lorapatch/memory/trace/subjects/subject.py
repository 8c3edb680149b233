"""A model on the meta device with what a trainer does to it: the batch it gets, its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["DTYPES", "Subject"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Subject:
    """``make_batch(tokens of a sample)`` and ``forward`` (which gives an output with a ``loss``) run under the trace;
    ``model`` is what the engine gets, ``towers`` stand beside it.
    """

    model: nn.Module
    make_batch: Callable[[int], dict[str, Tensor]]
    forward: Callable[[nn.Module, dict[str, Tensor]], Any]
    vocabulary: int
    total: int
    trainable: int
    lora: int = 0
    towers: list[nn.Module] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)  # (object, attribute) of tensors outside any module's registry
    leaves: tuple[type[nn.Module], ...] = ()  # classes whose parameters ZeRO-3 gathers together (set_z3_leaf_modules)
    batches_at_once: bool = True  # transformers since 4.46 fetches all micro-batches of a step before the first
    assumed: list[str] = field(default_factory=list)
    not_modelled: list[str] = field(default_factory=list)
