"""Files of an ONNX bundle: graphs, with their weights beside them where they are large, and the embedding table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from skipstone.bundle import GraphEntry, TableEntry
from skipstone.exporters.segments import Embedding

# A protobuf file holds 2 GiB at most.
EXTERNAL_FROM = 1_000_000_000
_SMALLEST_OUTSIDE = 1024  # bytes; constants below it stay in the graph
_TABLES = ("rotary.", "table")  # of angles and biases, of which a call reads a few rows
_BLOCK = 4096  # rows of the embedding table at a time


def write_graph(
    graph: ir.Model, part: str, width: int | None, folder: Path, external_from: int | None = None
) -> GraphEntry:
    """Write a graph as `{part}.onnx` (`{part}-{width}.onnx` for one width), its weights as `….onnx_data` if need be.

    Args:
        graph: the model.
        part: `segment_0`, …, `head`, `draft_head`.
        width: rows, None: any.
        folder: where to.
        external_from: bytes of weights from which on they get a file of their own; None: a thousand million.
    """
    sizes = {
        name: value.const_value.nbytes
        for name, value in graph.graph.initializers.items()
        if value.const_value
    }
    limit = EXTERNAL_FROM if external_from is None else external_from
    name = f"{part}.onnx" if width is None else f"{part}-{width}.onnx"
    weights = f"{name}_data" if sum(sizes.values()) >= limit else None
    ir.save(graph, folder / name, external_data=weights, size_threshold_bytes=_SMALLEST_OUTSIDE)
    return GraphEntry(
        part=part,
        width=width,
        file=name,
        weights=weights,
        weight_bytes=sum(size for name, size in sizes.items() if not name.startswith(_TABLES)),
    )


def write_table(embedding: Embedding, half: bool, folder: Path) -> TableEntry:
    """Write what the embedding gives for every token, float16 if `half`, else float32."""
    kind = np.float16 if half else np.float32
    file = f"embeddings.{'f16' if half else 'f32'}"
    rows, columns = _weight(embedding.table).shape
    with (folder / file).open("wb") as stream, torch.no_grad():
        for start in range(0, rows, _BLOCK):
            tokens = torch.arange(start, min(start + _BLOCK, rows))[None]
            stream.write(embedding(tokens)[0].numpy().astype(np.dtype(kind).newbyteorder("<")).tobytes())
    return TableEntry(file=file, rows=rows, columns=columns, type="float16" if half else "float32")


def _weight(table: nn.Module) -> torch.Tensor:
    return next(table.parameters())
