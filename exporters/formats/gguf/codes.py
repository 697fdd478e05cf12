"""Codes of a compressed checkpoint → the tensors of a GGUF, block by block as they were chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import gguf
import numpy as np

from skipstone.errors import CheckpointError
from skipstone.exporters.compress.quantize.gguf_grid import GRIDS, blocks_of
from skipstone.exporters.facts import SHARED_TABLES
from skipstone.exporters.formats.gguf.layout import Layout, Source
from skipstone.exporters.formats.gguf.mapping import interleave_rows
from skipstone.exporters.formats.gguf.parts import RawArray, TensorPart

if TYPE_CHECKING:
    from skipstone.exporters.compress.work import Codes, FixedCodes


def put_codes(parts: Sequence[TensorPart], layout: Layout, codes: FixedCodes) -> list[TensorPart]:
    """The tensors of a whole GGUF, those with codes replaced by their blocks.

    Args:
        parts: the checkpoint's tensors in floats.
        layout: where they come from.
        codes: of some of them.

    Raises:
        CheckpointError: codes of a weight that the file does not hold, or of another shape than it has.
    """
    found = dict(_placed(layout, codes.weights))
    left = sorted(set(codes.weights) - {name for name, _ in found.values()})
    if left:
        raise CheckpointError(
            f"codes of {len(left)} weights have no place in GGUF, the first is {left[0]}",
            hint="compress the checkpoint again",
        )
    return [
        _part(part, layout.sources[part.name], *found[part.name]) if part.name in found else part
        for part in parts
    ]


def _placed(layout: Layout, weights: Mapping[str, Codes]) -> Iterator[tuple[str, tuple[str, Codes]]]:
    """By GGUF tensor, the name and the codes of its weight. A T5's shared table goes by several names."""
    shared = next((name for name in SHARED_TABLES if name in weights), None)
    for name, source in layout.sources.items():
        known = source.name if source.name in weights or source.name not in SHARED_TABLES else shared
        if known is not None and known in weights:
            yield name, (known, weights[known])


def _part(part: TensorPart, source: Source, name: str, codes: Codes) -> TensorPart:
    """One tensor of blocks. Rows can be moved, since blocks never cross a row."""
    grid = GRIDS.get(codes.grid)
    blocks = None if grid is None else blocks_of(codes.parts)
    if grid is None or blocks is None or blocks.numel() != grid.num_bytes(*part.shape):
        raise CheckpointError(
            f"{name}: codes in the layout {codes.grid} do not fit a weight of shape {list(part.shape)}",
            hint="compress the checkpoint again",
        )

    def read() -> RawArray:
        moved = interleave_rows(blocks, source.interleave_heads) if source.interleave_heads else blocks
        return np.ascontiguousarray(moved.numpy())

    return TensorPart(part.name, part.shape, gguf.GGMLQuantizationType(grid.type), read)
