"""K/V of one sequence in a program's static buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import ContextFullError
from skipstone.runtimes.engines.executorch.program import Program
from skipstone.runtimes.rows import RowTree

FloatArray = NDArray[np.float32]
_HIDDEN = np.float32("-inf")


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
        context_length: positions.
        slots: of the program's buffer.
        max_width: of the program.
        reference_width: least width that is run.
    """

    def __init__(
        self,
        program: Program,
        release: Callable[[Program], None],
        num_segments: int,
        tree: RowTree,
        *,
        context_length: int,
        slots: int,
        max_width: int,
        reference_width: int,
    ) -> None:
        self.context_length, self.max_width, self.max_branches = context_length, max_width, max_width
        self._program, self._release, self._tree = program, release, tree
        self._last, self._slots, self._least = num_segments - 1, slots, reference_width
        self._unread = np.zeros((max_width, 1), np.float32)
        self._open = True

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        return self._program.call("embed", len(tokens), np.array([tokens], np.int64))

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        tree, count = self._tree, len(rows)
        if tree.base + len(tree) > self.context_length:
            raise ContextFullError(
                f"{tree.base + len(tree)} positions: the session holds {self.context_length}",
                hint="export with a longer --context-length or generate fewer tokens",
            )
        width = max(count, self._least)
        state = np.zeros((1, width, len(hidden[0])), np.float32)
        np.stack(list(hidden), out=state[0, :count])
        positions, slots = np.zeros((1, width), np.int64), np.empty((1, width), np.int64)
        positions[0, :count] = [tree.position(row) for row in rows]
        slots[0, :count] = [tree.base + row for row in rows]
        slots[0, count:] = range(self._slots - (width - count), self._slots)
        chain = _is_chain(tree, rows)
        start = np.array([slots[0, 0] if chain else 0], np.int64)
        mask = self._unread[:width] if chain else self._mask(rows, width)
        out = self._program.call(
            f"segment_{segment}",
            width,
            state,
            positions,
            slots,
            start,
            mask,
            np.array([int(not chain)], np.int64),
        )[:count]
        if segment < self._last:
            return out
        asked = [out[index] for index in range(count) if wanted[index]]
        return self._head("head", asked) if asked else np.empty((0, 0), np.float32)

    def draft_logits(self, hidden: Sequence[FloatArray]) -> FloatArray:
        return self._head("draft_head", hidden)

    def commit(self, path: Sequence[int]) -> None:
        base = self._tree.base
        moves = [(base + row, self._tree.position(row)) for row in path if self._tree.depths[row] != row]
        if moves:
            sources, targets = zip(*moves, strict=True)
            self._program.compact(sources, targets)

    def rewind(self, length: int) -> None:
        """Nothing to do: slots past the context are out of every row's sight until they are written again."""

    def close(self) -> None:
        if self._open:
            self._open = False
            self._release(self._program)

    def _head(self, method: str, hidden: Sequence[FloatArray]) -> FloatArray:
        count = len(hidden)
        width = max(count, self._least)
        state = np.zeros((1, width, len(hidden[0])), np.float32)
        np.stack(list(hidden), out=state[0, :count])
        return self._program.call(method, width, state)[:count]

    def _mask(self, rows: Sequence[int], width: int) -> FloatArray:
        """Where each row may look, up to the last slot of them; rows that only fill the batch up see the first one."""
        tree = self._tree
        mask = np.full((width, tree.base + max(rows) + 1), _HIDDEN, np.float32)
        mask[:, : tree.base] = 0.0
        for index, row in enumerate(rows):
            mask[index, [tree.base + ancestor for ancestor in tree.path(row)]] = 0.0
        mask[len(rows) : width, 0] = 0.0
        return mask


def _is_chain(tree: RowTree, rows: Sequence[int]) -> bool:
    """Whether the rows follow each other, and the first one everything before it."""
    first, depths, parents = rows[0], tree.depths, tree.parents
    return depths[first] == first and all(
        row == first + index and parents[row] == row - 1 for index, row in enumerate(rows)
    )
