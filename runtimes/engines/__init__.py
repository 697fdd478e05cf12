"""Engines by bundle format. A new engine is one module and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from skipstone.bundle import Bundle
from skipstone.errors import DeviceError, EngineError
from skipstone.runtimes.engines.base import Engine, Share


@dataclass(frozen=True)
class EngineOptions:
    """What a user may choose when a bundle is opened.

    Attributes:
        threads: CPU threads; None: one per core this process may use.
        kv_type: of K and V on llama.cpp, see `skipstone.runtimes.engines.llamacpp.kv_types`; None: f32 for f32
            bundles, f16 otherwise.
        gpu_layers: layers to place on a GPU, from the last one on, the LM head being one of them; -1: all. Refused
            where llama.cpp finds no GPU, or not enough memory on it.
        share: the part of the model to run; None: all of it.
    """

    threads: int | None = None
    kv_type: str | None = None
    gpu_layers: int = 0
    share: Share | None = None


def _llamacpp(bundle: Bundle, options: EngineOptions) -> Engine:
    from skipstone.runtimes.engines.llamacpp import LlamaCppEngine

    return LlamaCppEngine(bundle, options)


def _executorch(bundle: Bundle, options: EngineOptions) -> Engine:
    from skipstone.runtimes.engines.executorch import ExecuTorchEngine

    return ExecuTorchEngine(bundle, options)


def _onnxruntime(bundle: Bundle, options: EngineOptions) -> Engine:
    from skipstone.runtimes.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(bundle, options)


def _absent(bundle: Bundle, _options: EngineOptions) -> Engine:
    """For formats that apps on the device run, and nothing here."""
    raise DeviceError(
        f"{bundle.path}: made for {bundle.manifest.device}; no engine here runs format {bundle.manifest.format}",
        hint="export the model with --device cpu to run it here",
    )


ENGINES: dict[str, Callable[[Bundle, EngineOptions], Engine]] = {
    "gguf": _llamacpp,
    "executorch": _executorch,
    "onnx": _onnxruntime,
    "coreml": _absent,
    "ethosu": _absent,
}


def open_engine(bundle: Bundle, options: EngineOptions | None = None) -> Engine:
    """The engine for a bundle's format, weights loaded.

    Raises:
        EngineError: no engine for the format, or it refused to load the artefacts.
    """
    make = ENGINES.get(bundle.manifest.format)
    if make is None:
        raise EngineError(
            f"{bundle.path}: no engine runs format {bundle.manifest.format}",
            hint=f"known: {', '.join(ENGINES)}",
        )
    return make(bundle, options or EngineOptions())
