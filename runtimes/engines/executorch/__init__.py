"""The ExecuTorch engine: one .pte, a method per segment, static K/V."""

from skipstone.runtimes.engines.executorch.engine import ExecuTorchEngine

__all__ = ["ExecuTorchEngine"]
