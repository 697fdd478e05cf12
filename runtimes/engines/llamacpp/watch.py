"""llama.cpp's graph callback: what is read out of a computation, put into it, or left out of it.

llama.cpp asks about every node before it computes it and hands over those that were wanted. Asking costs a call into
Python each, some 70 µs for a few layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.runtimes.engines.llamacpp.library import FLOAT_BYTES, library

FloatArray = NDArray[np.float32]
# takes the address of a computed ggml tensor
Action = Callable[[int], None]

RESULT, NORMED_RESULT = b"result_embd", b"result_norm"


class Watch:
    """What to do with which nodes.

    Args:
        actions: node name → what is done once it is computed.

    Attributes:
        look: answers llama.cpp's questions.
        callback: the same for `cb_eval`; kept alive here.
    """

    def __init__(self, actions: Mapping[bytes, Action]) -> None:
        lib = library()
        name_of = lib.ggml_base.ggml_get_name
        self._first: Callable[[int], bool] | None = None
        self._witness: Callable[[int, bytes], None] | None = None

        def look(tensor: int, asked: bool, _data: object) -> bool:
            if self._witness is not None:
                self._witness(tensor, name_of(tensor))
                return False
            if self._first is not None:
                if asked:
                    return True
                act, self._first = self._first, None
                return act(tensor)
            if asked:
                return name_of(tensor) in actions
            actions[name_of(tensor)](tensor)
            return True

        self.look = look
        self.callback = dict(lib.llama.llama_context_params._fields_)["cb_eval"](look)

    def at_first_node(self, act: Callable[[int], bool]) -> None:
        """Call `act` once the next graph's first node is computed; False leaves out the rest of the graph."""
        self._first = act

    def see_all(self, witness: Callable[[int, bytes], None] | None) -> None:
        """Tell `witness` the address and name of every node of the graphs to come, and act on none; None: as before."""
        self._witness = witness


class Tap:
    """Keeps the rows of a node; `keep` is its action."""

    def __init__(self, hidden_size: int) -> None:
        self.rows: FloatArray = np.empty((0, hidden_size), np.float32)

    def keep(self, tensor: int) -> None:
        """Copy the node's rows."""
        self.rows = read_rows(tensor, self.rows.shape[1])


def read_rows(tensor: int, columns: int) -> FloatArray:
    """A float32 node's rows [n, columns]."""
    base = library().ggml_base
    rows = np.empty((base.ggml_nbytes(tensor) // FLOAT_BYTES // columns, columns), np.float32)
    base.ggml_backend_tensor_get(tensor, rows.ctypes.data, 0, rows.nbytes)
    return rows


def write_rows(tensor: int, rows: FloatArray) -> None:
    """Overwrite a float32 node of the same number of values."""
    rows = np.ascontiguousarray(rows, np.float32)
    library().ggml_base.ggml_backend_tensor_set(tensor, rows.ctypes.data, 0, rows.nbytes)


def exact_gelu(num_layers: int) -> dict[bytes, Action]:
    """Actions that compute the gated GELU of a T5's feed-forward networks in float32. llama.cpp's own looks it up in a
    table of half-precision numbers, which moves logits by some thousandths of their spread. For artefacts in float32,
    which are to be what the checkpoint is.
    """
    gelu = _ExactGelu()
    actions: dict[bytes, Action] = {}
    for layer in range(num_layers):
        for name, action in (
            ("ffn_gate", gelu.keep_gate),
            ("ffn_up", gelu.keep_up),
            ("ffn_geglu", gelu.replace),
        ):
            actions[f"{name}-{layer}".encode()] = action
    return actions


class _ExactGelu:
    """One network at a time: its gate and its input come before their product."""

    def __init__(self) -> None:
        self._gate: Any = None
        self._up: Any = None

    def keep_gate(self, tensor: int) -> None:
        self._gate = read_rows(tensor, 1)

    def keep_up(self, tensor: int) -> None:
        self._up = read_rows(tensor, 1)

    def replace(self, tensor: int) -> None:
        """gelu(gate) · up, with the tanh form of GELU (arXiv 1606.08415, §2)."""
        gate = self._gate
        inner = np.float32(np.sqrt(2 / np.pi)) * (gate + np.float32(0.044715) * gate**3)
        write_rows(tensor, np.float32(0.5) * gate * (1 + np.tanh(inner)) * self._up)
