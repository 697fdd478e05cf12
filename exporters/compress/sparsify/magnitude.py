"""Magnitude pruning: the smallest weights of the matrix go, whatever their inputs. What the others have to beat."""

from __future__ import annotations

from torch import Tensor

from skipstone.exporters.compress.sparsify.masks import Pattern, keep_largest


def prune(
    weight: Tensor, moment: Tensor, pattern: Pattern, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `Pruner`; `moment` is not looked at."""
    kept = keep_largest(weight.abs(), pattern, over_all=True) if mask is None else mask
    return weight * kept, kept
