"""The integer weights of ExecuTorch's schemes: int4 in groups of 32 inputs, int8 in such groups or by output channel.

Symmetric: a code times its scale, in torchao's words an `IntxUnpackedToInt8Tensor` without zero points. Codes of 3 and 2
bits can be had for study; they are stored as int4, for XNNPACK has no smaller kernels, and gain nothing on a device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skipstone.exporters.compress.quantize.grid import Levels, Parts
from skipstone.runtimes.quiet import quiet_libraries

_GROUP = 32
_CANDIDATES = 26  # scales tried
_CODES, _SCALES = "codes", "scales"


@dataclass(frozen=True)
class IntGrid:
    """See `skipstone.exporters.compress.quantize.grid.Grid`.

    Attributes:
        name: `int4_g32` and the like.
        width: bits of a code.
        group: inputs under one scale; None: all of them.
    """

    name: str
    width: int
    group: int | None
    has_minima: bool = False

    @property
    def block(self) -> int:
        return self.group or 1

    @property
    def _low(self) -> int:
        return -(1 << self.width - 1)

    @property
    def _high(self) -> int:
        return (1 << self.width - 1) - 1

    def num_bytes(self, rows: int, columns: int) -> int:
        width = 8 if self.width == 8 else 4  # there is no smaller storage
        return rows * columns * width // 8 + 4 * rows * (columns // self.group if self.group else 1)

    def fit(self, weight: Tensor, importance: Tensor | None) -> Parts:
        """As torchao rounds, each scale taking in the largest weight of its group; with importances, the scale of those
        up to as large with the least weighed error.
        """
        with quiet_libraries():  # which say what they lack when they load
            from torchao.quantization.quant_primitives import (
                MappingType,
                choose_qparams_affine,
                quantize_affine,
            )

        weight = weight.detach().float()
        group, low, high = (1, self.group or weight.shape[1]), self._low, self._high
        scale, zero = choose_qparams_affine(
            weight,
            MappingType.SYMMETRIC,
            group,
            torch.int8,
            low,
            high,
            zero_point_dtype=torch.int8,
            keepdim=True,
        )
        if importance is not None:
            scale = self._searched(weight, importance, scale)
        codes = quantize_affine(weight, group, scale, zero, torch.int8, low, high)
        return {_CODES: codes, _SCALES: scale.float().contiguous()}

    def _searched(self, weight: Tensor, importance: Tensor, largest: Tensor) -> Tensor:
        """Of scales [rows, groups] up to the largest, those with the least weighed error."""
        w, counts = weight.reshape(*largest.shape, -1), importance.reshape(1, largest.shape[1], -1)
        scale, least = largest, torch.full_like(largest, torch.inf)
        for share in torch.linspace(1.0, 0.5, _CANDIDATES):
            tried = (largest * share)[..., None]
            codes = (w / tried).round().clamp(self._low, self._high)
            error = ((codes * tried - w) ** 2 * counts).sum(-1)
            scale = torch.where(error < least, tried[..., 0], scale)
            least = torch.minimum(error, least)
        return scale

    def levels(self, parts: Parts) -> Levels:
        scale = parts[_SCALES]
        return Levels(scale, torch.zeros_like(scale), self._low, self._high)

    def codes(self, parts: Parts) -> Tensor:
        return parts[_CODES].to(torch.int16)

    def with_codes(self, parts: Parts, codes: Tensor) -> Parts:
        return {_CODES: codes.to(torch.int8), _SCALES: parts[_SCALES]}

    def with_levels(self, levels: Levels, columns: int) -> Parts:
        codes = torch.zeros(len(levels.scale), columns, dtype=torch.int8)
        return {_CODES: codes, _SCALES: levels.scale.float().contiguous()}


def codes_and_scales(parts: Parts) -> tuple[Tensor, Tensor]:
    """What is stored: codes, int8 [rows, columns], and scales, float32 [rows, groups]."""
    return parts[_CODES], parts[_SCALES]


GRIDS = {
    grid.name: grid
    for grid in (
        IntGrid("int8_channel", 8, None),
        IntGrid("int8_g32", 8, _GROUP),
        IntGrid("int4_g32", 4, _GROUP),
        IntGrid("int3_g32", 3, _GROUP),
        IntGrid("int2_g32", 2, _GROUP),
    )
}
