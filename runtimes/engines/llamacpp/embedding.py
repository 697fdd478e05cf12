"""The token embedding table, memory-mapped out of the GGUF that holds it and looked up on the host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import EmbeddingEntry
from skipstone.errors import BundleError
from skipstone.runtimes.engines.llamacpp.library import dequantizer

FloatArray = NDArray[np.float32]
# bytes per block and values per block, ggml's layouts
_BLOCKS = {
    "F32": (4, 1), "F16": (2, 1), "BF16": (2, 1),
    "Q8_0": (34, 32), "Q4_0": (18, 32), "Q4_1": (20, 32), "Q5_0": (22, 32), "Q5_1": (24, 32), "IQ4_NL": (18, 32),
    "Q2_K": (84, 256), "Q3_K": (110, 256), "Q4_K": (144, 256), "Q5_K": (176, 256), "Q6_K": (210, 256),
    "IQ4_XS": (136, 256),
}  # fmt: skip


def table_bytes(entry: EmbeddingEntry) -> int:
    """Bytes the table takes up in its file."""
    block_bytes, block_values = _BLOCKS[entry.type.upper()]
    return entry.rows * (entry.columns // block_values) * block_bytes


class EmbeddingTable:
    """Rows of the embedding table as float32, dequantised by ggml's own code.

    Raises:
        BundleError: a type we do not know, or a table that does not lie inside its file.
    """

    def __init__(self, path: Path, entry: EmbeddingEntry) -> None:
        kind = entry.type.upper()
        if kind not in _BLOCKS:
            raise BundleError(f"{path}: embedding type {entry.type} is not known", hint="export again")
        row_bytes = table_bytes(entry) // entry.rows
        size = path.stat().st_size
        if entry.offset + entry.rows * row_bytes > size:
            raise BundleError(
                f"{path}: the embedding table ends past the file's {size} bytes", hint="export again"
            )
        raw = np.memmap(path, np.uint8, "r", offset=entry.offset, shape=(entry.rows, row_bytes))
        self._raw = np.asarray(raw)  # a plain view, quicker to index
        self._columns, self._scale = entry.columns, np.float32(entry.scale)
        self._dequantize = dequantizer(kind)

    def rows(self, tokens: Sequence[int]) -> FloatArray:
        """Embeddings [n, hidden_size] of n tokens."""
        out = self._dequantize(self._raw[list(tokens)].reshape(-1), len(tokens) * self._columns)
        out = out.reshape(-1, self._columns)
        if self._scale != 1:
            out *= self._scale
        return out
