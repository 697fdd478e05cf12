"""K/V of one sequence in a program's static buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.runtimes.engines.executorch.program import Program
from skipstone.runtimes.engines.slots import check_room, is_chain, moves_of
from skipstone.runtimes.rows import RowTree

FloatArray = NDArray[np.float32]
_HIDDEN = np.float32("-inf")


@dataclass(frozen=True)
class CacheLimits:
    """What a cache can hold.

    Attributes:
        context_length: positions, drafts included.
        slots: of the program's buffer.
        max_width: of the program.
        reference_width: least width that is run.
    """

    context_length: int
    slots: int
    max_width: int
    reference_width: int


class ExecuTorchCache:
    """See `skipstone.runtimes.engines.base.Cache`.

    Positions below `tree.base` lie in the slots of their number, row r in slot base + r. A chain that continues the
    context takes the program's causal kernel, anything else a mask over all slots. Batches narrower than the reference
    width are filled up with rows whose K/V go to slots behind the context, where nobody looks.

    Args:
        program: a loaded program that no other cache uses.
        release: called with the program when the cache is closed.
        num_segments: methods `segment_0`, … of the program.
        tree: the session's rows.
        limits: what it can hold.
    """

    def __init__(
        self,
        program: Program,
        release: Callable[[Program], None],
        num_segments: int,
        tree: RowTree,
        limits: CacheLimits,
    ) -> None:
        self.context_length, self.max_width = limits.context_length, limits.max_width
        self.max_branches = limits.max_width
        self._program, self._release, self._tree = program, release, tree
        self._last, self._slots, self._least = num_segments - 1, limits.slots, limits.reference_width
        self._segment_names = tuple(f"segment_{index}" for index in range(num_segments))
        self._batches: dict[int, Batch] = {}
        self._open = True

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        return self._program.call("embed", len(tokens), np.array([tokens], np.int64))

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        tree, count = self._tree, len(rows)
        check_room(tree, self.context_length)
        batch, base = self._batch(hidden), tree.base
        width = batch.width
        batch.slots[0, :count] = [base + row for row in rows]
        batch.slots[0, count:] = range(self._slots - (width - count), self._slots)
        inputs = self._inputs(rows, batch)
        out = self._program.call(self._segment_names[segment], width, batch.hidden, *inputs)[:count]
        if segment < self._last:
            return out
        asked = [out[index] for index in range(count) if wanted[index]]
        return self._head("head", asked) if asked else np.empty((0, 0), np.float32)

    def draft_logits(self, hidden: Sequence[FloatArray]) -> FloatArray:
        return self._head("draft_head", hidden)

    def commit(self, path: Sequence[int]) -> None:
        sources, targets = moves_of(self._tree, path)
        if sources:
            self._program.compact(sources, targets)

    def rewind(self, length: int) -> None:
        """Nothing to do: slots past the context are out of every row's sight until they are written again."""

    def close(self) -> None:
        if self._open:
            self._open = False
            self._program.unpin()
            self._release(self._program)

    def _head(self, method: str, hidden: Sequence[FloatArray]) -> FloatArray:
        batch = self._batch(hidden)
        return self._program.call(method, batch.width, batch.hidden)[: len(hidden)]

    def _batch(self, hidden: Sequence[FloatArray]) -> Batch:
        """The arrays of the width that so many rows are run in, their hidden states filled in."""
        count = len(hidden)
        width = max(count, self._least)
        batch = self._batches.get(width)
        if batch is None:
            batch = self._batches[width] = Batch(width, len(hidden[0]))
            self._program.pin(*batch.arrays)
        for index, state in enumerate(hidden):
            batch.hidden[0, index] = state
        batch.hidden[0, count:] = 0.0
        return batch

    def _inputs(self, rows: Sequence[int], batch: Batch) -> tuple[NDArray[Any], ...]:
        """What a segment's method takes beside the hidden states; the batch's slots are filled in."""
        tree = self._tree
        batch.positions[0, : len(rows)] = [tree.base + tree.depths[row] for row in rows]
        chain = is_chain(tree, rows)
        batch.start[0] = tree.base + rows[0] if chain else 0
        batch.tree[0] = not chain
        mask = batch.unread if chain else self._mask(rows, batch.width)
        return batch.positions, batch.slots, batch.start, mask, batch.tree

    def _mask(self, rows: Sequence[int], width: int) -> FloatArray:
        """Where each row may look, up to the last slot of them; rows that only fill the batch up see the first one."""
        tree = self._tree
        mask = np.full((width, tree.base + max(rows) + 1), _HIDDEN, np.float32)
        mask[:, : tree.base] = 0.0
        for index, row in enumerate(rows):
            mask[index, [tree.base + ancestor for ancestor in tree.path(row)]] = 0.0
        mask[len(rows) : width, 0] = 0.0
        return mask


class Batch:
    """The arguments of a segment's method for one width: made once, filled anew for every call.

    Args:
        width: rows.
        hidden_size: channels of a row.
    """

    def __init__(self, width: int, hidden_size: int) -> None:
        self.width = width
        self.hidden = np.zeros((1, width, hidden_size), np.float32)
        self.positions, self.slots = np.zeros((1, width), np.int64), np.zeros((1, width), np.int64)
        self.start, self.tree = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self.unread = np.zeros((width, 1), np.float32)

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """All of them."""
        return self.hidden, self.positions, self.slots, self.start, self.tree, self.unread
