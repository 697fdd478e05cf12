"""Wanda ([2306.11695](https://arxiv.org/abs/2306.11695)): a weight counts as much as it adds to the output."""

from __future__ import annotations

from torch import Tensor

from skipstone.exporters.compress.sparsify.masks import Pattern, keep_largest


def prune(
    weight: Tensor, moment: Tensor, pattern: Pattern, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `Pruner`. Weights of one output are compared with each other (section 3: groups per output)."""
    kept = keep_largest(scores(weight, moment), pattern) if mask is None else mask
    return weight * kept, kept


def scores(weight: Tensor, moment: Tensor) -> Tensor:
    """S_ij = |W_ij| · ‖X_j‖₂, up to a factor that all share: [out, in]."""
    return weight.abs() * moment.diagonal().clamp(min=0.0).sqrt().to(weight.dtype)
