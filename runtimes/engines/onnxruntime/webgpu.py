"""Sessions on a GPU through WebGPU: a plugin of ONNX Runtime's, over Vulkan, Metal or Direct3D.

A machine without a GPU can compute in software, with a Vulkan driver like SwiftShader and the plugin's own variable
`ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1`: far slower than the CPU provider, and the same kernels.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

from skipstone.errors import DeviceError, EngineError
from skipstone.runtimes.engines.onnxruntime.library import runtime
from skipstone.runtimes.quiet import quiet_libraries

Presence = Literal["runs", "emulated", "compiled"]
PROVIDER = "WebGpuExecutionProvider"
_HINT = (
    "install the GPU's driver, or use --device cpu; in software: a Vulkan driver such as SwiftShader in "
    "VK_ICD_FILENAMES, and ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1"
)


def open_webgpu_session(path: Path, options: Any) -> Any:
    """A session on the first GPU.

    Raises:
        DeviceError: no GPU, or none that a WebGPU adapter can be had for.
        EngineError: the plugin is not installed.
    """
    devices = webgpu_devices()
    if not devices:
        raise DeviceError(f"{path}: made for webgpu; ONNX Runtime finds no GPU here", hint=_HINT)
    options.add_provider_for_devices(devices[:1], {})
    try:
        # otherwise it would fall back to the CPU with a word on standard output
        with quiet_libraries():
            session = runtime().InferenceSession(str(path), options, enable_fallback=False)
    except Exception as error:
        if "WebGPU adapter" in str(error):
            raise DeviceError(f"{path}: made for webgpu; no adapter can be had here", hint=_HINT) from error
        raise
    return session


def webgpu_presence() -> Presence:
    """`runs` on a GPU, `emulated` in software, `compiled` without the plugin or anything it could use."""
    try:
        devices = webgpu_devices()
    except EngineError:
        return "compiled"
    if not devices:
        return "compiled"
    return "runs" if is_gpu(devices[0]) else "emulated"


def webgpu_devices() -> list[Any]:
    """The devices that the plugin offers, GPUs first.

    Raises:
        EngineError: it is not installed, or does not load.
    """
    found = _offered()
    if not found:
        _register()
        found = _offered()
    return sorted(found, key=lambda device: not is_gpu(device))


def is_gpu(device: Any) -> bool:
    """Whether a device is one, and not the CPU in its place."""
    kinds: Any = runtime().OrtHardwareDeviceType
    return bool(device.device.type == kinds.GPU)


def _offered() -> list[Any]:
    return [device for device in runtime().get_ep_devices() if device.ep_name == PROVIDER]


def _register() -> None:
    """Load the plugin; it looks for devices once, when it is registered, so that a second time makes it look again."""
    try:
        plugin: Any = importlib.import_module("onnxruntime_ep_webgpu")
    except ImportError as error:
        raise EngineError(
            "onnxruntime-ep-webgpu is not installed", hint='install it with `pip install "skipstone[webgpu]"`'
        ) from error
    library, file = runtime(), plugin.get_library_path()
    with quiet_libraries():
        try:
            library.register_execution_provider_library(PROVIDER, file)
        except Exception as error:
            if "already registered" not in str(error):
                raise EngineError(
                    f"onnxruntime-ep-webgpu cannot be loaded: {error}", hint="install it again"
                ) from error
            library.unregister_execution_provider_library(PROVIDER)
            library.register_execution_provider_library(PROVIDER, file)
