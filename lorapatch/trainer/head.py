"""The language model's head, asked only where an answer is supervised."""

# mypy: allow-untyped-calls
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

__all__ = ["LanguageHead"]

# Logits of this many positions exist at once: 256 x 256,000 floats are 0.24 GiB.
POSITIONS_AT_ONCE = 256


class LanguageHead(nn.Linear):
    """``lm_head`` that can also give the loss itself, so that only a few rows of logits ever exist."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """``hidden`` [n, D] with ``targets`` [n] -> the summed cross-entropy; without ``targets`` -> logits."""
        if targets is None:
            return super().forward(hidden)
        parts = []
        for rows, wanted in zip(hidden.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True):
            if len(hidden) > POSITIONS_AT_ONCE and torch.is_grad_enabled():
                parts.append(checkpoint(self._loss, rows, wanted, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._loss(rows, wanted))
        return torch.stack(parts).sum()

    def _loss(self, rows: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(super().forward(rows).float(), targets, reduction="sum")
