"""The arithmetic of a merge: W + s·B·A and its variants, some rows of a weight at a time, always in float32.

Every product, sum and rounding is made in PEFT's order (``merge_and_unload``), so float32 results have PEFT's bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorapatch.adapter.inspect import Pair
from lorapatch.adapter.settings import Settings
from lorapatch.adapter.tensors import Tensor

if TYPE_CHECKING:
    import torch

__all__ = ["Update", "as_torch", "torch_dtype"]


def torch_dtype(name: str) -> torch.dtype:
    """torch's type for safetensors' name of it ("BF16")."""
    import torch

    names = {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
        "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    }  # fmt: skip
    return getattr(torch, names[name])  # type: ignore[no-any-return]


def as_torch(tensor: Tensor) -> torch.Tensor:
    """The tensor, read into memory."""
    import torch

    if not tensor.parameters:
        return torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
    return torch.frombuffer(bytearray(tensor.read()), dtype=torch_dtype(tensor.dtype)).view(tensor.shape)


class Update:
    """What one module's adapter does to its weight; its A and B are read when it is made.

    ``by_rows`` says whether rows can be merged on their own; else :meth:`rows` wants all of them.
    """

    def __init__(self, pair: Pair, settings: Settings) -> None:
        assert pair.a is not None and pair.b is not None
        self.variant = settings.variant
        # PEFT keeps a Conv1D's weight and an embedding transposed: their rows are A's columns.
        self.transposed = pair.embedding or bool(settings.raw.get("fan_in_fan_out"))
        self.by_rows = self.variant in ("lora", "rslora") or (self.variant == "dora" and not self.transposed)
        self.scale = self.factor = settings.scale(pair.module)
        self.rank = settings.rank(pair.module)
        self.a, self.b = as_torch(pair.a).float(), as_torch(pair.b).float()
        self.magnitude = None if pair.magnitude is None else as_torch(pair.magnitude).float()
        if math.frexp(self.scale)[0] == 0.5:  # a power of two changes no bits but the exponent: B is the smaller place
            self.b, self.factor = self.b * self.scale, 1.0
        # Up to this rank a product is summed in one go and W is added last, as in W + (B·A): the same bits.
        self.at_once = self.factor == 1 and self.rank <= 256 and self.by_rows and not self.transposed

    def rows(self, weight: torch.Tensor, first: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Merge ``weight`` [n, in], the rows from ``first`` on; returns float32 [n, in] (in ``out`` if given)."""
        import torch

        last = first + weight.shape[0]
        merged = torch.empty(weight.shape, dtype=torch.float32) if out is None else out
        if self.at_once:
            merged.copy_(weight).addmm_(self.b[first:last], self.a)
        else:
            merged.copy_(self._delta(first, last)).add_(self._residual(weight))
        if self.magnitude is None:
            return merged
        if self.transposed:
            return merged.mul_((self.magnitude / torch.linalg.norm(merged.T, dim=1)).view(1, -1))
        return merged.mul_((self.magnitude[first:last] / torch.linalg.norm(merged, dim=1)).view(-1, 1))

    def _delta(self, first: int, last: int) -> torch.Tensor:
        """s·B·A for the rows from ``first`` to ``last``."""
        import torch

        if self.transposed:
            delta = torch.mm(self.b, self.a[:, first:last].contiguous()).T
        else:
            delta = torch.mm(self.b[first:last], self.a)
        return delta if self.factor == 1 else delta.mul_(self.factor)

    def _residual(self, weight: torch.Tensor) -> torch.Tensor:
        """W, or the base that a PiSSA or OLoRA adapter began with: W without its own first values."""
        import torch

        if self.variant not in ("pissa", "olora"):
            return weight
        whole = weight.float().T if self.transposed else weight.float()
        if self.variant == "olora":
            q, r = torch.linalg.qr(whole)
            rest = whole - self.scale * q[:, : self.rank].contiguous() @ r[: self.rank].contiguous()
        else:
            v, s, u = torch.linalg.svd(whole, full_matrices=False)
            root = torch.diag(torch.sqrt(s[: self.rank] / self.scale))
            rest = whole - self.scale * (v[:, : self.rank] @ root) @ (root @ u[: self.rank])
        residual: torch.Tensor = rest.T if self.transposed else rest
        return residual
