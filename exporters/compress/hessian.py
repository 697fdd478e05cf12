"""The factor of the inverse second moment that GPTQ and SparseGPT settle columns by."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U of (H + λI)⁻¹ = UᵀU.

    Column j being settled, U[j, j:] / U[j, j] is how the columns to its right best make good for it, all columns to
    its left being settled before ([2210.17323](https://arxiv.org/abs/2210.17323), section 3.3, step 3).

    Args:
        moment: H, the mean or sum of x xᵀ over inputs x, [n, n]. Inputs that are always zero are taken as
            independent of the rest.
        damping: λ in units of the mean diagonal.

    Returns:
        float64 [n, n].
    """
    h = moment.double().clone()
    diagonal = h.diagonal()  # a view: writes go to h
    diagonal[diagonal <= 0.0] = diagonal.mean().clamp(min=1e-12)
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
