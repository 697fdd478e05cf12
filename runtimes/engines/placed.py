"""One model on several engines: every segment runs on one of them.

Segments exchange plain hidden states, and all engines read the same tree of rows. So an engine made of engines hands
every call to the owner of the segment, and tells all of them what was committed: each keeps K/V of the rows that ran
through its own segments, and rows that lag are caught up wherever they lag.

    >>> placement = Placement((gguf, executorch), owners=(1, 0, 0))
    >>> engine = open_placed(placement, EngineOptions())       # segment 0 on ExecuTorch, the rest on llama.cpp
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import EncoderFacts
from skipstone.errors import SkipstoneError
from skipstone.runtimes.engines.base import Cache, Engine, Settled, Share, SourceCache
from skipstone.runtimes.rows import RowTree

FloatArray = NDArray[np.float32]
Open = Callable[[int, Share], Engine]


class PlacedEngine:
    """See `skipstone.runtimes.engines.base.Engine`.

    Args:
        owners: for every segment, the number of the engine that runs it.
        open_engine: opens an engine by its number, for its share of the model; numbers that own nothing are never asked
            for. The engines must have the same exits, hidden size and vocabulary.
        drafts: number of the engine that gives the draft logits; None: the first segment's owner. Where that one has no
            draft head, another does that has one.
        placement: names what runs where.

    Raises:
        SkipstoneError: as the engines'; those opened before are closed again.
    """

    def __init__(
        self, owners: Sequence[int], open_engine: Open, drafts: int | None = None, placement: str = ""
    ) -> None:
        self._owners, self._drafts, self.placement = tuple(owners), None, placement
        self._engines: dict[int, Engine] = {}
        chosen = self._owners[0] if drafts is None else drafts
        try:
            for number in sorted({*self._owners, chosen}, key=lambda number: number != chosen):
                share = Share(
                    frozenset(k for k, owner in enumerate(self._owners) if owner == number),
                    self._drafts is None,
                )
                self._engines[number] = engine = open_engine(number, share)
                if self._drafts is None and engine.draft_vocabulary is not None:
                    self._drafts = number
        except SkipstoneError:
            self.close()
            raise
        engines = list(self._engines.values())
        first = self._engines[self._owners[0]]
        self.hidden_size, self.vocab_size, self.exits = first.hidden_size, first.vocab_size, first.exits
        self.max_context_length = min(engine.max_context_length for engine in engines)
        self.encoder = _common_encoder([engine.encoder for engine in engines])
        self.draft_vocabulary = None if self._drafts is None else self._engines[self._drafts].draft_vocabulary
        self.threads = max(int(getattr(engine, "threads", 1)) for engine in engines)
        self.kv_type = str(getattr(self._engines.get(0, first), "kv_type", "f32"))

    @property
    def drafts(self) -> int | None:
        """Number of the engine that gives the draft logits; None: there is no draft head."""
        return self._drafts

    @property
    def engines(self) -> Mapping[int, Engine]:
        """The engines in use, by number."""
        return self._engines

    def open_cache(self, context_length: int, tree: RowTree) -> PlacedCache:
        caches: dict[int, Cache] = {}
        try:
            for number, engine in self._engines.items():
                caches[number] = engine.open_cache(context_length, tree)
        except SkipstoneError:
            for cache in caches.values():
                cache.close()
            raise
        return PlacedCache(caches, self._owners, self._drafts)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()


class PlacedCache:
    """See `skipstone.runtimes.engines.base.Cache`, and `SourceCache` where the engines are encoder-decoders.

    Args:
        caches: one for each engine, on the same tree of rows.
        owners: for every segment, whose cache runs it.
        drafts: whose cache gives the draft logits, if any.
    """

    def __init__(self, caches: Mapping[int, Cache], owners: Sequence[int], drafts: int | None) -> None:
        self._caches = tuple(caches.values())
        self._owners = tuple(caches[number] for number in owners)
        self._drafts = None if drafts is None else caches[drafts]
        self.context_length = min(cache.context_length for cache in self._caches)
        self.max_width = min(cache.max_width for cache in self._caches)
        self.max_branches = min(cache.max_branches for cache in self._caches)
        self.embed = self._owners[0].embed

    def encode(self, source: Sequence[int], settled: Settled | None = None) -> int:
        """Every engine reads the source with its own encoder; all stop where the first segment's owner does."""
        first = cast(SourceCache, self._owners[0])
        layers = first.encode(source, settled)
        for cache in self._caches:
            if cache is not first:
                cast(SourceCache, cache).encode(source, lambda reached, _before, _after: reached >= layers)
        return layers

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        return self._owners[segment].run(segment, rows, hidden, wanted)

    def draft_logits(self, hidden: Sequence[FloatArray]) -> FloatArray:
        if self._drafts is None:
            raise ValueError("these bundles have no draft head")
        return self._drafts.draft_logits(hidden)

    def commit(self, path: Sequence[int]) -> None:
        for cache in self._caches:
            cache.commit(path)

    def rewind(self, length: int) -> None:
        for cache in self._caches:
            cache.rewind(length)

    def close(self) -> None:
        for cache in self._caches:
            cache.close()


def _common_encoder(encoders: Sequence[EncoderFacts | None]) -> EncoderFacts | None:
    """The encoder that takes sources as long as all engines' take."""
    known = [encoder for encoder in encoders if encoder is not None]
    if len(known) < len(encoders):
        return None
    return min(known, key=lambda encoder: encoder.max_source_length)
