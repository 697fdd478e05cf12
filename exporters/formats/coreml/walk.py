"""A text through a package's functions, from the first position of a context on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from skipstone.exporters.formats.coreml.convert import function_name
from skipstone.exporters.formats.coreml.evaluate import Array, FloatArray, Package
from skipstone.exporters.formats.onnx.modules import MASKED

Table = NDArray[np.floating]


class PackageWalk:
    """One sequence.

    Args:
        package: whose functions are called.
        segments: how many there are.
        table: embeddings [vocabulary, hidden size].
        slots: positions of K/V.
    """

    def __init__(self, package: Package, segments: int, table: Table, slots: int) -> None:
        self._package, self._table, self._slots = package, table, slots
        self._segments = [f"segment_{index}" for index in range(segments)]
        self._states: dict[str, dict[str, FloatArray]] = {}
        self._length = 0

    def logits(self, tokens: Sequence[int], width: int) -> FloatArray:
        """Continue the text by a chain in the function for `width` rows; logits [n, vocabulary] behind each token."""
        count = len(tokens)
        places = np.arange(self._length, self._length + count)
        sees = np.arange(self._slots) <= places[:, None]
        hidden = self.embed(tokens)
        for index in range(len(self._segments)):
            hidden = self.run(index, hidden, places, places, sees, width)
        self._length += count
        return self.head("head", hidden, width)

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        """Hidden states [n, hidden size]."""
        return np.asarray(self._table[list(tokens)], np.float32)

    def run(
        self, segment: int, hidden: FloatArray, positions: Array, slots: Array, sees: Array, width: int
    ) -> FloatArray:
        """Rows through one segment.

        Args:
            segment: index.
            hidden: [n, hidden size], n ≤ width.
            positions: of the rows in the text [n].
            slots: where their K and V go [n].
            sees: which slots each of them sees, bool [n, slots].
            width: of the function.
        """
        count, part = len(hidden), self._segments[segment]
        name = function_name(part, width)
        places = np.zeros((self._slots, width), np.float32)
        places[slots, np.arange(count)] = 1.0
        mask = np.full((1, 1, width, self._slots), MASKED, np.float32)
        mask[0, 0, :count][sees] = 0.0
        where = np.zeros((1, width), np.int32)
        where[0, :count] = positions
        states = self._states.setdefault(part, self._package.states(name))
        inputs = {"hidden": _filled(hidden, width), "positions": where, "places": places, "mask": mask}
        return self._package.call(name, inputs, states)["hidden_out"][0, :count]

    def head(self, part: str, hidden: FloatArray, width: int) -> FloatArray:
        """Logits of a head over hidden states [n, hidden size], n ≤ width."""
        found = self._package.call(function_name(part, width), {"hidden": _filled(hidden, width)}, {})
        return found["logits"][0, : len(hidden)]


def _filled(hidden: FloatArray, width: int) -> FloatArray:
    batch = np.zeros((1, width, hidden.shape[1]), np.float32)
    batch[0, : len(hidden)] = hidden
    return batch
