"""Whether this machine can use a device, and if not, why.

>>> from skipstone.devices.detection import detect
>>> detect(load_profile("cuda"), "gguf").reason
'this build of llama-cpp-python has no GPU backend'
"""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

from skipstone.devices.profiles import DeviceProfile, FormatSupport
from skipstone.errors import EngineError
from skipstone.runtimes.engines.llamacpp.library import library
from skipstone.runtimes.engines.llamacpp.registry import registered_devices
from skipstone.runtimes.engines.onnxruntime.qnn import is_emulated
from skipstone.runtimes.engines.onnxruntime.webgpu import is_gpu, webgpu_devices

# Registry names differ between llama.cpp's versions for this one.
_ALIASES = {"MTL": ("MTL", "Metal")}


@dataclass(frozen=True)
class Availability:
    """Whether a device can be used here.

    Attributes:
        usable: true where it can.
        reason: what was found, or why it cannot.
    """

    usable: bool
    reason: str


@dataclass(frozen=True)
class Accelerator:
    """A device that llama.cpp lists.

    Attributes:
        backend: its backend's name.
        description: its own.
        free_bytes: of a GPU's memory; None of anything else.
    """

    backend: str
    description: str
    free_bytes: int | None = None

    def __str__(self) -> str:
        free = "" if not self.free_bytes else f", {self.free_bytes / 1e9:.1f} GB free"
        return f"{self.description}{free}"


def detect(profile: DeviceProfile, format: str) -> Availability:
    """Look for a profile's device on this machine.

    Args:
        profile: the device.
        format: one of its formats.
    """
    system = platform.system()
    if profile.systems and system not in profile.systems:
        return Availability(False, f"a device of {' or '.join(profile.systems)}; this is {system}")
    support = profile.formats[format]
    return _DETECTORS[support.engine](support)


def _detect_llamacpp(support: FormatSupport) -> Availability:
    try:
        llama = library().llama
        found = list_accelerators()
    except EngineError as error:
        return Availability(False, str(error))
    if support.gpu_layers != 0 and not llama.llama_supports_gpu_offload():
        return Availability(False, "this build of llama-cpp-python has no GPU backend")
    wanted = _ALIASES.get(support.backend, (support.backend,))
    descriptions = [str(device) for device in found if device.backend in wanted]
    if not descriptions:
        backends = ", ".join(sorted({device.backend for device in found})) or "none"
        return Availability(False, f"llama.cpp finds no {support.backend} device here (backends: {backends})")
    return Availability(True, "; ".join(descriptions))


def _detect_executorch(support: FormatSupport) -> Availability:
    """Whether the package is there. Which delegates it was built with only its import could tell, which takes torch
    and seconds: opening a bundle says so.
    """
    try:
        version = importlib.metadata.version("executorch")
    except importlib.metadata.PackageNotFoundError:
        return Availability(False, 'executorch is not installed: `pip install "skipstone[executorch]"`')
    return Availability(True, f"executorch {version}, {support.backend}")


def _detect_onnxruntime(support: FormatSupport) -> Availability:
    """Whether the package is there and, for a GPU, a device that its plugin offers."""
    try:
        version = importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        return Availability(False, 'onnxruntime is not installed: `pip install "skipstone[onnx]"`')
    if support.backend.startswith("qnn-"):
        return _detect_qnn(support)
    if support.backend != "webgpu":
        return Availability(True, f"onnxruntime {version}, {support.backend}")
    try:
        devices = webgpu_devices()
    except EngineError as error:
        return Availability(False, str(error))
    if not devices:
        return Availability(False, "ONNX Runtime's WebGPU plugin finds no GPU")
    software = "" if is_gpu(devices[0]) else ", in software"
    return Availability(True, f"onnxruntime {version}, webgpu{software}")


def _detect_qnn(support: FormatSupport) -> Availability:
    """Whether the provider is there; which SoC it finds below, if any, only opening a bundle tells."""
    try:
        version = importlib.metadata.version("onnxruntime-qnn")
    except importlib.metadata.PackageNotFoundError:
        return Availability(
            False, 'onnxruntime-qnn is not installed: `pip install "skipstone[onnx,qualcomm]"`'
        )
    emulated = ", in the emulator" if is_emulated() else ""
    return Availability(True, f"onnxruntime-qnn {version}, {support.backend}{emulated}")


def _detect_ethosu(_support: FormatSupport) -> Availability:
    return Availability(False, "programs are made for firmware; Skipstone has no engine that runs them")


def _detect_coreml(_support: FormatSupport) -> Availability:
    return Availability(False, "packages are made for apps; Skipstone has no engine that runs them")


_DETECTORS = {
    "llamacpp": _detect_llamacpp,
    "executorch": _detect_executorch,
    "onnxruntime": _detect_onnxruntime,
    "coreml": _detect_coreml,
    "ethosu": _detect_ethosu,
}


def list_accelerators() -> list[Accelerator]:
    """The devices llama.cpp's registry lists, the CPU included.

    Raises:
        EngineError: llama.cpp is missing or its libraries do not load.
    """
    return [
        Accelerator(device.backend, device.description, device.free_bytes if device.is_gpu else None)
        for device in registered_devices()
    ]
