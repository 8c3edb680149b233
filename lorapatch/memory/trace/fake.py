"""Models without weights: built on the meta device, then every parameter and buffer swapped for a fake CPU tensor.

PEFT's injection and transformers' loading do not work under a FakeTensorMode, so the model is made first and swapped
afterwards. Fake CUDA tensors cannot run a backward pass where there is no GPU: CPU ones are used, with CUDA's kernels
put back by :mod:`cuda`.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["made_on_meta", "swap"]


@contextlib.contextmanager
def made_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """What is built inside has shapes alone, in ``dtype``."""
    before, linspace = torch.get_default_dtype(), torch.linspace
    torch.set_default_dtype(dtype)
    torch.linspace = functools.partial(linspace, device="cpu")  # older ConvNeXts read its values (drop path rates)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)
        torch.linspace = linspace


def swap(modules: Iterable[nn.Module], mode: Any) -> list[Tensor]:
    """Make every tensor of ``modules`` a fake one, tied ones stay tied; returns them in the order of the modules."""
    swapped: dict[int, tuple[Tensor, Tensor]] = {}  # the old one is kept, so that no id comes twice
    for module in modules:
        for part in module.modules():
            for store in (part._parameters, part._buffers):
                for name, tensor in store.items():
                    if tensor is not None:
                        store[name] = _swapped(tensor, swapped, mode)
    return [new for new, _ in swapped.values()]


def _swapped(tensor: Tensor, swapped: dict[int, tuple[Tensor, Tensor]], mode: Any) -> Any:
    if id(tensor) not in swapped:
        with mode:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        for name in ("quantised", "whole"):
            if hasattr(tensor, name):
                setattr(new, name, getattr(tensor, name))
        swapped[id(tensor)] = (new, tensor)
    return swapped[id(tensor)][0]
