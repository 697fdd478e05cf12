"""A lane of an encoder-decoder: its rows attend to a source as well.

llama.cpp lets a decoder attend to what the same context's encoder gave, so every segment's file carries encoder layers
that only pass the source's hidden states on to the encoder's final norm (`exporters/formats/gguf/cut_t5.py`). Computing
even those would cost as much as the real encoder. They are therefore left out: the graph is stopped at its first node,
with the finished states written to where its last node would have put them. What llama.cpp then holds is compared with
what was meant; where it is something else (a graph split over devices), the layers are computed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import EngineError
from skipstone.runtimes.engines.llamacpp.batch import numbered
from skipstone.runtimes.engines.llamacpp.lane import Lane, LaneOptions, Part
from skipstone.runtimes.engines.llamacpp.library import FLOAT_BYTES, library
from skipstone.runtimes.engines.llamacpp.thread import undisturbed
from skipstone.runtimes.engines.llamacpp.watch import (
    NORMED_RESULT,
    RESULT,
    Action,
    Watch,
    exact_gelu,
    write_rows,
)

FloatArray = NDArray[np.float32]

_TOLERANCE = 1e-3


class CrossLane(Lane):
    """See the module. Rows can be decoded once a source was taken in."""

    _watch: Watch

    def __init__(self, part: Part, output: str, context_length: int, options: LaneOptions) -> None:
        self._num_sequences, self._source_length = options.max_branches, options.source_length
        self._states: tuple[FloatArray, FloatArray] | None = None
        self._attending = 0  # sequences whose rows attend to the source
        self._distance: int | None = None  # bytes from the first node of the encoder's graph to its last
        super().__init__(part, output, context_length, options)
        self._find_distance()

    def take_in(self, hidden: FloatArray, normed: FloatArray) -> None:
        """Let the rows of all sequences attend to a source.

        Args:
            hidden: the source's hidden states after the encoder's last layer, float32 [n, hidden_size].
            normed: the same after the encoder's final norm.

        Raises:
            EngineError: more rows than a source may have, or the engine refused.
        """
        if not 1 <= len(hidden) <= self._source_length:
            raise EngineError(f"source of {len(hidden)} tokens: this lane takes 1 to {self._source_length}")
        self._states = None
        self.clear()
        self._let_attend(hidden, normed, 1)
        self._states = hidden, normed

    def take_in_anything(self, count: int) -> None:
        """Let rows attend to `count` states of no meaning, for measurements."""
        ones = np.ones((count, self.part.hidden_size), np.float32)
        self._encode(ones, self._num_sequences)
        self._states, self._attending = (ones, ones), self._num_sequences

    def open_to_trees(self) -> None:
        """Let the rows of all sequences attend to the source, not the context's alone. Every tag costs time, and many
        texts are never drafted as trees. To be called before any branch is forked. K/V stay.
        """
        if self._states is None or self._attending == self._num_sequences:
            return
        others = range(1, self._num_sequences)
        # llama.cpp couples the sequences of a token only where they have come equally far, and goes on behind that
        for sequence in others:
            self.copy_sequence(0, sequence, -1, -1)
        self._let_attend(*self._states, self._num_sequences)
        for sequence in others:
            self.cut_sequence(sequence, -1)

    def decode(self, count: int) -> None:
        if self._states is None:
            raise EngineError(f"{self.part.path.name}: no source was encoded")
        super().decode(count)

    def _let_attend(self, hidden: FloatArray, normed: FloatArray, num_sequences: int) -> None:
        """Give llama.cpp the states as its encoder's, for the rows of the first so many sequences. K/V stay."""
        arrived = False
        if self._distance is not None:
            self._watch.at_first_node(lambda first: self._put_in(first, normed))
            self._encode(hidden, num_sequences)
            arrived = self._holds(normed)
        if not arrived:
            self._distance = None
            self._encode(hidden, num_sequences)
            if not self._holds(normed):
                raise EngineError(f"{self.part.path.name}: the source did not arrive in this segment")
        self._attending = num_sequences

    def _watched(self, options: LaneOptions) -> Watch:
        actions: dict[bytes, Action] = {RESULT: self._tap.keep} if self.output == "callback" else {}
        return Watch(actions | (exact_gelu(self.part.num_layers) if options.exact else {}))

    def _context_width(self, options: LaneOptions) -> int:
        return max(options.max_width, options.source_length)

    def _find_distance(self) -> None:
        """Compute the encoder's layers once, on one row, to see where the graph's first and last node lie. All graphs
        of a context are built in the same order in the same kind of memory, so their distance stays.
        """
        places: list[int] = []
        self._watch.see_all(
            lambda tensor, name: places.append(tensor) if not places or name == NORMED_RESULT else None
        )
        self._encode(np.zeros((1, self.part.hidden_size), np.float32), 1)
        self._watch.see_all(None)
        if len(places) == 2:
            self._distance = places[1] - places[0]

    def _put_in(self, first: int, normed: FloatArray) -> bool:
        """Write the finished states to the graph's last node; whether the graph is to be computed after all."""
        base = library().ggml_base
        last = first + (self._distance or 0)
        if base.ggml_get_name(last) != NORMED_RESULT or base.ggml_nbytes(last) != normed.size * FLOAT_BYTES:
            return True
        write_rows(last, normed)
        return False

    def _encode(self, hidden: FloatArray, num_sequences: int) -> None:
        # Positions mean nothing to idle layers, but must continue the text's.
        begin = self._llama.llama_memory_seq_pos_max(self._memory, 0) + 1
        batch = numbered(hidden, num_sequences, begin)
        status = undisturbed(lambda: self._llama.llama_encode(self._context, batch.handle))
        if status != 0:
            raise EngineError(f"{self.part.path.name}: llama_encode gave {status} for {len(hidden)} rows")

    def _holds(self, normed: FloatArray) -> bool:
        """Whether the context's rows attend to these states."""
        found = self.embedded(len(normed))
        return bool(np.allclose(found, normed, atol=_TOLERANCE * max(float(np.abs(normed).max()), 1.0)))
