"""An encoder-decoder's sequence on an ONNX bundle: the source's K and V beside those of the decoder's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import EncoderFacts, past_names, present_names
from skipstone.errors import EngineError
from skipstone.runtimes.engines.base import Settled
from skipstone.runtimes.engines.onnxruntime.cache import CacheLimits, OnnxRuntimeCache, tree_in_sight
from skipstone.runtimes.engines.onnxruntime.parts import Part
from skipstone.runtimes.engines.onnxruntime.store import KeyValueStore
from skipstone.runtimes.engines.onnxruntime.table import Table
from skipstone.runtimes.engines.slots import is_chain
from skipstone.runtimes.rows import RowTree

_HIDDEN = -1  # no distance: out of sight
FloatArray = NDArray[np.float32]


class OnnxRuntimeSourceCache(OnnxRuntimeCache):
    """See `skipstone.runtimes.engines.base.SourceCache`; the rest is as `OnnxRuntimeCache`.

    Args:
        parts: by name, those of the encoder too.
        table: embeddings, of source and text alike.
        store: of the decoder's K and V, used by no other cache.
        tree: the session's rows.
        last: index of the last segment.
        limits: what it can hold.
        encoder: says which parts `encoder_0`, … there are, and how long a source may be.
        layers: numbers of the layers, by segment.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        table: Table,
        store: KeyValueStore,
        tree: RowTree,
        last: int,
        limits: CacheLimits,
        encoder: EncoderFacts,
        layers: Mapping[int, Sequence[int]],
    ) -> None:
        super().__init__(parts, table, store, tree, last, limits)
        self._edges, self._longest = (*encoder.exits, encoder.num_layers), encoder.max_source_length
        self._layers = layers
        self._source: dict[int, dict[str, FloatArray]] = {}

    def encode(self, source: Sequence[int], settled: Settled | None = None) -> int:
        count = len(source)
        if not 1 <= count <= self._longest:
            raise EngineError(
                f"source of {count} tokens: the graphs take 1 to {self._longest}",
                hint="export with a longer --max-source-length or split the text",
            )
        self._source = {}
        hidden = self.embed(source)[None]
        for index, edge in enumerate(self._edges):
            before = hidden
            (hidden,) = self._parts[f"encoder_{index}"].run(count, {"hidden": before})
            if edge != self._edges[-1] and settled is not None and settled(edge, before[0], hidden[0]):
                break
        self._keep(self._parts["cross"].run(count, {"hidden": hidden}))
        return edge

    def close(self) -> None:
        super().close()
        self._source = {}

    def _keep(self, present: Sequence[FloatArray]) -> None:
        """Keep the source's K and V, which come layer by layer, under the names that the segments know them by."""
        made = dict(zip(present_names(range(len(present) // 2), "encoder"), present, strict=True))
        for segment, layers in self._layers.items():
            names = zip(past_names(layers, "encoder"), present_names(layers, "encoder"), strict=True)
            self._source[segment] = {taken: made[given] for taken, given in names}

    def _inputs(self, segment: int, rows: Sequence[int], width: int) -> dict[str, NDArray[Any]]:
        if not self._source:
            raise EngineError("no source was encoded", hint="encode one before the first row is run")
        return {"distances": self._distances(rows, width), **self._source[segment]}

    def _distances(self, rows: Sequence[int], width: int) -> NDArray[np.int32]:
        """How far before each row what it sees stands: the slots first, then the batch. Rows that only fill it up see
        themselves.
        """
        tree, capacity, count = self._tree, self._store.capacity, len(rows)
        found = np.full((width, capacity + width), _HIDDEN, np.int32)
        past, own = found[:count, :capacity], found[:, capacity:]
        own[range(width), range(width)] = 0
        chain = is_chain(tree, rows)
        seen = tree.base + rows[0] if chain else tree.base
        positions = np.array([tree.base + tree.depths[row] for row in rows], np.int32)[:, None]
        past[:, :seen] = positions - np.arange(seen, dtype=np.int32)
        if chain:
            own[:count, :count] = np.maximum(positions - positions[:, 0], _HIDDEN)
            return found
        for index, column, distance in tree_in_sight(tree, rows, capacity):
            found[index, column] = distance
        return found
