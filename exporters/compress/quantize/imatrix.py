"""llama.cpp's importance matrix: its search for levels and codes, errors weighed by the inputs' mean squares."""

from __future__ import annotations

from torch import Tensor

from skipstone.exporters.compress.activations import Inputs
from skipstone.exporters.compress.quantize.grid import Grid, Parts


def quantize(weight: Tensor, inputs: Inputs | None, grid: Grid) -> Parts:
    """See `skipstone.exporters.compress.quantize.Quantizer`."""
    return grid.fit(weight, None if inputs is None else inputs.mean_square)
