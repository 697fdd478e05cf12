"""Graphs as onnx-ir models: traced once with any number of rows and slots, and narrowed to fixed ones where needed.

graph = trace_segment(parts.segments[0])       # rows and slots are symbols
narrow = fixed(graph, rows=8, slots=512)       # one shape, constants folded
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import nn

from skipstone.bundle import past_names, present_names
from skipstone.exporters.formats.onnx.modules import GraphSegment
from skipstone.exporters.segments import Parts
from skipstone.runtimes.quiet import quiet_libraries

OPSET = 21
ROWS, SLOTS = "rows", "slots"
ANY = torch.export.Dim.AUTO
EXAMPLE_ROWS, EXAMPLE_SLOTS = 3, 5  # unlike each other and their sum, and neither 0 nor 1


def graphs_of(parts: Parts, hidden_size: int) -> Iterator[tuple[str, ir.Model]]:
    """Name and graph of every part but the embedding: `segment_0`, …, `head`, and `draft_head` where there is one."""
    for index, segment in enumerate(parts.segments):
        yield f"segment_{index}", trace_segment(segment, hidden_size)
    yield "head", trace_rows(parts.head, hidden_size)
    if parts.draft_head is not None:
        yield "draft_head", trace_rows(parts.draft_head, hidden_size)


def trace_segment(segment: nn.Module, hidden_size: int) -> ir.Model:
    """The graph of a `GraphSegment`, its rows and slots symbols."""
    if not isinstance(segment, GraphSegment):
        raise TypeError(f"{type(segment).__name__}: a GraphSegment was expected")
    rows, slots, layers = EXAMPLE_ROWS, EXAMPLE_SLOTS, segment.layer_indices
    shapes = [shape for shape in segment.shapes for _ in range(2)]
    past = [torch.zeros(1, shape.heads, slots, shape.size) for shape in shapes]
    inputs = (
        torch.zeros(1, rows, hidden_size),
        torch.arange(rows, dtype=torch.int32)[None],
        torch.zeros(1, 1, rows, slots + rows),
        past,
    )
    free = ({1: ANY}, {1: ANY}, {2: ANY, 3: ANY}, [{2: ANY}] * len(past))
    names = ["hidden", "positions", "mask", *past_names(layers)]
    graph = trace(segment, inputs, free, names, ["hidden_out", *present_names(layers)])
    hidden, _positions, mask, first = graph.graph.inputs[:4]
    sizes = {size_of(hidden, 1): ROWS, size_of(first, 2): SLOTS, size_of(mask, 3): f"{SLOTS} + {ROWS}"}
    return resized(graph, sizes)


def trace_rows(
    module: nn.Module, hidden_size: int, made: Sequence[str] = ("logits",), rows: str = ROWS
) -> ir.Model:
    """The graph of a module that hidden states alone go into, a head say, their number a symbol.

    Args:
        module: what is traced.
        hidden_size: channels.
        made: names of the outputs.
        rows: the symbol.
    """
    inputs = (torch.zeros(1, EXAMPLE_ROWS, hidden_size),)
    graph = trace(module, inputs, ({1: ANY},), ["hidden"], list(made))
    return resized(graph, {size_of(graph.graph.inputs[0], 1): rows})


def fixed(graph: ir.Model, rows: int, slots: int) -> ir.Model:
    """A copy of a traced graph for one number of rows and slots, with what follows from them computed.

    The weights are those of the original, not copies.
    """
    from onnxscript import optimizer

    narrow = resized(graph.clone(), {ROWS: rows, SLOTS: slots, f"{SLOTS} + {ROWS}": slots + rows})
    with quiet_libraries():
        optimizer.optimize(narrow)
    return narrow


def trace(
    module: nn.Module, inputs: tuple[Any, ...], free: tuple[Any, ...], given: list[str], made: list[str]
) -> ir.Model:
    """Trace a module.

    Args:
        module: what is traced.
        inputs: examples.
        free: by input, the axes that may have any size.
        given: names of the inputs.
        made: names of the outputs.
    """
    with quiet_libraries(), torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=free, strict=False)
        exported: Any = torch.onnx.export(
            program, (), dynamo=True, opset_version=OPSET, input_names=given, output_names=made, verbose=False
        )
    graph: ir.Model = exported.model
    graph.producer_name, graph.producer_version = "skipstone", ""
    for node in graph.graph:  # where torch's operators came from: half the file of a small model
        node.metadata_props.clear()
        node.doc_string = None
    for value in graph.graph.initializers.values():
        value.metadata_props.clear()
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    return graph


def size_of(value: ir.Value, axis: int) -> str:
    """A traced input's symbol on an axis, zero-based."""
    return str(cast("ir.Shape", value.shape)[axis])


def resized(graph: ir.Model, sizes: Mapping[str, int | str]) -> ir.Model:
    """The same graph with some sizes of its values exchanged for others."""
    values = [*graph.graph.inputs, *(value for node in graph.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([sizes.get(str(size), size) for size in value.shape])
    return graph
