"""Lowering to Core ML: packages for iOS 18 and macOS 15 with widths within bounds, one for every run of operators
between two that stay on the CPU.

ExecuTorch's partitioner needs help in four places: it claims the branches of `torch.cond`, which then cannot be
found; it shares weights between methods by position, which takes methods of equal structure; it takes torch's
lower bounds, under which a single row is no batch; and Core ML has no integers as inputs that stand for a width, so that
reshapes must find the number of rows themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils._sympy.value_ranges import ValueRanges

from skipstone.errors import ExportError

# gives bool, which no Core ML package can return: it chooses between chain and tree, for `torch.cond` on the CPU
_STAY = ("aten.ne.scalar",)


def make_partitioner(*, half: bool) -> Any:
    """Core ML's partitioner.

    Args:
        half: compute in float16, which the Neural Engine needs; else in float32.

    Raises:
        ExportError: coremltools is missing.
    """
    try:
        import coremltools
    except ImportError as error:
        raise ExportError(
            f"Core ML packages cannot be written: {error}",
            hint="export on macOS or x86-64 Linux: `pip install coremltools==9.0`",
        ) from error
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.compiler.coreml_preprocess import (
        MULTIMETHOD_WEIGHT_SHARING_STRATEGY,
    )
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    class Partitioner(CoreMLPartitioner):  # type: ignore[misc]  # ExecuTorch is untyped
        def partition(self, exported_program: Any) -> Any:
            _admit_single_rows(exported_program)
            found = super().partition(exported_program)
            for node in exported_program.graph.nodes:
                if node.op == "get_attr" and torch.ops.higher_order.cond in {
                    user.target for user in node.users
                }:
                    node.meta.pop("delegation_tag", None)
            used = {node.meta.get("delegation_tag") for node in exported_program.graph.nodes}
            for tag in found.partition_tags.keys() - used:
                del found.partition_tags[tag]
            return found

    precision = coremltools.precision
    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=coremltools.target.iOS18,
        compute_precision=precision.FLOAT16 if half else precision.FLOAT32,
    )
    apart = MULTIMETHOD_WEIGHT_SHARING_STRATEGY.DISABLED
    specs.append(CoreMLBackend.generate_multimethod_weight_sharing_strategy_compile_spec(apart))
    return Partitioner(
        compile_specs=specs, take_over_mutable_buffer=False, skip_ops_for_coreml_delegation=list(_STAY)
    )


def _admit_single_rows(exported_program: Any) -> None:
    """Let widths begin at 1: torch traces with at least 2, which Core ML, unlike other delegates, insists on."""
    ranges = exported_program.range_constraints
    for symbol, found in ranges.items():
        if found.lower == 2:
            ranges[symbol] = ValueRanges(1, found.upper)


def infer_rows(module: fx.GraphModule) -> PassResult:
    """Write reshapes with -1 in place of the number of rows, and drop what computed that number."""
    for node in module.graph.nodes:
        if "view" in str(node.target) and any(isinstance(size, fx.Node) for size in node.args[1]):
            shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
            if shape.count(-1) == 1:
                node.update_arg(1, shape)
    changed = module.graph.eliminate_dead_code()
    module.recompile()
    return PassResult(module, changed)
