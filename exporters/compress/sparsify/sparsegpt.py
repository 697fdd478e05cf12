"""SparseGPT ([2301.00774](https://arxiv.org/abs/2301.00774)): columns are pruned from left to right, and what that does
to the outputs is made good by the weights to their right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.exporters.compress.hessian import inverse_factor
from skipstone.exporters.compress.sparsify.masks import Pattern, keep_largest

_BLOCK = 128  # columns whose masks are chosen at once, B_s of the paper
_DAMPING = 0.01  # of the mean diagonal


def prune(
    weight: Tensor,
    moment: Tensor,
    pattern: Pattern,
    mask: Tensor | None = None,
    *,
    block: int = _BLOCK,
    damping: float = _DAMPING,
) -> tuple[Tensor, Tensor]:
    """See `Pruner`. Of a share, every block of columns loses the same over all its rows (section 3.2).

    Args:
        weight: see `Pruner`.
        moment: likewise.
        pattern: likewise.
        mask: likewise.
        block: columns whose masks are chosen at once.
        damping: added to the diagonal, in mean diagonals.
    """
    w, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    unused = moment.diagonal() <= 0.0  # inputs that are always zero: no weight on them does anything
    w[:, unused] = 0.0
    # Row j of the upper Cholesky factor of H⁻¹ is row j of (H_{j:,j:})⁻¹ over the root of its own corner: how the
    # columns to the right best make good for column j, the columns to the left being settled (algorithm 1).
    u = inverse_factor(moment, damping).to(w.dtype)
    block -= block % (pattern.group or 1)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        errors = torch.zeros_like(w[:, start:stop])
        for j in range(start, stop):
            chosen = _columns_to_choose(j, start, stop, pattern)
            if chosen is not None:
                kept[:, chosen] = _choose(w, u, chosen, pattern) if mask is None else mask[:, chosen]
            errors[:, j - start] = w[:, j] * ~kept[:, j] / u[j, j]
            w[:, j:stop] -= errors[:, j - start, None] * u[j, j:stop]
            w[:, j] *= kept[:, j]  # exactly zero
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return w, kept


def _columns_to_choose(j: int, start: int, stop: int, pattern: Pattern) -> slice | None:
    """The columns whose mask is chosen when column j's turn comes, with all before it settled."""
    if pattern.group is None:
        return slice(start, stop) if j == start else None
    return slice(j, j + pattern.group) if j % pattern.group == 0 else None


def _choose(w: Tensor, u: Tensor, columns: slice, pattern: Pattern) -> Tensor:
    """The mask of some columns: those stay whose removal would cost most, w² / [H⁻¹]_jj of the columns left."""
    return keep_largest((w[:, columns] / u.diagonal()[columns]) ** 2, pattern, over_all=True)
