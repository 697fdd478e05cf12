"""GPTQ ([2210.17323](https://arxiv.org/abs/2210.17323)): columns are rounded one after the other, and what that does
to the outputs is made good by the columns still to come.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.exporters.compress.activations import Inputs
from skipstone.exporters.compress.hessian import inverse_factor
from skipstone.exporters.compress.quantize.grid import Grid, Levels, Parts

_BLOCK = 128  # columns that are settled before the others hear of it, B of the paper
_DAMPING = 0.01


def quantize(
    weight: Tensor,
    inputs: Inputs | None,
    grid: Grid,
    *,
    damping: float = _DAMPING,
    act_order: bool = True,
) -> Parts:
    """See `skipstone.exporters.compress.quantize.Quantizer`. The levels are those of the layout's own search, fixed
    before the first column, so that columns can be settled in any order.

    Args:
        weight: see there.
        inputs: likewise; not None.
        grid: likewise.
        damping: added to the diagonal of the second moment, in mean diagonals.
        act_order: settle the columns with the strongest inputs first.
    """
    if inputs is None:
        raise ValueError("gptq goes by the inputs of a layer")
    parts = grid.fit(weight, inputs.mean_square)
    codes = settle(weight, inputs.second_moment, grid.levels(parts), damping=damping, act_order=act_order)
    return grid.with_codes(parts, codes)


def settle(weight: Tensor, moment: Tensor, levels: Levels, *, damping: float, act_order: bool) -> Tensor:
    """Codes [rows, columns] of fixed levels for the least error in the outputs (algorithm 1).

    Args:
        weight: float32 [rows, columns].
        moment: H, mean of x xᵀ over the inputs x, [columns, columns].
        levels: what codes stand for.
        damping: see `quantize`.
        act_order: likewise.
    """
    order = moment.diagonal().argsort(descending=True) if act_order else torch.arange(len(moment))
    w = weight[:, order].clone()
    scale, minimum = (level[:, order] for level in levels.by_column(w.shape[1]))
    u = inverse_factor(moment[order][:, order], damping).to(w.dtype)
    codes = torch.empty_like(w, dtype=torch.int16)
    for start in range(0, w.shape[1], _BLOCK):
        stop = min(start + _BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, start:stop])
        for j in range(start, stop):
            codes[:, j] = levels.nearest_of(w[:, j], scale[:, j], minimum[:, j])
            rounded = codes[:, j] * scale[:, j] + minimum[:, j]
            errors[:, j - start] = (w[:, j] - rounded) / u[j, j]
            w[:, j:stop] -= errors[:, j - start, None] * u[j, j:stop]
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return codes[:, order.argsort()]
