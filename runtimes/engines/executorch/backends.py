"""What a program's target needs: a delegate of that name in the ExecuTorch that runs it.

>>> from skipstone.runtimes.engines.executorch.backends import BACKENDS
>>> BACKENDS["xnnpack"]
'XnnpackBackend'
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from skipstone.errors import DeviceError
from skipstone.runtimes.engines.executorch.native import native

BACKENDS = {"xnnpack": "XnnpackBackend", "vulkan": "VulkanBackend", "coreml": "CoreMLBackend"}


def has_target(target: str) -> bool:
    """Whether this machine's ExecuTorch has the target's delegate."""
    return BACKENDS.get(target) in _registered()


def check_target(path: Path, target: str) -> None:
    """Refuse a program whose delegate this ExecuTorch does not have.

    Raises:
        DeviceError: names the target and what is there.
    """
    if has_target(target):
        return
    registered = _registered()
    present = [name for name, backend in BACKENDS.items() if backend in registered]
    raise DeviceError(
        f"{path}: lowered for {target}; this machine's ExecuTorch runs {', '.join(present) or 'no target'}",
        hint="run it on the device, or export with --device cpu",
    )


def _registered() -> Collection[str]:
    names: Collection[str] = native()._get_registered_backend_names()
    return names
