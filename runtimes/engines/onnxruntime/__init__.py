"""The ONNX Runtime engine: a graph per segment, K and V in arrays of the host's."""

from skipstone.runtimes.engines.onnxruntime.engine import OnnxRuntimeEngine

__all__ = ["OnnxRuntimeEngine"]
