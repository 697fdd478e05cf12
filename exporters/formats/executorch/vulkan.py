"""Lowering to Vulkan."""

from __future__ import annotations

import functools
from typing import Any


def make_partitioner() -> Any:
    """Vulkan's partitioner, for operators that take any width.

    The others, whose widths are fixed when they are compiled, stay on the CPU, and so does what gives a bool: it chooses
    between chain and tree there.
    """
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    _trace_patterns_once()
    return VulkanPartitioner({"require_dynamic_shapes": True, "skip_bool_tensors": True})


def _trace_patterns_once() -> None:
    """Keep the graphs of the patterns that are fused.

    ExecuTorch means to, but registers the functions that trace them without the caches around them, and traces them all
    for every part of every method: minutes for a small model.
    """
    from executorch.backends.vulkan.patterns import fusable_patterns

    for entry in fusable_patterns.values():
        trace = entry.get_graphs_fn
        if trace is not None and not hasattr(trace, "cache_info"):
            entry.get_graphs_fn = functools.cache(trace)
