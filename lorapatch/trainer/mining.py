"""MGM's bridge from pixels to language tokens: patch-info mining, then the projector."""

# mypy: allow-untyped-calls
from __future__ import annotations

import re
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorapatch.trainer.errors import TrainerError
from lorapatch.trainer.towers import stack_stages

__all__ = ["KeyProjector", "ValueProjector", "build_projector", "build_query_projector", "mine"]

# Windows of this many images are laid out at once: 2,880 channels on a 192 x 192 grid are 0.2 GiB an image in bf16.
IMAGES_AT_ONCE = 4


def build_projector(kind: str, vision_size: int, hidden_size: int) -> nn.Module:
    """``linear``, ``mlpNx_gelu`` or ``identity``: vision tokens [..., vision_size] -> [..., hidden_size]."""
    if kind == "linear":
        return nn.Linear(vision_size, hidden_size)
    if match := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        layers: list[nn.Module] = [nn.Linear(vision_size, hidden_size)]
        for _ in range(1, int(match[1])):
            layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
        return nn.Sequential(*layers)
    if kind == "identity":
        return nn.Identity()
    raise TrainerError(f"--mm_projector_type {kind} is unknown: linear, mlp2x_gelu (any depth) or identity")


def build_query_projector(size: int) -> nn.Module:
    """LayerNorm and Linear, ``size`` -> ``size``: CLIP's tokens as queries."""
    return nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size))


class _NormLinear(nn.Sequential):
    """LayerNorm and Linear, whose weights are used without calling them (so ZeRO-3 has to gather them together)."""

    def __init__(self, aux_size: int, size: int) -> None:
        super().__init__(nn.LayerNorm(aux_size), nn.Linear(aux_size, size))

    def _layers(self) -> tuple[nn.LayerNorm, nn.Linear]:
        norm, linear = self
        return cast(nn.LayerNorm, norm), cast(nn.Linear, linear)


class KeyProjector(_NormLinear):
    """LayerNorm and Linear that make keys of the high-resolution features, applied to the queries instead.

    A window has one query q and 64 keys K x_j + c (x_j normalised, with the norm's gain g and shift s folded in), so
    q · (K (g x_j + s) + c) = (g Kᵀq) · x_j + q · (K s + c): one product a window instead of 64, and no key is stored.
    """

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """``query`` [N, P, size] -> (weights for normalised features [N, P, aux_size], offsets [N, P, 1]), scaled."""
        norm, linear = self._layers()
        query = query * linear.out_features**-0.5
        folded = query @ linear.weight
        offset = folded @ norm.bias.unsqueeze(-1).to(folded.dtype) + query @ linear.bias.unsqueeze(-1)
        return (folded * norm.weight).to(folded.dtype), offset.to(folded.dtype)


class ValueProjector(_NormLinear):
    """LayerNorm and Linear that make values, applied after the attention's average instead of before it.

    The weights of a window add up to one, so the average of V (g x_j + s) + c is V (g x̄ + s) + c.
    """

    def forward(self, average: Tensor) -> Tensor:
        """``average`` of normalised features [N, P, aux_size] -> [N, P, size]."""
        norm, linear = self._layers()
        mined: Tensor = linear(average * norm.weight + norm.bias)
        return mined


def mine(folded: Tensor, offset: Tensor, maps: list[Tensor], *, recompute: bool) -> Tensor:
    """Attention of every low-resolution token over its window of the high-resolution maps.

    ``folded`` [N, P, C] and ``offset`` [N, P, 1] come from :class:`KeyProjector`; ``maps`` are ConvNeXt's stages, C
    channels together. Returns the average of the window's normalised features, [N, P, C]. With ``recompute`` only the
    stages (27 MB an image at 768) are kept for the backward pass, not the stacked features (212 MB).
    """
    parts = []
    for start in range(0, len(folded), IMAGES_AT_ONCE):
        cut = slice(start, start + IMAGES_AT_ONCE)
        inputs = (folded[cut], offset[cut], *(m[cut] for m in maps))
        if recompute and torch.is_grad_enabled():
            parts.append(checkpoint(_mine, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_mine(*inputs))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mine(folded: Tensor, offset: Tensor, *maps: Tensor) -> Tensor:
    features = _windows(stack_stages(list(maps)), round(folded.shape[1] ** 0.5))
    features = nn.functional.layer_norm(features, features.shape[-1:]).to(folded.dtype)
    scores = (features @ folded.unsqueeze(-1)).squeeze(-1) + offset
    weights = scores.softmax(-1, dtype=torch.float32).to(folded.dtype)
    average: Tensor = (weights.unsqueeze(-2) @ features).squeeze(-2)
    return average


def _windows(features: Tensor, grid: int) -> Tensor:
    """[N, C, H, W] -> [N, grid², (H / grid)², C]: the features that lie inside each low-resolution patch."""
    count, channels, height, width = features.shape
    if height % grid or width % grid:
        raise TrainerError(
            f"the high-resolution map is {height} x {width}, which the {grid} x {grid} patches of the vision tower do "
            f"not divide: choose --image_size_aux as a multiple of {4 * grid}"
        )
    side = height // grid
    features = features.permute(0, 2, 3, 1).reshape(count, grid, side, grid, side, channels)
    return features.transpose(2, 3).reshape(count, grid * grid, side * side, channels)
