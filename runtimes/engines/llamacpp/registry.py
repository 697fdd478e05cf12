"""The devices that llama.cpp's registry lists, with their memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from skipstone.errors import EngineError
from skipstone.runtimes.engines.llamacpp.library import library

_GPU_KINDS = (1, 2)  # ggml's numbers of a GPU with memory of its own, and of one that shares the host's


@dataclass(frozen=True)
class RegisteredDevice:
    """A device of llama.cpp's.

    Attributes:
        backend: its backend's name: `CPU`, `CUDA`, `Vulkan`, …
        description: its own.
        is_gpu: layers can be placed on it.
        free_bytes, total_bytes: of its memory, as the backend tells; 0 where it does not.
    """

    backend: str
    description: str
    is_gpu: bool
    free_bytes: int
    total_bytes: int


def registered_devices() -> list[RegisteredDevice]:
    """All of them, the CPU included.

    Raises:
        EngineError: llama.cpp is missing or its libraries do not load.
    """
    base, registry = library().ggml_base, _registry()
    registry.ggml_backend_dev_count.restype = ctypes.c_size_t
    registry.ggml_backend_dev_get.restype = ctypes.c_void_p
    registry.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    base.ggml_backend_dev_backend_reg.restype = ctypes.c_void_p
    base.ggml_backend_dev_backend_reg.argtypes = [ctypes.c_void_p]
    for name in ("ggml_backend_reg_name", "ggml_backend_dev_description"):
        getattr(base, name).restype, getattr(base, name).argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    base.ggml_backend_dev_type.restype, base.ggml_backend_dev_type.argtypes = ctypes.c_int, [ctypes.c_void_p]
    size = ctypes.POINTER(ctypes.c_size_t)
    base.ggml_backend_dev_memory.restype = None
    base.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size, size]
    handles = (registry.ggml_backend_dev_get(index) for index in range(registry.ggml_backend_dev_count()))
    return [_describe(base, handle) for handle in handles]


def _describe(base: ctypes.CDLL, device: int) -> RegisteredDevice:
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    return RegisteredDevice(
        backend=base.ggml_backend_reg_name(base.ggml_backend_dev_backend_reg(device)).decode(),
        description=base.ggml_backend_dev_description(device).decode(errors="replace"),
        is_gpu=base.ggml_backend_dev_type(device) in _GPU_KINDS,
        free_bytes=free.value,
        total_bytes=total.value,
    )


def _registry() -> ctypes.CDLL:
    """The library that holds ggml's device registry; it lies beside ggml-base."""
    base = Path(str(library().ggml_base._name))
    path = base.with_name(base.name.replace("ggml-base", "ggml"))
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(
            f"{path}: cannot be loaded: {error}", hint="install llama-cpp-python again"
        ) from error
