"""An encoder on llama.cpp: segments between its exits, each a context of its own, run one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import EngineError
from skipstone.runtimes.engines.base import Settled
from skipstone.runtimes.engines.llamacpp.batch import numbered
from skipstone.runtimes.engines.llamacpp.lane import LaneOptions, Part
from skipstone.runtimes.engines.llamacpp.library import library
from skipstone.runtimes.engines.llamacpp.pace import Paced, Threads
from skipstone.runtimes.engines.llamacpp.watch import NORMED_RESULT, RESULT, Tap, Watch, exact_gelu

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Encoded:
    """A source after so many of the encoder's layers: its hidden states, float32 [n, hidden_size], before and after the
    encoder's final norm.
    """

    layers: int
    hidden: FloatArray
    normed: FloatArray


class SourceEncoder:
    """The encoder's segments.

    Args:
        parts: their weights.
        stops: the number of layers that were run after each.
        options: how contexts are made.
    """

    def __init__(self, parts: Sequence[Part], stops: Sequence[int], options: LaneOptions) -> None:
        self._stops = tuple(stops)
        self._lanes: list[EncoderLane] = []
        try:
            for part in parts:
                self._lanes.append(EncoderLane(part, options))
        except EngineError:
            self.close()
            raise

    def encode(self, hidden: FloatArray, settled: Settled | None) -> Encoded:
        """Run the layers over a source's embeddings, [n, hidden_size].

        Args:
            hidden: the embeddings.
            settled: asked after every segment but the last whether to stop there.

        Raises:
            EngineError: the engine refused.
        """
        before = hidden
        for lane, stop in zip(self._lanes, self._stops, strict=True):
            after, normed = lane.run(before)
            if stop == self._stops[-1] or (settled is not None and settled(stop, before, after)):
                return Encoded(stop, after, normed)
            before = after
        raise EngineError("this encoder has no layers")

    def close(self) -> None:
        """Free the contexts. Idempotent."""
        for lane in self._lanes:
            lane.close()


class EncoderLane:
    """A context on a segment of the encoder. It keeps nothing between two sources."""

    def __init__(self, part: Part, options: LaneOptions) -> None:
        self._llama = library().llama
        self._part, self._width = part, options.source_length
        self._hidden, self._normed = Tap(part.hidden_size), Tap(part.hidden_size)
        actions = {RESULT: self._hidden.keep, NORMED_RESULT: self._normed.keep}
        self._watch = Watch(actions | (exact_gelu(part.num_layers) if options.exact else {}))
        params = self._llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self._width
        params.n_seq_max = 1
        params.n_threads, params.n_threads_batch = part.threads.one, part.threads.more
        params.flash_attn_type = 0
        params.no_perf = True
        params.cb_eval = self._watch.callback
        self._context = self._llama.llama_init_from_model(part.handle, params)
        if not self._context:
            raise EngineError(
                f"{part.path}: llama.cpp cannot make a context for sources of {self._width} tokens",
                hint="free memory, or export with a smaller --max-source-length",
            )

        self._paced = Paced(self._context, part.threads, part.pace)

    def set_threads(self, threads: Threads) -> None:
        """Compute with so many from now on."""
        self._paced.set_threads(threads)

    def run(self, hidden: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The layers over all rows of a source at once.

        Returns:
            Hidden states [n, hidden_size], and the same after the encoder's final norm.

        Raises:
            EngineError: no rows, more than a source may have, or the engine refused.
        """
        if not 1 <= len(hidden) <= self._width:
            raise EngineError(f"source of {len(hidden)} tokens: this encoder takes 1 to {self._width}")
        batch = numbered(hidden, 1)
        status = self._paced.run(len(hidden), lambda: self._llama.llama_encode(self._context, batch.handle))
        if status != 0:
            raise EngineError(f"{self._part.path.name}: llama_encode gave {status} for {len(hidden)} rows")
        return self._hidden.rows, self._normed.rows

    def close(self) -> None:
        """Free the context. Idempotent."""
        if self._context:
            self._llama.llama_free(self._context)
            self._context = None
