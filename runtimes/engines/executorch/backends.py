"""What a program's target needs: a delegate of that name in the ExecuTorch that runs it.

>>> from skipstone.runtimes.engines.executorch.backends import BACKENDS
>>> BACKENDS["xnnpack"]
'XnnpackBackend'
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from skipstone.errors import DeviceError

BACKENDS = {"xnnpack": "XnnpackBackend", "vulkan": "VulkanBackend", "coreml": "CoreMLBackend"}


def has_target(runtime: Any, target: str) -> bool:
    """Whether a runtime (`skipstone.runtimes.engines.executorch.program.load_runtime`) has the target's delegate."""
    return BACKENDS.get(target) in _registered(runtime)


def check_target(path: Path, target: str, runtime: Any) -> None:
    """Refuse a program whose delegate this ExecuTorch does not have.

    Raises:
        DeviceError: names the target and what is there.
    """
    if has_target(runtime, target):
        return
    registered = _registered(runtime)
    present = [name for name, backend in BACKENDS.items() if backend in registered]
    raise DeviceError(
        f"{path}: lowered for {target}; this machine's ExecuTorch runs {', '.join(present) or 'no target'}",
        hint="run it on the device, or export with --device cpu",
    )


def _registered(runtime: Any) -> Collection[str]:
    names: Collection[str] = runtime.backend_registry.registered_backend_names
    return names
