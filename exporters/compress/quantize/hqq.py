"""Half-quadratic quantisation (https://mobiusml.github.io/hqq_blog): levels that fit the bulk of the weights and let
outliers be wrong, found without any text.

Where the layout has minima, they are found by minimising the p-norm, p < 1, of the errors: the errors W_e that are to be
allowed are taken out by shrinking, and the minimum that fits what is left is a mean; the two take turns. Where it has
none, scales take turns with codes, each the least squares for the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.exporters.compress.activations import Inputs
from skipstone.exporters.compress.quantize.grid import Grid, Levels, Parts

# The authors' settings: norm, weight of the quadratic term and its growth, rounds.
_P, _BETA, _KAPPA, _ROUNDS = 0.7, 10.0, 1.01, 20


def quantize(weight: Tensor, _inputs: Inputs | None, grid: Grid) -> Parts:
    """See `skipstone.exporters.compress.quantize.Quantizer`."""
    levels = grid.levels(grid.fit(weight, None))
    find = fit_minima if grid.has_minima else fit_scales
    parts = grid.with_levels(find(weight, levels), weight.shape[1])
    return grid.with_codes(parts, grid.levels(parts).nearest(weight))


def fit_minima(weight: Tensor, levels: Levels) -> Levels:
    """Minima for the least p-norm of the errors, the scales as they are; stops when the mean error grows.

    Args:
        weight: float32 [rows, columns].
        levels: to begin with.
    """
    w = weight.reshape(*levels.scale.shape, -1)
    inverse = torch.where(levels.scale == 0.0, 0.0, 1.0 / levels.scale)[..., None]
    zero, beta, best = -levels.minimum[..., None] * inverse, _BETA, torch.inf
    for _ in range(_ROUNDS):
        codes = (w * inverse + zero).round().clamp(levels.low, levels.high)
        error = w - (codes - zero) * levels.scale[..., None]
        allowed = error.sign() * (error.abs() - error.abs() ** (_P - 1) / beta).relu()
        zero = (codes - (w - allowed) * inverse).mean(-1, keepdim=True)
        beta, size = beta * _KAPPA, float(error.abs().mean())
        if size >= best:
            break
        best = size
    return Levels(levels.scale, -zero[..., 0] * levels.scale, levels.low, levels.high)


def fit_scales(weight: Tensor, levels: Levels) -> Levels:
    """Scales for the least squares of the errors, the minima being zero.

    Args:
        weight: float32 [rows, columns].
        levels: to begin with.
    """
    w, scale = weight.reshape(*levels.scale.shape, -1), levels.scale[..., None]
    for _ in range(_ROUNDS):
        codes = levels.nearest_of(w, scale, torch.zeros_like(scale)).float()
        square = (codes * codes).sum(-1, keepdim=True)
        scale = torch.where(square > 0.0, (w * codes).sum(-1, keepdim=True) / square, scale)
    return Levels(scale[..., 0], levels.minimum, levels.low, levels.high)
