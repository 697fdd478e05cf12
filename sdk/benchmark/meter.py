"""An engine that counts what it is asked to run: bytes of weights read, and what the cost curve predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import (
    Bundle,
    ExecuTorchManifest,
    GgufManifest,
    GraphsEntry,
    OnnxManifest,
    ProgramEntry,
    SegmentEntry,
    manifest_of,
)
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.engines.base import Cache, Engine, Settled, SourceCache
from skipstone.runtimes.engines.llamacpp.embedding import table_bytes
from skipstone.runtimes.rows import RowTree

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class PartBytes:
    """Bytes of weights that one call reads: of each segment, and of the draft head."""

    segments: tuple[int, ...]
    draft_head: int


def part_bytes(bundle: Bundle) -> PartBytes:
    """Sizes of a bundle's parts. A table that only serves to look embeddings up is not counted."""
    manifest = bundle.manifest
    if isinstance(manifest, ExecuTorchManifest):
        return _method_bytes(manifest.program, len(manifest.exits) + 1)
    if isinstance(manifest, OnnxManifest):
        return _method_bytes(manifest.graphs, len(manifest.exits) + 1)
    manifest = manifest_of(bundle, GgufManifest)
    sizes = {entry.path: entry.size for entry in manifest.files}
    table = manifest.embedding
    lookup_only = 0 if manifest.model.tied_embeddings else table_bytes(table)

    def size(segment: SegmentEntry) -> int:
        return sizes[segment.file] - (lookup_only if segment.file == table.file else 0)

    head = 0 if manifest.draft_head is None else sizes[manifest.draft_head.file]
    return PartBytes(tuple(size(segment) for segment in manifest.segments), head)


def placed_bytes(owners: Sequence[Bundle], drafts: Bundle) -> PartBytes:
    """The same where segments come from several bundles.

    Args:
        owners: the bundle of each segment.
        drafts: the bundle of the draft head.
    """
    segments = (part_bytes(owner).segments[index] for index, owner in enumerate(owners))
    return PartBytes(tuple(segments), part_bytes(drafts).draft_head)


def _method_bytes(program: ProgramEntry | GraphsEntry, num_segments: int) -> PartBytes:
    """The last segment is read together with the head."""
    segments = [program.weight_bytes(f"segment_{index}") for index in range(num_segments)]
    segments[-1] += program.weight_bytes("head")
    return PartBytes(tuple(segments), program.weight_bytes("draft_head"))


@dataclass
class Meter:
    """What was run since the last reset.

    Attributes:
        predicted_seconds: sum over the calls of what the cost curve says for their part and width.
        bytes_read: sum over the calls of their part's size; every weight of a part is read once a call.
    """

    predicted_seconds: float = 0.0
    bytes_read: int = 0

    def reset(self) -> None:
        """Start counting afresh."""
        self.predicted_seconds, self.bytes_read = 0.0, 0


class MeteredEngine:
    """See `skipstone.runtimes.engines.base.Engine`; passes everything on and counts.

    Args:
        engine: the real one; not closed with this.
        costs: its cost model.
        sizes: of its parts.
    """

    def __init__(self, engine: Engine, costs: CostModel, sizes: PartBytes) -> None:
        self._engine, self._costs, self._sizes = engine, costs, sizes
        self.meter = Meter()
        self.encoder = engine.encoder
        self.hidden_size, self.vocab_size, self.exits = engine.hidden_size, engine.vocab_size, engine.exits
        self.draft_vocabulary, self.max_context_length = engine.draft_vocabulary, engine.max_context_length

    def open_cache(self, context_length: int, tree: RowTree) -> Cache:
        cache = self._engine.open_cache(context_length, tree)
        return _MeteredCache(cache, self.exits, self.meter, self._costs, self._sizes)

    def close(self) -> None:
        return None


class _MeteredCache:
    """See `skipstone.runtimes.engines.base.SourceCache`. The encoder is not metered: it runs before the first token."""

    def __init__(
        self, cache: Cache, exits: Sequence[int], meter: Meter, costs: CostModel, sizes: PartBytes
    ) -> None:
        self._cache, self._meter, self._sizes = cache, meter, sizes
        self.context_length, self.max_width, self.max_branches = (
            cache.context_length,
            cache.max_width,
            cache.max_branches,
        )
        self.embed, self.commit, self.rewind, self.close = (
            cache.embed,
            cache.commit,
            cache.rewind,
            cache.close,
        )
        widths = range(cache.max_width + 1)
        edges = [0, *exits]
        self._segment_seconds = [
            [costs.run(start, stop, width) for width in widths] for start, stop in pairwise(edges)
        ]
        self._head_seconds = [costs.draft(0, edges[1], n) - costs.run(0, edges[1], n) for n in widths]

    def encode(self, source: Sequence[int], settled: Settled | None = None) -> int:
        return cast(SourceCache, self._cache).encode(source, settled)

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        self._meter.predicted_seconds += self._segment_seconds[segment][len(rows)]
        self._meter.bytes_read += self._sizes.segments[segment]
        return self._cache.run(segment, rows, hidden, wanted)

    def draft_logits(self, hidden: Sequence[FloatArray]) -> FloatArray:
        self._meter.predicted_seconds += self._head_seconds[len(hidden)]
        self._meter.bytes_read += self._sizes.draft_head
        return self._cache.draft_logits(hidden)
