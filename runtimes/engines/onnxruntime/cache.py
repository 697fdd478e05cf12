"""One sequence on an ONNX bundle: rows in batches, masks over slots, K and V on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import EngineError
from skipstone.runtimes.engines.onnxruntime.parts import Part
from skipstone.runtimes.engines.onnxruntime.store import KeyValueStore
from skipstone.runtimes.engines.onnxruntime.table import Table
from skipstone.runtimes.engines.slots import check_room, is_chain, moves_of
from skipstone.runtimes.rows import RowTree

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class CacheLimits:
    """What a cache can hold.

    Attributes:
        context_length: positions, drafts included.
        max_width: rows of a batch at most.
        masked: what is added to scores out of sight.
    """

    context_length: int
    max_width: int
    masked: float


class OnnxRuntimeCache:
    """See `skipstone.runtimes.engines.base.Cache`.

    Rows' K and V lie where `skipstone.runtimes.engines.slots` says. A batch attends to the slots and to its own rows,
    which are written to their slots afterwards.

    Args:
        parts: by name (`segment_0`, …, `head`, `draft_head`).
        table: embeddings.
        store: of K and V, used by no other cache.
        tree: the session's rows.
        last: index of the last segment.
        limits: what it can hold.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        table: Table,
        store: KeyValueStore,
        tree: RowTree,
        last: int,
        limits: CacheLimits,
    ) -> None:
        self.context_length, self.max_width = limits.context_length, limits.max_width
        self.max_branches = limits.max_width
        self._parts, self._table, self._store, self._tree = parts, table, store, tree
        self._last, self._masked = last, np.float32(limits.masked)

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        return self._table.rows(tokens)

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        tree, count = self._tree, len(rows)
        check_room(tree, self.context_length)
        part = self._parts[f"segment_{segment}"]
        width = part.width(count)
        inputs = {"hidden": _batch(hidden, width), **self._inputs(segment, rows, width)}
        out, *present = part.run(width, inputs | self._store.arrays[segment])
        self._store.write(segment, [tree.base + row for row in rows], present)
        if segment < self._last:
            return out[0, :count]
        asked = [state for state, want in zip(out[0], wanted, strict=False) if want]
        return self._head("head", asked) if asked else np.empty((0, 0), np.float32)

    def draft_logits(self, hidden: Sequence[FloatArray]) -> FloatArray:
        return self._head("draft_head", hidden)

    def commit(self, path: Sequence[int]) -> None:
        self._store.move(*moves_of(self._tree, path))

    def rewind(self, length: int) -> None:
        """Nothing to do: slots past the context are out of every row's sight until they are written again."""

    def close(self) -> None:
        self._parts, self._store = {}, KeyValueStore({}, 1, 1, 1, fixed=True)

    def _inputs(self, segment: int, rows: Sequence[int], width: int) -> dict[str, NDArray[Any]]:
        """What a segment is told of the rows, beside their hidden states and the past."""
        tree = self._tree
        positions = np.zeros((1, width), np.int32)
        positions[0, : len(rows)] = [tree.base + tree.depths[row] for row in rows]
        return {"positions": positions, "mask": self._mask(rows, width)}

    def _head(self, name: str, hidden: Sequence[FloatArray]) -> FloatArray:
        part = self._parts.get(name)
        if part is None:
            raise EngineError(f"{name}: this bundle has none", hint="export it with an inner exit")
        width = part.width(len(hidden))
        (logits,) = part.run(width, {"hidden": _batch(hidden, width)})
        return logits[0, : len(hidden)]

    def _mask(self, rows: Sequence[int], width: int) -> FloatArray:
        """Where each row may look: the slots first, then the batch; rows that only fill it up see themselves."""
        tree, capacity, count = self._tree, self._store.capacity, len(rows)
        mask = np.full((1, 1, width, capacity + width), self._masked, np.float32)
        past, own = mask[0, 0, :, :capacity], mask[0, 0, :, capacity:]
        own[range(width), range(width)] = 0.0
        if is_chain(tree, rows):
            past[:count, : tree.base + rows[0]] = 0.0
            own[:count, :count][np.tri(count, dtype=bool)] = 0.0
            return mask
        past[:count, : tree.base] = 0.0
        for index, column, _distance in tree_in_sight(tree, rows, capacity):
            mask[0, 0, index, column] = 0.0
        return mask


def tree_in_sight(tree: RowTree, rows: Sequence[int], capacity: int) -> Iterator[tuple[int, int, int]]:
    """What every row sees of the uncommitted tree: its number in the batch, a column, and how far before it that stands.

    Args:
        tree: the session's rows.
        rows: of the batch, which stand behind all slots in it.
        capacity: slots before them.
    """
    places = {row: capacity + index for index, row in enumerate(rows)}
    for index, row in enumerate(rows):
        for distance, ancestor in enumerate(reversed(tree.path(row))):
            yield index, places.get(ancestor, tree.base + ancestor), distance


def _batch(hidden: Sequence[FloatArray], width: int) -> FloatArray:
    """Hidden states [1, width, hidden_size], filled up with zeros."""
    batch = np.zeros((1, width, len(hidden[0])), np.float32)
    for index, state in enumerate(hidden):
        batch[0, index] = state
    return batch
