"""What CUDA does otherwise than the CPU and what it costs: dropout, attention, autocast's lists, cuBLAS's workspaces.

The trace runs on fake CPU tensors. A TorchFunctionMode is popped inside ``backward``, so a recomputed layer would see the
CPU's kernels: the functions themselves are replaced, for as long as :func:`cuda_kernels` is entered.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lorapatch.memory.trace.recorder import Recorder

__all__ = ["autocast", "autocast_dtype", "cublas_workspace", "cuda_kernels"]

# aten/src/ATen/autocast_mode.h, AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE: those that models use.
_FLOAT32_ON_CUDA = (
    "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar",
    "rsqrt", "exp", "log", "reciprocal", "softplus", "logsumexp", "norm.Scalar", "cosine_similarity",
    "upsample_bilinear2d", "upsample_bilinear2d.vec", "upsample_bicubic2d", "upsample_bicubic2d.vec",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_nearest2d", "upsample_nearest2d.vec",
    "softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum", "prod", "nll_loss", "nll_loss2d", "mse_loss",
    "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits",
)  # fmt: skip
_WITH_DTYPE = {"softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum", "prod"}
_MIB = 1 << 20


def cublas_workspace(architecture: int) -> int:
    """Bytes that cuBLAS takes on each thread that multiplies matrices, from the GPU's compute capability (90: Hopper).

    aten/src/ATen/cuda/CUDABlas.cpp, getChosenWorkspaceSize: 32 MiB on Hopper, 4096 KiB x 2 + 16 KiB x 8 elsewhere.
    """
    return 32 * _MIB if architecture == 90 else 8 * _MIB + 128 * 1024


@contextlib.contextmanager
def cuda_kernels(recorder: Recorder) -> Iterator[None]:
    """CUDA's choices for dropout and attention; transformers may look into masks although their values are not there."""
    before = functional.dropout, functional.scaled_dot_product_attention
    masks = _modules_that_ask_for_tracing()
    kept = [(module, module.is_tracing) for module in masks]

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
                  is_causal: bool = False, scale: Any = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        return _attention(recorder, query, key, value, attn_mask, dropout_p, enable_gqa)

    functional.dropout = _dropout
    functional.scaled_dot_product_attention = attention
    for module in masks:
        module.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        functional.dropout, functional.scaled_dot_product_attention = before
        for module, function in kept:
            module.is_tracing = function


def _modules_that_ask_for_tracing() -> list[Any]:
    """transformers 5 makes a mask where it meets a fake tensor, which no real run has."""
    import sys

    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.") and "is_tracing" in getattr(module, "__dict__", {})
    ]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA keeps a mask of one byte an element; the CPU's kernel keeps one of the input's dtype."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _attention(
    recorder: Recorder, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, grouped: bool
) -> Tensor:
    """The kernel that aten/src/ATen/native/transformers/cuda/sdp_utils.cpp would choose: flash, efficient or math."""
    low = autocast_dtype()
    if low is not None:
        query, key, value = (t.to(low) if t.dtype == torch.float32 else t for t in (query, key, value))
        mask = mask.to(low) if mask is not None and mask.dtype == torch.float32 else mask
    half = query.dtype in (torch.bfloat16, torch.float16)
    if mask is None and half and query.shape[-1] <= 256:
        flash: Tensor = _Flash.apply(query, key, value, recorder)
        return flash
    if query.shape[1] != key.shape[1]:  # neither efficient nor math know groups
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    if mask is not None and mask.dtype == torch.bool:  # convert_boolean_attn_mask
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)
    if mask is not None and mask.shape[-1] % 16:  # pad_bias
        mask = functional.pad(mask, (0, 16 - mask.shape[-1] % 16))
    efficient: Tensor = _Efficient.apply(query, key, value, mask, recorder)
    return efficient


def _rows_first(like: Tensor) -> Tensor:
    """Attention's outputs lie as [B, L, H, D] and are seen as [B, H, L, D]."""
    batch, heads, length, width = like.shape
    return torch.empty((batch, length, heads, width), dtype=like.dtype).transpose(1, 2)


class _Flash(torch.autograd.Function):
    """Flash attention: keeps the output and one float32 a row, never the scores."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, recorder: Recorder) -> Tensor:
        batch, heads, length, _ = query.shape
        out = _rows_first(query)
        rows = torch.empty((batch, heads, length), dtype=torch.float32)
        context.save_for_backward(query, key, value, out, rows)
        context.recorder = recorder
        return out

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> Any:
        query, key, value, _, _ = context.saved_tensors
        batch, heads, length, width = query.shape
        grad_query = _rows_first(query)
        grad_key, grad_value = _rows_first(key), _rows_first(value)
        # flash_api.cpp, mha_bwd: float32 accumulators of the queries' gradient, and whole heads where they are grouped
        rounded, wide = -(-length // 128) * 128, -(-width // 32) * 32
        working = 4 * batch * heads * rounded * (wide + 1)
        if key.shape[1] != heads:
            working += 2 * key.element_size() * batch * key.shape[2] * heads * width
        context.recorder.temporary(working, "flash attention's accumulators")
        return grad_query, grad_key, grad_value, None


class _Efficient(torch.autograd.Function):
    """Memory-efficient attention: as flash, with a mask; wide heads take float32 accumulators in the backward pass."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, recorder: Recorder) -> Tensor:
        batch, heads, length, _ = query.shape
        out = _rows_first(query)
        rows = torch.empty((batch, heads, -(-length // 32) * 32), dtype=torch.float32)
        context.save_for_backward(query, key, value, out, rows, mask)
        context.recorder = recorder
        return out

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> Any:
        query, key, value = context.saved_tensors[:3]
        batch, heads, length, width = query.shape
        delta = torch.empty((batch, heads, length), dtype=torch.float32)
        grad_query, grad_key, grad_value = (_rows_first(t) for t in (query, key, value))
        if width > 128 and query.element_size() == 2:  # kernel_backward.h: what does not fit the registers
            context.recorder.temporary(4 * batch * heads * 2 * key.shape[2] * width, "efficient attention's workspace")
        del delta
        return grad_query, grad_key, grad_value, None, None


@contextlib.contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """``torch.autocast("cuda", dtype)`` for CPU tensors: matrices in ``dtype``, CUDA's own list in float32."""
    if dtype is None:
        yield
        return
    _cuda_lists()
    with torch.autocast("cpu", dtype=dtype):
        yield


def autocast_dtype() -> torch.dtype | None:
    """What autocast computes in where it is on, None where it is off."""
    try:
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    except (TypeError, AttributeError):  # torch before 2.4
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None


_library: list[Any] = []


def _cuda_lists() -> None:
    """Teach the CPU's autocast CUDA's list of operations that run in float32 (once a process)."""
    if _library:
        return
    library = torch.library.Library("aten", "IMPL")
    _library.append(library)
    warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)  # they are overridden on purpose
    for name in _FLOAT32_ON_CUDA:
        base, _, overload = name.partition(".")
        packet = getattr(torch.ops.aten, base, None)
        operation = getattr(packet, overload or "default", None)
        if operation is not None:
            with contextlib.suppress(RuntimeError):  # an older torch has it in another overload
                library.impl(name, _in_float32(operation, name in _WITH_DTYPE), "AutocastCPU")


def _in_float32(operation: Any, takes_dtype: bool) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            if takes_dtype:
                asked = kwargs.pop("dtype", None) or next((a for a in args if isinstance(a, torch.dtype)), None)
                low = args[0].dtype in (torch.bfloat16, torch.float16)
                rest = args[:2] if "softmax" in str(operation) else args  # their third is the dtype
                return operation(*rest, dtype=asked or (torch.float32 if low else None), **kwargs)
            return operation(*(_wide(a) for a in args), **{name: _wide(a) for name, a in kwargs.items()})

    return kernel


def _wide(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value
