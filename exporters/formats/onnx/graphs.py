"""Graphs as onnx-ir models: traced once with any number of rows and slots, and narrowed to fixed ones where needed.

graph = trace_segment(parts.segments[0])       # rows and slots are symbols
narrow = fixed(graph, rows=8, slots=512)       # one shape, constants folded
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import nn

from skipstone.exporters.formats.onnx.modules import GraphSegment, past_names, present_names
from skipstone.exporters.segments import Parts
from skipstone.runtimes.quiet import quiet_libraries

OPSET = 21
ROWS, SLOTS = "rows", "slots"
_ANY = torch.export.Dim.AUTO
_EXAMPLE_ROWS, _EXAMPLE_SLOTS = 3, 5  # unlike each other and their sum, and neither 0 nor 1


def graphs_of(parts: Parts, hidden_size: int) -> Iterator[tuple[str, ir.Model]]:
    """Name and graph of every part but the embedding: `segment_0`, …, `head`, and `draft_head` where there is one."""
    for index, segment in enumerate(parts.segments):
        yield f"segment_{index}", trace_segment(segment, hidden_size)
    yield "head", trace_head(parts.head, hidden_size)
    if parts.draft_head is not None:
        yield "draft_head", trace_head(parts.draft_head, hidden_size)


def trace_segment(segment: nn.Module, hidden_size: int) -> ir.Model:
    """The graph of a `GraphSegment`, its rows and slots symbols."""
    if not isinstance(segment, GraphSegment):
        raise TypeError(f"{type(segment).__name__}: a GraphSegment was expected")
    rows, slots, layers = _EXAMPLE_ROWS, _EXAMPLE_SLOTS, segment.layer_indices
    shapes = [shape for shape in segment.shapes for _ in range(2)]
    past = [torch.zeros(1, shape.heads, slots, shape.size) for shape in shapes]
    inputs = (
        torch.zeros(1, rows, hidden_size),
        torch.arange(rows, dtype=torch.int32)[None],
        torch.zeros(1, 1, rows, slots + rows),
        past,
    )
    free = ({1: _ANY}, {1: _ANY}, {2: _ANY, 3: _ANY}, [{2: _ANY}] * len(past))
    names = ["hidden", "positions", "mask", *past_names(layers)]
    graph = _trace(segment, inputs, free, names, ["hidden_out", *present_names(layers)])
    hidden, _positions, mask, first = graph.graph.inputs[:4]
    sizes = {_size(hidden, 1): ROWS, _size(first, 2): SLOTS, _size(mask, 3): f"{SLOTS} + {ROWS}"}
    return _resized(graph, sizes)


def trace_head(head: nn.Module, hidden_size: int) -> ir.Model:
    """The graph of a head, its rows a symbol."""
    inputs = (torch.zeros(1, _EXAMPLE_ROWS, hidden_size),)
    graph = _trace(head, inputs, ({1: _ANY},), ["hidden"], ["logits"])
    return _resized(graph, {_size(graph.graph.inputs[0], 1): ROWS})


def fixed(graph: ir.Model, rows: int, slots: int) -> ir.Model:
    """A copy of a traced graph for one number of rows and slots, with what follows from them computed.

    The weights are those of the original, not copies.
    """
    from onnxscript import optimizer

    narrow = _resized(graph.clone(), {ROWS: rows, SLOTS: slots, f"{SLOTS} + {ROWS}": slots + rows})
    with quiet_libraries():
        optimizer.optimize(narrow)
    return narrow


def _trace(
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


def _size(value: ir.Value, axis: int) -> str:
    """A traced input's symbol on an axis."""
    return str(cast("ir.Shape", value.shape)[axis])


def _resized(graph: ir.Model, sizes: Mapping[str, int | str]) -> ir.Model:
    """The same graph with some sizes of its values exchanged for others."""
    values = [*graph.graph.inputs, *(value for node in graph.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([sizes.get(str(size), size) for size in value.shape])
    return graph
