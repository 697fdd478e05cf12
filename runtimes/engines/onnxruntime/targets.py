"""How sessions are made for a target: ONNX Runtime's execution provider and its options.

A new target is one function and one line in `TARGETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from skipstone.errors import DeviceError
from skipstone.runtimes.engines.onnxruntime.library import runtime

_WARNINGS = 3  # errors alone are logged


def open_session(path: Path, target: str, threads: int) -> Any:
    """An `onnxruntime.InferenceSession` over a graph.

    Args:
        path: the graph.
        target: what it was made for, as the manifest names it.
        threads: of the CPU's share.

    Raises:
        DeviceError: an unknown target, or one that this machine does not have.
        Exception: what ONNX Runtime raises; see `skipstone.runtimes.engines.onnxruntime.graph`.
    """
    make = TARGETS.get(target)
    if make is None:
        raise DeviceError(
            f"{path}: made for {target}; this release runs {', '.join(TARGETS)}",
            hint="open it with a newer release, or export it again",
        )
    options = runtime().SessionOptions()
    options.log_severity_level = _WARNINGS
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # the graphs of a model take turns: threads that wait by spinning would take the next one's cores
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return make(path, options)


def _cpu(path: Path, options: Any) -> Any:
    return runtime().InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


TARGETS: dict[str, Callable[[Path, Any], Any]] = {"cpu": _cpu}
