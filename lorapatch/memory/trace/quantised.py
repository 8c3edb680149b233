"""Linear layers of 8 or 4 bits as bitsandbytes stores and runs them (it is not needed here: only shapes count).

Sources: bitsandbytes/functional.py (quantize_4bit, dequantize_4bit, int8_linear_matmul), autograd/_functions.py
(MatMul4Bit, MatMul8bitLt), nn/modules.py. Double quantisation: Dettmers et al., QLoRA, 2023, section 3.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorapatch.memory.model import RunSetup
from lorapatch.memory.trace.subjects.subject import DTYPES

__all__ = ["prepare", "replace"]

BLOCK = 64  # weights that share a scale (blocksize of quantize_4bit)
SCALES_BLOCK = 256  # scales that share a scale of their own, under double quantisation
CODE = 16  # float32 values a 4-bit number stands for; 256 for the 8-bit scales


def replace(model: nn.Module, setup: RunSetup, *, skip: tuple[str, ...]) -> None:
    """Swap ``model``'s linear layers for quantised ones, but for those whose path contains a name in ``skip``.

    Call it where the model is on the meta device; what is left in ``model`` keeps its dtype.
    """
    if setup.bits == 16:
        return
    kind = _Linear4bit if setup.bits == 4 else _Linear8bit
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not any(part in path for part in skip):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent) if parent else model, name, kind(module, setup))


def prepare(model: nn.Module, setup: RunSetup) -> None:
    """peft.prepare_model_for_kbit_training: everything is frozen, what is not packed becomes float32."""
    if setup.bits == 16:
        return
    for p in model.parameters():
        p.requires_grad = False
        if p.dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()


class _Quantised(nn.Linear):
    """Stands where the linear layer stood; its weight is a packed parameter that knows how much it stands for."""

    def __init__(self, linear: nn.Linear, packed: Tensor, compute: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute = compute
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight.whole = linear.weight.numel()  # type: ignore[attr-defined]
        self.bias = linear.bias

    def _state(self, name: str, size: int, dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.empty(size, dtype=dtype), persistent=False)
        getattr(self, name).quantised = True


class _Linear4bit(_Quantised):
    """Two weights a byte, one scale for 64 of them; a whole weight exists while it is multiplied."""

    def __init__(self, linear: nn.Linear, setup: RunSetup) -> None:
        size = linear.weight.numel()
        super().__init__(linear, torch.empty((-(-size // 2), 1), dtype=torch.uint8), DTYPES[setup.dtype])
        scales = -(-size // BLOCK)
        self._state("code", CODE, torch.float32)
        if setup.double_quant:
            self._state("absmax", scales, torch.uint8)
            self._state("nested_absmax", -(-scales // SCALES_BLOCK), torch.float32)
            self._state("nested_code", 256, torch.float32)
            self._state("offset", 1, torch.float32)
        else:
            self._state("absmax", scales, torch.float32)
        self.scales, self.nested = scales, setup.double_quant

    def forward(self, input: Tensor) -> Tensor:
        """In the compute dtype; the result has the input's, and PEFT copies it before it adds to it."""
        bias = None if self.bias is None else self.bias.to(self.compute)
        output: Tensor = _MatMul4bit.apply(input.to(self.compute), self.weight, bias, self)
        return output.to(input.dtype).clone()

    def whole(self) -> Tensor:
        """dequantize_4bit: the scales first, where they are quantised themselves."""
        if self.nested:
            torch.empty(self.scales, dtype=torch.float32)
        return torch.empty((self.out_features, self.in_features), dtype=self.compute)


class _MatMul4bit(torch.autograd.Function):
    """Keeps no activation: the weight is unpacked again for the input's gradient."""

    @staticmethod
    def forward(context: Any, input: Tensor, packed: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        context.layer = layer
        context.shape = input.shape
        return torch.nn.functional.linear(input, layer.whole(), bias)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> Any:
        if not context.needs_input_grad[0]:
            return None, None, None, None
        return torch.matmul(grads[0], context.layer.whole()), None, None, None


class _Linear8bit(_Quantised):
    """A byte a weight and one scale a row; the input is quantised by rows, too."""

    def __init__(self, linear: nn.Linear, setup: RunSetup) -> None:
        packed = torch.empty(linear.weight.shape, dtype=torch.int8)
        super().__init__(linear, packed, DTYPES[setup.dtype])
        self._state("SCB", linear.out_features, torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        """LLM.int8(): computed in float16 or bfloat16 outside, int32 inside."""
        output: Tensor = _MatMul8bit.apply(input, self.weight, self.bias, self)
        return output


class _MatMul8bit(torch.autograd.Function):
    """Rows of the input as int8, an int32 product, the result in the input's dtype; the input is kept."""

    @staticmethod
    def forward(context: Any, input: Tensor, packed: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        context.layer = layer
        context.kept = input.reshape(-1, input.shape[-1]) if any(context.needs_input_grad[:2]) else None
        rows = input.reshape(-1, input.shape[-1]).to(torch.float16)
        quantised = torch.empty(rows.shape, dtype=torch.int8)
        scales = torch.empty(len(rows), dtype=torch.float32)
        del rows
        product = torch.empty((len(quantised), layer.out_features), dtype=torch.int32)
        output = torch.empty(product.shape, dtype=torch.float16)
        del product
        output = output.to(input.dtype)
        del quantised, scales
        return output.reshape(*input.shape[:-1], layer.out_features)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> Any:
        if not context.needs_input_grad[0]:
            return None, None, None, None
        layer, grad = context.layer, grads[0]
        whole = torch.empty((layer.out_features, layer.in_features), dtype=grad.dtype)  # CB.to(dtype).mul_(SCB)
        return torch.matmul(grad, whole), None, None, None
