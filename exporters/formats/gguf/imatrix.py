"""Importance matrices: how strongly each input of each matrix is driven on a calibration text.

llama.cpp's quantiser weighs the error of every weight by the mean squared activation of its input (its
`imatrix` tool's definition). Every matrix of a layer is fed by one of four named nodes of the graph, so these
are watched.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from skipstone.errors import UsageError
from skipstone.exporters.formats.gguf.library import whole_model

_CHUNK = 512
_MAX_CHUNKS = 200

# Graph node → the matrices that it is multiplied with.
_FED_BY = {
    "attn_norm": ("attn_q", "attn_k", "attn_v"),
    "kqv_out": ("attn_output",),
    "ffn_norm": ("ffn_gate", "ffn_up"),
    "ffn_swiglu": ("ffn_down",),
}
_NODE = re.compile(rf"^({'|'.join(_FED_BY)})-(\d+)$")


class _Accumulator:
    """llama.cpp's graph callback: sums squares per column of the watched nodes."""

    def __init__(self) -> None:
        self.sums: dict[str, NDArray[np.float64]] = {}
        self._ggml = _ggml_functions()

    def __call__(self, tensor: Any, ask: bool, _user_data: Any) -> bool:
        name = self._ggml.ggml_get_name(tensor).decode(errors="replace")
        watched = name == "result_norm" or _NODE.match(name) is not None
        if ask or not watched:
            return watched if ask else True
        size = int(self._ggml.ggml_nbytes(tensor))
        values = np.empty(size // 4, np.float32)
        self._ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, size)
        rows = values.reshape(self.num_tokens, -1).astype(np.float64)
        total = (rows**2).sum(axis=0)
        self.sums[name] = self.sums.get(name, 0.0) + total
        return True

    num_tokens = 0


def save_imatrix(source: str, tokens: list[int], target: str) -> None:
    """Run a whole GGUF over a text and save the importances as .npz: tensor name → [columns] float32.

    The text is cut into chunks of 512 tokens, each a sequence of its own; the 200 first are used.
    """
    accumulator, seen = _Accumulator(), 0
    size = min(_CHUNK, len(tokens))
    with whole_model(Path(source), size, accumulator) as model:
        for start in range(0, min(len(tokens), _CHUNK * _MAX_CHUNKS), size):
            chunk = tokens[start : start + size]
            accumulator.num_tokens = len(chunk)
            model.logits(chunk)
            seen += len(chunk)
    np.savez(target, **_by_tensor(accumulator.sums, seen))


def check_calibration(tokens: Sequence[int], file: Path) -> None:
    """Refuse a text too short to say anything.

    Raises:
        UsageError: fewer than 128 tokens.
    """
    if len(tokens) < 128:
        raise UsageError(
            f"--imatrix {file}: {len(tokens)} tokens, at least 128 are needed",
            hint="take some pages of the kind of text that the model will see",
        )


def _by_tensor(sums: Mapping[str, NDArray[np.float64]], seen: int) -> dict[str, Any]:
    weights = {}
    for node, total in sums.items():
        mean = (total / seen).astype(np.float32)
        found = _NODE.match(node)
        if found is None:
            weights["output.weight"] = weights["token_embd.weight"] = mean
            continue
        for matrix in _FED_BY[found[1]]:
            weights[f"blk.{found[2]}.{matrix}.weight"] = mean
    return weights


def _ggml_functions() -> Any:
    """Three ggml functions, found through libllama, which depends on their library."""
    library = llama_cpp.llama_cpp._lib
    library.ggml_get_name.restype = ctypes.c_char_p
    library.ggml_get_name.argtypes = [ctypes.c_void_p]
    library.ggml_nbytes.restype = ctypes.c_size_t
    library.ggml_nbytes.argtypes = [ctypes.c_void_p]
    library.ggml_backend_tensor_get.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    ]
    return library
