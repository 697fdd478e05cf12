"""How sessions are made for a target: ONNX Runtime's execution provider and its options.

A new target is two functions and one line in `TARGETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipstone.errors import DeviceError
from skipstone.runtimes.engines.onnxruntime.library import runtime
from skipstone.runtimes.engines.onnxruntime.qnn import open_qnn_session, qnn_presence
from skipstone.runtimes.engines.onnxruntime.webgpu import Presence, open_webgpu_session, webgpu_presence

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
    maker = TARGETS.get(target)
    if maker is None:
        raise DeviceError(
            f"{path}: made for {target}; this release runs {', '.join(TARGETS)}",
            hint="open it with a newer release, or export it again",
        )
    options = runtime().SessionOptions()
    options.log_severity_level = _WARNINGS
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # the graphs of a model take turns: threads that wait by spinning would take the next one's cores
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return maker.open(path, options)


def presence(target: str) -> Presence:
    """How far a target's graphs can be run on this machine.

    Raises:
        EngineError: ONNX Runtime is not installed.
    """
    return TARGETS[target].presence()


def _open_cpu_session(path: Path, options: Any) -> Any:
    return runtime().InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], enable_fallback=False
    )


def _cpu_presence() -> Presence:
    runtime()
    return "runs"


@dataclass(frozen=True)
class SessionMaker:
    """A target's sessions.

    Attributes:
        open: a session over a graph, given options that are its own.
        presence: how far they can be run on this machine.
    """

    open: Callable[[Path, Any], Any]
    presence: Callable[[], Presence]


TARGETS = {
    "cpu": SessionMaker(_open_cpu_session, _cpu_presence),
    "webgpu": SessionMaker(open_webgpu_session, webgpu_presence),
    "qnn": SessionMaker(open_qnn_session, qnn_presence),
}
