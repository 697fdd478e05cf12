"""Whether what is to be loaded fits into memory, asked before anything is.

llama.cpp itself fails late and says little: a GPU that is too small ends in "cannot load this file", a machine that is,
in the kernel killing the process.
"""

from __future__ import annotations

from collections.abc import Iterable

from skipstone.bundle import Bundle
from skipstone.errors import EngineError
from skipstone.runtimes.engines.llamacpp.lane import LaneOptions, Part
from skipstone.runtimes.engines.llamacpp.library import library
from skipstone.runtimes.engines.llamacpp.load_plan import LoadPlan
from skipstone.runtimes.engines.llamacpp.registry import RegisteredDevice, registered_devices
from skipstone.runtimes.host_memory import available_bytes


def check_room(bundle: Bundle, plan: LoadPlan) -> None:
    """Refuse to load weights that do not fit. Sizes of files stand for what is computed with besides.

    Raises:
        EngineError: no GPU where layers are to go to one, or too little memory there or on the machine; names what is
            needed and what was found.
    """
    if plan.gpu_layers != 0:
        gpus = _gpus(plan.gpu_layers)
        needed, free = sum(part.gpu_bytes for part in plan), _free(gpus)
        if free is not None and needed > free:
            raise EngineError(
                f"{bundle.path}: --gpu-layers {plan.gpu_layers} needs {_size(needed)} on the GPU, "
                f"{_names(gpus)} has {_size(free)} free",
                hint="pass fewer, or free memory of the GPU",
            )
    needed, available = sum(part.host_bytes for part in plan), _host_bytes()
    if available is not None and needed > available:
        raise EngineError(
            f"{bundle.path}: its weights need {_size(needed)}, this machine has {_size(available)} of memory available",
            hint="free memory, or export with a smaller --quantize",
        )


def check_room_for_cells(parts: Iterable[Part], context_length: int, options: LaneOptions) -> None:
    """Refuse K and V that do not fit.

    Args:
        parts: loaded weights whose rows are to be kept.
        context_length: positions of each.
        options: how contexts are made.

    Raises:
        EngineError: naming what is needed and what was found.
    """
    cells = max(context_length, options.max_width, options.max_branches, options.source_length)
    host = gpu = 0
    for part in parts:
        whole = options.kv.num_bytes(part.values_per_position) * cells
        there = whole * min(max(0, part.gpu_layers - 1), part.num_layers) // max(1, part.num_layers)
        gpu, host = gpu + there, host + whole - there
    for needed, free, where in (
        (gpu, _free(_registered_gpus()) if gpu else None, "on the GPU"),
        (host, _host_bytes(), "of memory"),
    ):
        if free is not None and needed > free:
            raise EngineError(
                f"K and V of {context_length} positions need {_size(needed)}, {_size(free)} {where} are available",
                hint="pass a smaller --context-length or free memory",
            )


def _gpus(gpu_layers: int) -> list[RegisteredDevice]:
    """The GPUs of this build.

    Raises:
        EngineError: there are none.
    """
    found = registered_devices()
    gpus = [device for device in found if device.is_gpu]
    if not gpus or not library().llama.llama_supports_gpu_offload():
        backends = ", ".join(sorted({device.backend for device in found})) or "none"
        raise EngineError(
            f"--gpu-layers {gpu_layers}: this build of llama-cpp-python has no GPU backend or finds no GPU "
            f"(its devices: {backends})",
            hint="build it with CUDA, Vulkan or Metal, or leave --gpu-layers out",
        )
    return gpus


def _registered_gpus() -> list[RegisteredDevice]:
    return [device for device in registered_devices() if device.is_gpu]


def _free(gpus: Iterable[RegisteredDevice]) -> int | None:
    """Free memory of all GPUs, over which llama.cpp spreads the layers; None where one of them does not tell."""
    known = [gpu.free_bytes for gpu in gpus if gpu.total_bytes]
    return sum(known) if known and len(known) == len(list(gpus)) else None


def _host_bytes() -> int | None:
    """Available memory of the machine; where the system does not tell, all that llama.cpp's CPU device says it has."""
    found = available_bytes()
    if found is not None:
        return found
    totals = [device.total_bytes for device in registered_devices() if device.backend == "CPU"]
    return totals[0] if totals and totals[0] else None


def _names(gpus: Iterable[RegisteredDevice]) -> str:
    return " and ".join(gpu.description for gpu in gpus)


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
