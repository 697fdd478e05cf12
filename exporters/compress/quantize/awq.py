"""AWQ ([2306.00978](https://arxiv.org/abs/2306.00978)): channels with strong inputs are scaled up before rounding, so
that they are rounded more finely relative to their size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skipstone.exporters.compress.activations import Inputs
from skipstone.exporters.compress.quantize.folds import Fold, shared
from skipstone.exporters.compress.quantize.grid import Grid

_STEPS = 20


def find_scales(
    weights: Sequence[Tensor], inputs: Inputs, grids: Sequence[Grid | None], fold: Fold
) -> Tensor:
    """Scales of the channels, s = mean|x|^α with the α in 0, 0.05 … 0.95 that errs least in the outputs (eq. 4 and 5).

    Args:
        weights: of the layers that take the inputs, float32 [rows, columns] each.
        inputs: theirs.
        grids: the layers' layouts; None: it is not rounded.
        fold: the place, which may want channels to share a scale.

    Returns:
        float32 [columns].
    """
    best, least = torch.ones_like(inputs.mean_abs), torch.inf
    for step in range(_STEPS):
        scales = inputs.mean_abs.clamp(min=1e-4) ** (step / _STEPS)
        scales = shared(fold, scales / (scales.max() * scales.min()).sqrt())
        error = sum(
            _error(weight, inputs, scales, grid)
            for weight, grid in zip(weights, grids, strict=True)
            if grid is not None
        )
        if error < least:
            best, least = scales, error
    return best


def _error(weight: Tensor, inputs: Inputs, scales: Tensor, grid: Grid) -> float:
    """Squared error of the outputs when the weight is rounded with its columns scaled, summed over rows."""
    parts = grid.fit(weight * scales, None)
    error = (grid.levels(parts).values(grid.codes(parts)) / scales - weight).double()
    return float(((error @ inputs.second_moment) * error).sum())
