"""Decoding beside other libraries that use the CPU's matrix unit (AMX).

ggml configures the tile registers once per thread and trusts that nobody touches them. torch and its kind release them
after use, and the next tile instruction of llama.cpp on the same thread then kills the process. Where such a library
is loaded, llama.cpp runs on a thread of its own; elsewhere on the caller's, which saves the hand-over.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_TILE_USERS = ("torch", "onnxruntime", "openvino", "tensorflow", "jax")


def undisturbed(call: Callable[[], int]) -> int:
    """The result of `call`, made on a thread whose tile registers nobody else touches."""
    modules = sys.modules
    for name in _TILE_USERS:
        if name in modules:
            return _own_thread().submit(call).result()
    return call()


@functools.cache
def _own_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="llama.cpp")
