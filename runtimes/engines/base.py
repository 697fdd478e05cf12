"""What an engine offers: weights cut at the exits, and caches that run rows through one segment at a time.

An engine is weights; a cache is the K/V of one sequence. The session (`skipstone.runtimes.session`) owns the
bookkeeping of rows and asks the cache for exactly three things: run these rows through one segment, make this path
the context, forget everything past a length. A new engine is one module with these two classes and one line in
`skipstone.runtimes.engines`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import EncoderFacts
from skipstone.runtimes.rows import RowTree

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class Share:
    """What of a model an engine is asked to run; the rest runs on others (`skipstone.runtimes.engines.placed`).

    An engine may load more than its share, but is never asked for it. Of an encoder-decoder, the encoder is every
    engine's own.

    Attributes:
        segments: their indices.
        draft_head: whether it gives the draft logits.
    """

    segments: frozenset[int]
    draft_head: bool


class Cache(Protocol):
    """K/V of one sequence, and the computation on it. Not for several threads at once.

    The rows of the tree may have run through other segments elsewhere: a cache is told of every commit and rewind, and
    holds of it what it ran itself.
    """

    @property
    def context_length(self) -> int:
        """Positions this cache can hold, drafts included."""

    @property
    def max_width(self) -> int:
        """Most rows one `run` takes."""

    @property
    def max_branches(self) -> int:
        """Most leaves an uncommitted tree may have."""

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        """Hidden states that enter segment 0, [n, hidden_size]."""

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        """Run rows through one segment and keep their K/V.

        Args:
            segment: index of the segment.
            rows: row ids of the tree given to `Engine.open_cache`, ancestors before descendants; every ancestor has
                run through this segment before or stands in the same call.
            hidden: the rows' hidden states, n arrays of [hidden_size].
            wanted: for the last segment, the rows whose logits are needed; ignored elsewhere.

        Returns:
            Hidden states [n, hidden_size], or for the last segment logits [number wanted, vocab_size]. The caller
            owns the array.

        Raises:
            ContextFullError: no room for that many rows. The cache is unchanged.
            EngineError: the engine refused.
        """

    def draft_logits(self, hidden: Sequence[FloatArray]) -> FloatArray:
        """Final norm and draft head over hidden states at any exit, [n, draft vocabulary]."""

    def commit(self, path: Sequence[int]) -> None:
        """Make the path (rows from the first uncommitted one down) the context; all other rows' K/V vanish.

        Called before the tree is renumbered. Rows of the path may lag: their K/V exist only in the segments they ran.
        """

    def rewind(self, length: int) -> None:
        """Drop every position at and past `length`, in all segments. No uncommitted rows exist when this is called."""

    def close(self) -> None:
        """Free the K/V. Idempotent."""


# (inner exit reached, hidden states before the segment, after it; both [n, hidden_size]) → stop here
Settled = Callable[[int, FloatArray, FloatArray], bool]


class SourceCache(Cache, Protocol):
    """The cache of an encoder-decoder: its rows are the decoder's, and attend to one source as well."""

    def encode(self, source: Sequence[int], settled: Settled | None = None) -> int:
        """Run the encoder over a source and let every later row attend to it. No positions are held when this is called.

        Args:
            source: token ids, 1 to `EncoderFacts.max_source_length` of them.
            settled: asked at every inner exit of the encoder whether to stop there; None: never.

        Returns:
            The number of encoder layers that were run.

        Raises:
            EngineError: the engine refused. What was encoded before is lost.
        """


class Engine(Protocol):
    """Weights of one model, cut at its exits."""

    @property
    def encoder(self) -> EncoderFacts | None:
        """Of an encoder-decoder, whose caches are `SourceCache`s; None: a decoder alone."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def exits(self) -> tuple[int, ...]:
        """Layer counts at which rows can stop, ascending; the last one is the number of layers.

        Segment k runs layers exits[k-1] (0 for the first) up to exits[k].
        """

    @property
    def draft_vocabulary(self) -> IntArray | None:
        """Token id of every row of the draft head; None: there is no draft head, inner exits give no logits."""

    @property
    def max_context_length(self) -> int:
        """Positions the model was trained for."""

    def open_cache(self, context_length: int, tree: RowTree) -> Cache:
        """A fresh cache whose rows are described by `tree`."""

    def close(self) -> None:
        """Free the weights. Idempotent."""
