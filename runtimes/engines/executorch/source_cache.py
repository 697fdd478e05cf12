"""An encoder-decoder's sequence in a program: the source's K and V beside those of the decoder's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import EncoderFacts
from skipstone.errors import EngineError
from skipstone.runtimes.engines.base import Settled
from skipstone.runtimes.engines.executorch.cache import Batch, CacheLimits, ExecuTorchCache
from skipstone.runtimes.engines.executorch.program import Program
from skipstone.runtimes.engines.slots import is_chain
from skipstone.runtimes.rows import RowTree

IntArray = NDArray[np.int64]
_HIDDEN = -1  # no distance: out of sight


class ExecuTorchSourceCache(ExecuTorchCache):
    """See `skipstone.runtimes.engines.base.SourceCache`; the rest is as `ExecuTorchCache`.

    The source stays in the program when the cache is closed, but no other cache computes with it: each wants its own.

    Args:
        program: a loaded program that no other cache uses.
        release: called with the program when the cache is closed.
        num_segments: methods `segment_0`, … of the program.
        tree: the session's rows.
        limits: what it can hold.
        encoder: says which methods `encoder_0`, … there are, and how long a source may be.
    """

    def __init__(
        self,
        program: Program,
        release: Callable[[Program], None],
        num_segments: int,
        tree: RowTree,
        limits: CacheLimits,
        encoder: EncoderFacts,
    ) -> None:
        super().__init__(program, release, num_segments, tree, limits)
        self._edges, self._longest = (*encoder.exits, encoder.num_layers), encoder.max_source_length
        self._places = np.arange(max(limits.slots, self._longest))
        self._source = self._places[:0]

    def encode(self, source: Sequence[int], settled: Settled | None = None) -> int:
        count = len(source)
        if not 1 <= count <= self._longest:
            raise EngineError(
                f"source of {count} tokens: the program takes 1 to {self._longest}",
                hint="export with a longer --max-source-length or split the text",
            )
        self._source = self._places[:0]
        hidden = self._program.call("embed", count, np.array([source], np.int64))
        for index, edge in enumerate(self._edges):
            before, hidden = hidden, self._program.call(f"encoder_{index}", count, hidden[None])
            if edge != self._edges[-1] and settled is not None and settled(edge, before, hidden):
                break
        self._program.call("cross", count, hidden[None])
        self._source = self._places[:count]
        return edge

    def _inputs(self, rows: Sequence[int], batch: Batch) -> tuple[NDArray[Any], ...]:
        if not len(self._source):
            raise EngineError("no source was encoded", hint="encode one before the first row is run")
        return batch.slots, self._distances(rows, batch.width), self._source

    def _distances(self, rows: Sequence[int], width: int) -> IntArray:
        """How far before each row the rows in the slots stand, up to the last slot that one of them sees; rows that only
        fill the batch up see the first slot.
        """
        tree, base = self._tree, self._tree.base
        seen = self._places[: base + max(rows) + 1]
        found = np.full((width, len(seen)), _HIDDEN)
        positions = np.array([base + tree.depths[row] for row in rows])
        if is_chain(tree, rows):
            np.maximum(positions[:, None] - seen, _HIDDEN, out=found[: len(rows)])
        else:
            found[: len(rows), :base] = positions[:, None] - seen[:base]
            for index, row in enumerate(rows):
                path = tree.path(row)
                found[index, base + np.array(path)] = range(len(path) - 1, -1, -1)
        found[len(rows) :, 0] = 0
        return found
