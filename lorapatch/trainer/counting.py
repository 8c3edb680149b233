"""How many parameters a model has, and how many of them learn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorapatch.trainer.model import MGMForCausalLM

__all__ = ["Counts", "count_parameters"]


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters; ``tensors`` counts LoRA's tensors. Tied weights count once, towers count."""

    total: int
    trainable: int
    lora: int
    tensors: int


def count_parameters(model: nn.Module) -> Counts:
    """Count ``model``'s parameters (plain, wrapped by PEFT, partitioned by ZeRO-3 or on the meta device)."""
    named = dict(model.named_parameters())  # a tied parameter comes once
    lora = {name: p for name, p in named.items() if ".lora_" in name}
    inner = next((m for m in model.modules() if isinstance(m, MGMForCausalLM)), None)
    towers = [p for tower in (inner.towers if inner else []) for p in tower.parameters()]
    return Counts(
        total=_numel([*named.values(), *towers]),
        trainable=_numel(p for p in named.values() if p.requires_grad),
        lora=_numel(lora.values()),
        tensors=len(lora),
    )


def _numel(parameters: Iterable[Any]) -> int:
    total = 0
    for p in parameters:
        count = int(getattr(p, "ds_numel", p.numel()))
        if type(p).__name__ == "Params4bit" and p.quant_state is not None:
            count = int(torch.Size(p.quant_state.shape).numel())
        total += count
    return total
