"""What engines have in common whose artefacts were made for one device, K and V in float32: most of it was settled when
they were exported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from skipstone.errors import UsageError
from skipstone.runtimes.cores import num_cores

if TYPE_CHECKING:
    from skipstone.runtimes.engines import EngineOptions


def planned_threads(options: EngineOptions, target: str) -> int:
    """CPU threads to use, after refusing what such an engine has no choice in.

    Args:
        options: the user's.
        target: what the artefacts were made for.

    Raises:
        UsageError: layers for a GPU, another type of K and V, or a number of threads that cannot be.
    """
    if options.gpu_layers:
        raise UsageError(
            f"--gpu-layers {options.gpu_layers}: this bundle runs where it was exported to ({target})",
            hint="leave it out",
        )
    if options.kv_type not in (None, "f32"):
        raise UsageError(
            f"--kv-type {options.kv_type}: this format keeps K and V in f32", hint="leave it out"
        )
    threads = num_cores() if options.threads is None else options.threads
    if not 1 <= threads <= 512:
        raise UsageError(f"--threads {threads}: expected 1 to 512")
    return threads
