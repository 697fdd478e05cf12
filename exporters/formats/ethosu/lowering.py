"""Graphs that round → programs for the NPU, through TOSA and vela, with vela's estimate of their time."""

from __future__ import annotations

import csv
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipstone.errors import ExportError
from skipstone.exporters.formats.ethosu.tools import quiet_tools
from skipstone.runtimes.engines.onnxruntime.library import first_line

SYSTEM, MEMORY = "Ethos_U85_SYS_DRAM_Mid", "Shared_Sram"
_OUTSIDE = ("quantize_per_tensor", "dequantize_per_tensor", "getitem", "executorch_call_delegate")
_KIB = 1024


@dataclass(frozen=True)
class Step:
    """One operator outside the NPU, or the call of it.

    Attributes:
        name: of its value.
        operator: its name holds one of `_OUTSIDE`.
        inputs: names of values.
        constants: its further arguments.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    constants: tuple[Any, ...]


@dataclass(frozen=True)
class Around:
    """A program's graph, the NPU's part being one step of it: names of inputs and outputs, and the steps in order."""

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Lowered:
    """A program.

    Attributes:
        program: ExecuTorch's file.
        around: what happens to values on their way to the NPU and back.
        tosa: what the NPU computes, as TOSA.
        cycles: of the NPU for a call, as vela estimates.
        clock: cycles a second that it assumes.
        operators: of the NPU.
        working_bytes: of SRAM for what a call makes.
        weight_bytes: as vela encodes them.
    """

    program: bytes
    around: Around
    tosa: bytes
    cycles: int
    clock: float
    operators: int
    working_bytes: int
    weight_bytes: int


def lower(name: str, graph: nn.Module, inputs: tuple[Tensor, ...], target: str) -> Lowered:
    """Compile a graph.

    Args:
        name: of the graph, for messages.
        graph: from `quantized_graphs`.
        inputs: examples.
        target: vela's name of the NPU, say `ethos-u85-256`.

    Raises:
        ExportError: an operator that the NPU does not take, or the compiler fails.
    """
    printed = io.StringIO()
    try:
        # vela is given its arguments as one text, so that its folder must not have a space in its name
        with tempfile.TemporaryDirectory(prefix="skipstone-") as folder, quiet_tools(printed):
            return _lowered(name, graph, inputs, target, Path(folder))
    except ExportError:
        raise
    except (Exception, SystemExit) as error:  # vela says what is wrong and goes on, or leaves
        said = [line for line in printed.getvalue().splitlines() if line.startswith("Error: ")]
        raise ExportError(
            f"{name}: it cannot be compiled for {target}: {said[-1] if said else first_line(error)}",
            hint="try a shorter --context-length, or use another --device for this architecture",
        ) from error


def _lowered(name: str, graph: nn.Module, inputs: tuple[Tensor, ...], target: str, folder: Path) -> Lowered:
    from executorch.backends.arm.ethosu import EthosUCompileSpec, EthosUPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    spec = EthosUCompileSpec(target, SYSTEM, MEMORY, extra_flags=["--verbose-performance"])
    spec.dump_intermediate_artifacts_to(str(folder))
    edge = to_edge_transform_and_lower(
        torch.export.export(graph, inputs, strict=False),
        partitioner=[EthosUPartitioner(spec)],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    check_operators(name, edge.exported_program().graph)
    around = _around(edge.exported_program())
    program = bytes(edge.to_executorch().buffer)  # which changes the graph
    summary = _summary(folder / "output")
    layers = _rows(next((folder / "output").glob("*_per-layer.csv")))
    return Lowered(
        program=program,
        around=around,
        tosa=(folder / "out.tosa").read_bytes(),
        cycles=int(float(summary["cycles_total"])),
        clock=float(summary["core_clock"]),
        operators=sum(row["Target"] == "NPU" for row in layers),
        working_bytes=int(float(summary["sram_memory_used"]) * _KIB),
        weight_bytes=int(float(summary["total_npu_encoded_weights"])),
    )


def check_operators(name: str, graph: Any) -> None:
    """Refuse a graph of which the NPU does not take all but the rounding of inputs and outputs, in one piece.

    Raises:
        ExportError: naming what is left, or how many pieces there are.
    """
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    left = sorted({target for target in targets if not any(known in target for known in _OUTSIDE)})
    pieces = sum("executorch_call_delegate" in target for target in targets)
    if left or pieces != 1:
        raise ExportError(
            f"{name}: the NPU does not take {', '.join(left) or 'it in one piece'} ({pieces} pieces for the NPU)",
            hint="use another --device for this architecture",
        )


def _around(program: Any) -> Around:
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    steps = (
        Step(
            node.name,
            str(node.target),
            tuple(each.name for each in node.args if hasattr(each, "name") and each.op != "get_attr"),
            tuple(each for each in node.args if not hasattr(each, "name")),
        )
        for node in nodes
    )
    signature = program.graph_signature
    return Around(tuple(signature.user_inputs), tuple(steps), tuple(signature.user_outputs))


def _summary(folder: Path) -> dict[str, str]:
    return _rows(next(folder.glob("*_summary_*.csv")))[0]


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))
