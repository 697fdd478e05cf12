"""A text through graphs of fixed shapes whose K and V the host keeps, whatever computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.exporters.segments import HeadShape

Array = NDArray[Any]
FloatArray = NDArray[np.float32]
Call = Callable[[str, Sequence[Array]], Sequence[FloatArray]]

# Added to the scores of what a row may not see: far below them, and near enough that integers tell scores apart.
MASKED = -64.0


class GraphWalk:
    """One context at a time, from its first position on.

    Args:
        call: runs a part (`segment_0`, …, `head`, `draft_head`) on its inputs.
        shapes: of K and V of every layer, by segment.
        table: embeddings [vocabulary, hidden size].
        width: rows of the graphs.
        slots: positions of K/V.
    """

    def __init__(
        self, call: Call, shapes: Sequence[Sequence[HeadShape]], table: Array, width: int, slots: int
    ) -> None:
        self._call, self._shapes, self._table = call, shapes, table
        self._width, self._slots = width, slots
        self.begin()

    def begin(self) -> None:
        """Forget the context."""
        self._length = 0
        self._past = [
            [
                np.zeros((1, shape.heads, self._slots, shape.size), np.float32)
                for shape in shapes
                for _ in range(2)
            ]
            for shapes in self._shapes
        ]

    def logits(self, tokens: Sequence[int], *, draft: str | None = None) -> FloatArray:
        """Continue the context by at most `width` tokens; logits [n, vocabulary] behind each.

        Args:
            tokens: n of them.
            draft: a head to run behind every segment but the last as well, for whoever watches `call`.
        """
        count, length = len(tokens), self._length
        hidden = np.zeros((1, self._width, self._table.shape[1]), np.float32)
        hidden[0, :count] = self._table[list(tokens)]
        positions = np.zeros((1, self._width), np.int32)
        positions[0, :count] = range(length, length + count)
        mask = chain_mask(count, length, self._width, self._slots)
        for index, past in enumerate(self._past):
            hidden, *present = self._call(f"segment_{index}", [hidden, positions, mask, *past])
            for kept, new in zip(past, present, strict=True):
                kept[:, :, length : length + count] = new[:, :, :count]
            if draft is not None and index + 1 < len(self._past):
                self._call(draft, [hidden])
        self._length += count
        return self._call("head", [hidden])[0][0, :count]


def chain_mask(count: int, length: int, width: int, slots: int) -> FloatArray:
    """The mask [1, 1, width, slots + width] of a chain of `count` rows behind `length` positions."""
    mask = np.full((1, 1, width, slots + width), MASKED, np.float32)
    mask[0, 0, :count, :length] = 0.0
    mask[0, 0, :count, slots : slots + count][np.tri(count, dtype=bool)] = 0.0
    own = slots + np.arange(width)
    mask[0, 0, range(width), own] = 0.0  # rows that only fill the batch up see themselves
    return mask
