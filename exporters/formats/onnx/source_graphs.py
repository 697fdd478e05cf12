"""An encoder-decoder's graphs; `source_modules` says what they compute."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import nn

from skipstone.bundle import past_names, present_names
from skipstone.exporters.encoder_decoder import EncoderDecoderParts
from skipstone.exporters.formats.onnx.graphs import (
    ANY,
    EXAMPLE_ROWS,
    EXAMPLE_SLOTS,
    ROWS,
    SLOTS,
    resized,
    size_of,
    trace,
    trace_rows,
)
from skipstone.exporters.formats.onnx.source_modules import GraphProjection, SourceGraphSegment

SOURCE = "source"
_EXAMPLE_SOURCE = 7  # unlike the other examples


def graphs_of_source(parts: EncoderDecoderParts, hidden_size: int) -> Iterator[tuple[str, ir.Model]]:
    """Name and graph of every part but the embedding."""
    for index, encoder in enumerate(parts.encoder):
        yield f"encoder_{index}", trace_rows(encoder, hidden_size, ["hidden_out"], SOURCE)
    yield "cross", _trace_projection(parts.source, hidden_size)
    for index, segment in enumerate(parts.decoder):
        yield f"segment_{index}", _trace_segment(segment, hidden_size)
    yield "head", trace_rows(parts.head, hidden_size)
    if parts.draft_head is not None:
        yield "draft_head", trace_rows(parts.draft_head, hidden_size)


def _trace_projection(projection: nn.Module, hidden_size: int) -> ir.Model:
    if not isinstance(projection, GraphProjection):
        raise TypeError(f"{type(projection).__name__}: a GraphProjection was expected")
    made = present_names(projection.layer_indices, "encoder")
    return trace_rows(projection, hidden_size, made, SOURCE)


def _trace_segment(segment: nn.Module, hidden_size: int) -> ir.Model:
    if not isinstance(segment, SourceGraphSegment):
        raise TypeError(f"{type(segment).__name__}: a SourceGraphSegment was expected")
    rows, slots, layers = EXAMPLE_ROWS, EXAMPLE_SLOTS, segment.layer_indices
    shapes = [shape for shape in segment.shapes for _ in range(2)]
    past, source = (
        [torch.zeros(1, shape.heads, length, shape.size) for shape in shapes]
        for length in (slots, _EXAMPLE_SOURCE)
    )
    hidden = torch.zeros(1, rows, hidden_size)
    inputs = (hidden, torch.zeros(rows, slots + rows, dtype=torch.int32), past, source)
    free = ({1: ANY}, {0: ANY, 1: ANY}, [{2: ANY}] * len(past), [{2: ANY}] * len(source))
    names = ["hidden", "distances", *past_names(layers, "decoder"), *past_names(layers, "encoder")]
    graph = trace(segment, inputs, free, names, ["hidden_out", *present_names(layers, "decoder")])
    given = graph.graph.inputs
    sizes = {
        size_of(given[0], 1): ROWS,
        size_of(given[1], 1): f"{SLOTS} + {ROWS}",
        size_of(given[2], 2): SLOTS,
    }
    return resized(graph, sizes | {size_of(value, 2): SOURCE for value in given[-len(source) :]})
