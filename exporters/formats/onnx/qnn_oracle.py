"""What the self-test compares context binaries with: the same rounded graphs, computed by ONNX Runtime's CPU provider.

The whole text goes through in one batch, so neither a cache nor a narrower width has a part in it. In half precision
the graphs are compared in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from skipstone.bundle import Bundle
from skipstone.exporters.formats.onnx.walk import Walk

FloatArray = NDArray[np.float32]


class RoundedDecoder:
    """See `skipstone.exporters.formats.Oracle`.

    Args:
        bundle: what it is compared with.
        folder: graphs of one width, and `table.npy`.
        rows: that width.
        slots: of the graphs' past.
    """

    def __init__(self, bundle: Bundle, folder: str, rows: str, slots: str) -> None:
        graphs = {file.stem: ir.load(file) for file in sorted(Path(folder).glob("*.onnx"))}
        self._rows = int(rows)
        self._walk = Walk(graphs, np.load(Path(folder) / "table.npy"), self._rows, int(slots))

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        self._walk.begin()
        parts = [
            self._walk.logits(tokens[start : start + self._rows])
            for start in range(0, len(tokens), self._rows)
        ]
        return np.concatenate(parts)

    def draft_logits(self, hidden: FloatArray, token_ids: NDArray[np.int32]) -> FloatArray:
        return self._walk.head("head", hidden)[:, token_ids]
