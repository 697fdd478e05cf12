"""SmoothQuant ([2211.10438](https://arxiv.org/abs/2211.10438)): outliers among the inputs are moved into the weights, so
that both can be rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skipstone.exporters.compress.activations import Inputs
from skipstone.exporters.compress.quantize.folds import Fold, shared
from skipstone.exporters.compress.quantize.grid import Grid

_ALPHA = 0.5
_LEAST = torch.finfo(torch.float32).eps


def find_scales(
    weights: Sequence[Tensor], inputs: Inputs, _grids: Sequence[Grid | None], fold: Fold
) -> Tensor:
    """Scales of the channels, max|x|^α / max|w|^(1-α) with α = 1/2 (eq. 4).

    Args:
        weights: of the layers that take the inputs, float32 [rows, columns] each.
        inputs: theirs.
        fold: the place, which may want channels to share a scale.

    Returns:
        float32 [columns].
    """
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    return shared(fold, (inputs.max_abs + _LEAST) ** _ALPHA / (largest + _LEAST) ** (1 - _ALPHA))
