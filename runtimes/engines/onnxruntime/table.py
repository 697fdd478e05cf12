"""The embedding table, mapped into memory and looked up on the host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import TableEntry
from skipstone.errors import BundleError

FloatArray = NDArray[np.float32]


class Table:
    """Rows of a table file as float32.

    Args:
        path: the file.
        entry: what the manifest says of it.

    Raises:
        BundleError: it is gone or of another size.
    """

    def __init__(self, path: Path, entry: TableEntry) -> None:
        kind = np.dtype(entry.type).newbyteorder("<")
        needed = entry.rows * entry.columns * kind.itemsize
        size = path.stat().st_size if path.is_file() else 0
        if size != needed:
            raise BundleError(
                f"{path}: {size} bytes, {entry.rows} x {entry.columns} {entry.type} take {needed}",
                hint="the file is damaged; copy or export the bundle again",
            )
        mapped = np.memmap(path, kind, "r", shape=(entry.rows, entry.columns))
        self._rows = np.asarray(mapped)  # a plain view, quicker to index

    def rows(self, tokens: Sequence[int]) -> FloatArray:
        """Embeddings [n, hidden_size] of n tokens; the caller owns them."""
        return self._rows[list(tokens)].astype(np.float32)
