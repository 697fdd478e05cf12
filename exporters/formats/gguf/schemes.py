"""Quantisation schemes by name, and quantising a whole GGUF with llama.cpp."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from skipstone.errors import EngineError
from skipstone.exporters.formats.scheme_names import find_scheme


@dataclass(frozen=True)
class Scheme:
    """A scheme: llama.cpp's file type number, rough bits per weight, and the argmax agreement to be expected
    at least.

    `min_agreement`: share of positions where the quantised model's best token must be the reference's; far
        under what the scheme gives on any trained model, so that only a broken export falls below.
    """

    name: str
    file_type: int
    bits: float
    min_agreement: float


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("f32", 0, 32.0, 0.99),
        Scheme("f16", 1, 16.0, 0.9),
        Scheme("bf16", 32, 16.0, 0.8),
        Scheme("q8_0", 7, 8.5, 0.8),
        Scheme("q6_k", 18, 6.56, 0.7),
        Scheme("q5_k_m", 17, 5.7, 0.6),
        Scheme("q5_k_s", 16, 5.5, 0.6),
        Scheme("q5_1", 9, 6.0, 0.6),
        Scheme("q5_0", 8, 5.5, 0.6),
        Scheme("q4_k_m", 15, 4.9, 0.5),
        Scheme("q4_k_s", 14, 4.6, 0.5),
        Scheme("q4_1", 3, 5.0, 0.5),
        Scheme("q4_0", 2, 4.5, 0.5),
        Scheme("iq4_nl", 25, 4.5, 0.5),
        Scheme("iq4_xs", 30, 4.25, 0.5),
        Scheme("q3_k_m", 12, 3.9, 0.3),
        Scheme("q2_k", 10, 3.0, 0.15),
        Scheme("tq2_0", 37, 2.06, 0.6),
        Scheme("tq1_0", 36, 1.69, 0.6),
    )
}
FLOATS = ("f32", "f16", "bf16")
TERNARY = ("tq2_0", "tq1_0")  # for checkpoints whose layers are ternary already
_Q8_0 = 8  # ggml's number


def scheme_of(name: str) -> Scheme:
    """The scheme of that name; `none` is `f32`.

    Raises:
        UsageError: no such scheme; lists them.
    """
    return find_scheme(name, SCHEMES, format="gguf", docs="docs/export.md")


def quantize_file(source: str, target: str, file_type: int, imatrix: str | None, threads: int) -> None:
    """Quantise a whole GGUF. May abort the process: call it through `run_isolated`.

    Args:
        source: GGUF in f32, f16 or bf16.
        target: file to write.
        file_type: llama.cpp's number.
        imatrix: .npz of importances, tensor name → mean squared activation of every input [columns]; None:
            none.
        threads: CPU threads.

    Raises:
        EngineError: llama.cpp refused.
    """
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, threads
    if file_type in (SCHEMES[name].file_type for name in TERNARY):
        # the tables are not ternary; llama.cpp would give them 4 bits
        params.token_embedding_type = params.output_tensor_type = _Q8_0
    weights = {} if imatrix is None else dict(np.load(imatrix))
    if weights:
        records = (llama_cpp.llama_model_imatrix_data * (len(weights) + 1))()
        for record, (name, values) in zip(records, weights.items(), strict=False):
            record.name, record.size = name.encode(), values.size
            record.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = records
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if status != 0 or not Path(target).is_file():
        raise EngineError(
            f"{source}: llama.cpp could not quantise it (status {status})",
            hint="some widths do not fit the scheme's blocks; try q8_0 or f16",
        )
