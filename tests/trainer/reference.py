"""MGM's arithmetic written out the long way, under timm's names, to hold the trainer's against."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional


def convnext(state: Mapping[str, Tensor], pixels: Tensor) -> list[Tensor]:
    """The output of every stage of a ConvNeXt whose weights stand under open_clip's names."""
    weights = {key.removeprefix("visual.trunk."): tensor for key, tensor in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"].view(1, -1, 1, 1) + weights[f"{name}.bias"].view(1, -1, 1, 1)

    def dense(x: Tensor, name: str) -> Tensor:
        weight = weights[f"{name}.weight"]
        return functional.conv2d(x, weight.view(*weight.shape, 1, 1), weights[f"{name}.bias"])

    x = functional.conv2d(pixels, weights["stem.0.weight"], weights["stem.0.bias"], stride=4)
    x = norm(x, "stem.1")
    maps = []
    stage = 0
    while f"stages.{stage}.blocks.0.gamma" in weights:
        if stage:
            x = norm(x, f"stages.{stage}.downsample.0")
            x = functional.conv2d(
                x,
                weights[f"stages.{stage}.downsample.1.weight"],
                weights[f"stages.{stage}.downsample.1.bias"],
                stride=2,
            )
        block = 0
        while f"stages.{stage}.blocks.{block}.gamma" in weights:
            name = f"stages.{stage}.blocks.{block}"
            depthwise = weights[f"{name}.conv_dw.weight"]
            y = functional.conv2d(x, depthwise, weights[f"{name}.conv_dw.bias"], padding=3, groups=len(depthwise))
            y = dense(norm(y, f"{name}.norm"), f"{name}.mlp.fc1")
            y = dense(0.5 * y * (1 + torch.erf(y / math.sqrt(2))), f"{name}.mlp.fc2")
            x = x + weights[f"{name}.gamma"].view(1, -1, 1, 1) * y
            block += 1
        maps.append(x)
        stage += 1
    return maps


def mining(bridge: Mapping[str, Tensor], tokens: Tensor, maps: list[Tensor]) -> Tensor:
    """Patch-info mining with keys and values for every high-resolution position, one window after the other."""

    def project(x: Tensor, name: str) -> Tensor:
        x = functional.layer_norm(x, x.shape[-1:], bridge[f"{name}.0.weight"], bridge[f"{name}.0.bias"])
        return functional.linear(x, bridge[f"{name}.1.weight"], bridge[f"{name}.1.bias"])

    size = maps[0].shape[-2:]
    stacked = torch.cat(
        [functional.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps], dim=1
    )
    grid = math.isqrt(tokens.shape[1])
    side = size[0] // grid
    query = project(tokens, "vlm_uni_query_projector")
    mined = torch.empty_like(query)
    for patch in range(grid * grid):
        top, left = patch // grid * side, patch % grid * side
        window = stacked[:, :, top : top + side, left : left + side].flatten(2).transpose(1, 2)
        keys, values = project(window, "vlm_uni_aux_projector"), project(window, "vlm_uni_val_projector")
        scores = (keys * query[:, patch, None]).sum(-1) / math.sqrt(keys.shape[-1])
        mined[:, patch] = (scores.softmax(-1).unsqueeze(-1) * values).sum(1)
    return tokens + mined
