"""The few llama.cpp calls we use, with their arguments checked and their log silenced.

llama.cpp aborts the process on several wrong arguments; every one that a caller could cause is checked before the call,
here or in `cache.py`. The library is stock llama-cpp-python.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import EngineError

FloatArray = NDArray[np.float32]
FLOAT_BYTES = 4
_NO_DEVICES = (ctypes.c_void_p * 1)()
NO_DEVICES = ctypes.addressof(_NO_DEVICES)  # an empty list, for weights that stay on the CPU
_INSTALL = 'install the engine with `pip install "skipstone[llamacpp]"` (README: building llama-cpp-python)'


@dataclass(frozen=True)
class Library:
    """llama-cpp-python's modules and the ggml functions it does not bind."""

    llama: Any
    extensions: Any
    ggml_base: ctypes.CDLL

    def ggml_name(self, tensor: int) -> bytes:
        """Name of a ggml tensor."""
        name: bytes = self.ggml_base.ggml_get_name(tensor)
        return name


@functools.cache
def library() -> Library:
    """Load llama.cpp once per process.

    Raises:
        EngineError: llama-cpp-python is missing or does not load.
    """
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        import llama_cpp
        from llama_cpp import llama_cpp_ext
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(f"llama-cpp-python cannot be loaded: {error}", hint=_INSTALL) from error
    llama_cpp.llama_log_set(_silent_log(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    base = ctypes.CDLL(str(_shared_library(llama_cpp, "ggml-base")))
    base.ggml_get_name.restype, base.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    base.ggml_nbytes.restype, base.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    base.ggml_backend_tensor_get.restype = None
    base.ggml_backend_tensor_get.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    ]
    base.ggml_backend_tensor_set.restype = None
    base.ggml_backend_tensor_set.argtypes = base.ggml_backend_tensor_get.argtypes
    return Library(llama_cpp, llama_cpp_ext, base)


@functools.cache
def _silent_log(llama_cpp: ModuleType) -> Any:
    """A log callback that drops everything; kept alive by the cache."""

    def drop(_level: int, _text: bytes, _data: object) -> None:
        return None

    return llama_cpp.llama_log_callback(drop)


def _shared_library(llama_cpp: ModuleType, name: str) -> Path:
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(str(llama_cpp.__file__)).parent / "lib")
    for candidate in (f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise EngineError(f"{folder}: no {name} library beside llama.cpp", hint=_INSTALL)


def build_identity() -> str:
    """Names this build of llama.cpp: version, library size and time, so that measurements are not mixed up."""
    lib = library()
    file = _shared_library(lib.llama, "ggml-base").stat()
    return f"llama-cpp-python {lib.llama.__version__} {file.st_size}-{int(file.st_mtime)}"


def dequantizer(type_name: str) -> Callable[[NDArray[np.uint8], int], FloatArray]:
    """A function from one row's raw bytes and its number of columns to float32 [columns], as ggml computes it.

    Raises:
        EngineError: ggml has no such type.
    """
    kind = type_name.upper()
    if kind == "F32":
        return lambda raw, _columns: raw.view(np.float32)
    if kind == "F16":
        return lambda raw, _columns: raw.view(np.float16).astype(np.float32)
    if kind == "BF16":
        return lambda raw, _columns: (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    symbol = f"dequantize_row_{_ggml_spelling(kind)}"
    try:
        function = getattr(library().ggml_base, symbol)
    except AttributeError as error:
        raise EngineError(
            f"embedding type {type_name}: ggml has no {symbol}", hint="export with another --quantize"
        ) from error
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]

    def dequantize(raw: NDArray[np.uint8], columns: int) -> FloatArray:
        out = np.empty(columns, np.float32)
        function(raw.ctypes.data, out.ctypes.data, columns)
        return out

    return dequantize


def _ggml_spelling(kind: str) -> str:
    """Q6_K → q6_K, Q8_0 → q8_0, IQ4_XS → iq4_xs."""
    return kind.lower().removesuffix("_k") + "_K" if kind.endswith("_K") else kind.lower()
