"""Qualcomm's Hexagon NPU, by way of onnxruntime-qnn: context binaries, on the NPU or on x86-64 in its emulator.

A graph runs on the NPU from end to end or not at all: nothing falls back to the CPU. The emulator computes what the NPU
computes, integer for integer, but how long it takes says nothing about the NPU.
"""

from __future__ import annotations

import functools
import importlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipstone.errors import DeviceError
from skipstone.runtimes.engines.onnxruntime.library import runtime
from skipstone.runtimes.engines.onnxruntime.webgpu import Presence
from skipstone.runtimes.quiet import no_output

# Of a session: it runs on the NPU from end to end, or is refused.
NO_FALLBACK = {"session.disable_cpu_ep_fallback": "1"}
_EMULATED_ON = ("x86_64", "AMD64")


def open_qnn_session(path: Path, options: Any) -> Any:
    """A session over a compiled graph; see `skipstone.runtimes.engines.onnxruntime.targets.open_session`.

    Raises:
        DeviceError: onnxruntime-qnn is not installed, or does not load.
    """
    for key, value in NO_FALLBACK.items():
        options.add_session_config_entry(key, value)
    add_provider(options, {})
    with no_output():
        return runtime().InferenceSession(str(path), options)


def qnn_presence() -> Presence:
    """`emulated` on x86-64; `compiled` without the provider, or where it finds no NPU."""
    try:
        _provider()
    except DeviceError:
        return "compiled"
    return "emulated" if is_emulated() else "runs"


def is_emulated() -> bool:
    """Whether this machine has no Hexagon NPU but can emulate one."""
    return platform.machine() in _EMULATED_ON


def add_provider(options: Any, settings: Mapping[str, str]) -> None:
    """Let a session run on the NPU.

    Args:
        options: of the session.
        settings: the provider's own options.

    Raises:
        DeviceError: onnxruntime-qnn is not installed, or does not load.
    """
    devices, backend = _provider()
    options.add_provider_for_devices(devices, {"backend_path": backend, **settings})


@functools.cache
def _provider() -> tuple[list[Any], str]:
    """ONNX Runtime's devices that the provider serves, and the library of the HTP backend."""
    try:
        package = importlib.import_module("onnxruntime_qnn")
    except ImportError as error:
        raise DeviceError(
            "onnxruntime-qnn is not installed",
            hint='install it with `pip install "skipstone[onnx,qualcomm]"`',
        ) from error
    ort, name = runtime(), package.get_ep_name()
    try:
        with no_output():
            ort.register_execution_provider_library(name, package.get_library_path())
    except Exception as error:
        if "already registered" not in str(error):
            raise DeviceError(
                f"onnxruntime-qnn cannot be loaded: {error}", hint="see docs/qualcomm.md for where it runs"
            ) from error
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise DeviceError(
            "onnxruntime-qnn finds no device here", hint="see docs/qualcomm.md for where it runs"
        )
    return devices, package.get_qnn_htp_path()
