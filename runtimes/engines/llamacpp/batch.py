"""A llama.cpp batch of hidden states whose memory is ours (numpy) and reused: filling it costs microseconds where
building one costs tens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.runtimes.engines.llamacpp.library import library


class RowBatch:
    """Rows of hidden states with their positions and sequences.

    Args:
        width: rows at most.
        hidden_size: of each.
        num_sequences: that a row can belong to.

    Attributes:
        handle: llama.cpp's batch, to be passed to it by value.
        embeddings: float32 [width, hidden_size].
        positions: int32 [width].
        flags: int8 [width]: whether the row's logits are wanted.
    """

    def __init__(self, width: int, hidden_size: int, num_sequences: int) -> None:
        self.width = width
        self.embeddings = np.zeros((width, hidden_size), np.float32)
        self.positions = np.zeros(width, np.int32)
        self.flags = np.zeros(width, np.int8)
        self._seq_counts = np.ones(width, np.int32)
        self._seq_ids = np.zeros((width, num_sequences), np.int32)
        self._wide = False
        llama = library().llama
        stride, start = num_sequences * self._seq_ids.itemsize, self._seq_ids.ctypes.data
        self._seq_rows = (ctypes.c_void_p * width)(*(start + index * stride for index in range(width)))
        self.handle = llama.llama_batch()

        def pointer(array: NDArray[Any], kind: Any) -> Any:
            return array.ctypes.data_as(ctypes.POINTER(kind))

        self.handle.embd = pointer(self.embeddings, ctypes.c_float)
        self.handle.pos = pointer(self.positions, llama.llama_pos)
        self.handle.logits = pointer(self.flags, ctypes.c_int8)
        self.handle.n_seq_id = pointer(self._seq_counts, ctypes.c_int32)
        self.handle.seq_id = ctypes.cast(self._seq_rows, ctypes.POINTER(ctypes.POINTER(llama.llama_seq_id)))

    def chain(self) -> None:
        """All rows belong to the context's sequence alone."""
        if self._wide:
            self._seq_counts[:] = 1
            self._seq_ids[:, 0] = 0
            self._wide = False

    def tree(self, carried: Sequence[Sequence[int]]) -> None:
        """Every row belongs to the sequences given for it."""
        for index, sequences in enumerate(carried):
            self._seq_counts[index] = len(sequences)
            self._seq_ids[index, : len(sequences)] = sequences
        self._wide = True

    def everywhere(self) -> None:
        """All rows belong to all sequences."""
        self._seq_counts[:] = self._seq_ids.shape[1]
        self._seq_ids[:] = np.arange(self._seq_ids.shape[1])
        self._wide = True


def numbered(states: NDArray[np.float32], num_sequences: int, begin: int = 0) -> RowBatch:
    """A batch of states [n, hidden_size] at positions begin, begin + 1, … that belong to all of so many sequences."""
    count = len(states)
    batch = RowBatch(count, states.shape[1], num_sequences)
    batch.embeddings[:] = states
    batch.positions[:] = np.arange(begin, begin + count)
    batch.flags[:] = 1
    batch.everywhere()
    batch.handle.n_tokens = count
    return batch
