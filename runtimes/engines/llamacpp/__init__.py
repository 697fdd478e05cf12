"""llama.cpp through stock llama-cpp-python: segments, head and trees on CPU and consumer GPUs."""

from skipstone.runtimes.engines.llamacpp.engine import LlamaCppEngine

__all__ = ["LlamaCppEngine"]
