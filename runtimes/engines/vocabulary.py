"""The draft head's token ids, read from a file of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import BundleError


def read_vocabulary(path: Path, vocab_size: int) -> NDArray[np.int32]:
    """Token ids of the draft head's rows, ascending.

    Args:
        path: little-endian int32 numbers.
        vocab_size: of the model.

    Raises:
        BundleError: they cannot be token ids of this model, or are out of order.
    """
    ids = np.fromfile(path, "<i4").astype(np.int32)
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise BundleError(f"{path}: draft tokens outside the vocabulary", hint="export the bundle again")
    if np.any(np.diff(ids) <= 0):  # they are searched by halving
        raise BundleError(f"{path}: draft tokens out of order", hint="export the bundle again")
    return ids
