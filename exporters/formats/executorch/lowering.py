"""Modules → one .pte: exported with dynamic widths, delegated to a target, state shared between the methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skipstone.errors import ExportError
from skipstone.exporters.formats.executorch.methods import Method
from skipstone.exporters.formats.executorch.schemes import Mix
from skipstone.exporters.formats.executorch.targets import Target
from skipstone.runtimes.quiet import quiet_libraries

# moves K/V between slots, which lie in the CPU's memory
_ON_THE_CPU = ("compact",)


def lower(
    methods: Sequence[Method], mix: Mix, target: Target, output: Path, step: Callable[[str], None]
) -> dict[str, float]:
    """Write the program.

    Args:
        methods: of the cut and quantised model.
        mix: how it was quantised.
        target: what to lower for.
        output: the .pte to write.
        step: told of the steps `trace`, `lower` and `save`.

    Returns:
        By method, the share of its nodes that the delegate runs.

    Raises:
        ExportError: ExecuTorch cannot lower the model.
    """
    try:
        with quiet_libraries():
            from executorch.exir import (
                EdgeCompileConfig,
                ExecutorchBackendConfig,
                to_edge_transform_and_lower,
            )
            from executorch.exir.passes import MemoryPlanningPass

            step("trace")
            traced = {method.name: method.trace() for method in methods}
            step("lower")
            edge = to_edge_transform_and_lower(
                traced,
                transform_passes=target.passes(),
                partitioner={
                    name: [] if name in _ON_THE_CPU else target.partitioners(mix) for name in traced
                },
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            delegated = {name: _delegated(edge, name) for name in traced}
            step("save")
            program = edge.to_executorch(
                ExecutorchBackendConfig(
                    memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True),
                    emit_mutable_buffer_names=True,
                    do_quant_fusion_and_const_prop=mix.quantizes,
                )
            )
    except (AssertionError, RuntimeError, ValueError, NotImplementedError, KeyError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(
            f"ExecuTorch cannot lower this model for {target.name}: {first}",
            hint="try --quantize none, or --format gguf",
        ) from error
    with output.open("wb") as stream:
        program.write_to_file(stream)
    return delegated


def _delegated(edge: Any, name: str) -> float:
    """Share of a method's nodes that the delegate runs."""
    from executorch.devtools.backend_debug import get_delegation_info

    info = get_delegation_info(edge.exported_program(name).graph_module)
    nodes = info.num_delegated_nodes + info.num_non_delegated_nodes
    return info.num_delegated_nodes / nodes if nodes else 0.0
