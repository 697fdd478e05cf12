"""K and V of one sequence, in arrays of the host's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import past_names

FloatArray = NDArray[np.float32]
_STEP = 64


class KeyValueStore:
    """Two arrays [1, heads, slots, size] for every layer, by the names that the graphs give them.

    Args:
        layers: numbers of the layers, by segment.
        heads: key-value heads.
        size: channels of one.
        slots: that may be used.
        stack: see `skipstone.bundle.past_names`.
        fixed: whether all are always there; else they come in steps, as rows are written, so that what a call costs
            follows the context.
    """

    def __init__(
        self,
        layers: Mapping[int, Sequence[int]],
        heads: int,
        size: int,
        slots: int,
        *,
        stack: str = "",
        fixed: bool,
    ) -> None:
        self._slots, self.capacity = slots, slots if fixed else min(_STEP, slots)
        shape = (1, heads, self.capacity, size)
        self.arrays = {
            segment: {name: np.zeros(shape, np.float32) for name in past_names(found, stack)}
            for segment, found in layers.items()
        }

    def write(self, segment: int, slots: Sequence[int], present: Sequence[FloatArray]) -> None:
        """Keep rows' K and V.

        Args:
            segment: whose layers.
            slots: of the rows.
            present: in the order of the arrays, [1, heads, n or more, size]; what comes after n rows is left out.
        """
        self._make_room(max(slots) + 1)
        count, first = len(slots), slots[0]
        follow = all(slot == first + index for index, slot in enumerate(slots))
        where: slice | list[int] = slice(first, first + count) if follow else list(slots)
        for kept, new in zip(self.arrays[segment].values(), present, strict=True):
            kept[:, :, where] = new[:, :, :count]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy slots to other slots in every layer; all are read before one is written."""
        if not sources:
            return
        self._make_room(max(*sources, *targets) + 1)
        read, written = list(sources), list(targets)
        for arrays in self.arrays.values():
            for kept in arrays.values():
                kept[:, :, written] = kept[:, :, read]

    def _make_room(self, needed: int) -> None:
        if needed <= self.capacity:
            return
        before, self.capacity = self.capacity, min(-(-needed // _STEP) * _STEP, self._slots)
        for arrays in self.arrays.values():
            for name, kept in arrays.items():
                grown = np.zeros((1, kept.shape[1], self.capacity, kept.shape[3]), np.float32)
                grown[:, :, :before] = kept
                arrays[name] = grown
