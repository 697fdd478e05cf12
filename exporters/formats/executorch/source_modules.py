"""What the methods of an encoder-decoder's .pte compute beside those of `modules`: docs/executorch.md lists them all.

The decoder's K and V lie in slots as a decoder's do, those of the source in buffers that `cross` writes once. Attention
is products and a softmax, which the delegate takes together with the projections around them: ExecuTorch's own operator
knows no bias of its own for every head, and T5 adds one.

Inputs of a segment's method (n rows, 1 ≤ n ≤ max_width; m slots in sight):

    hidden     float32 [1, n, hidden_size]
    slots      int64 [1, n]        where the rows' K and V go
    distances  int64 [n, m]        how far before row i in the text the row in slot j stands: 0 for itself, 1 for its
                                   parent; -1: out of sight. Slots from m on are out of sight, and cost nothing
    source     int64 [l]           positions of the source in sight: 0 to l - 1, where `cross` took in l tokens

Shapes tell the lengths: what a delegate takes may depend on the shape of an input, not on a number in one. Nor can the
length be kept in a buffer: one that a method does not write counts as a constant in that method.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from skipstone.exporters.encoder_decoder_modules import (
    AttentionCore,
    DecoderSegment,
    SourceProjection,
    self_attention,
    source_attention,
)
from skipstone.exporters.segments import HeadShape

# registers torch.ops.llama
importlib.import_module("skipstone.exporters.formats.executorch.modules")


@dataclass(frozen=True)
class SlotPlaces:
    """Where a batch's rows go, int64 [heads, n], and what of the source is in sight, int64 [l]."""

    slots: Tensor
    source: Tensor


class FullAttention(AttentionCore):
    """Every row sees every row."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, rows: object) -> Tensor:
        return _attention(query, key, value, bias)


class _Buffers(AttentionCore):
    """K and V in buffers [heads, positions, 1, size], written in place."""

    keys: Tensor
    values: Tensor

    def __init__(self, shape: HeadShape, num_positions: int) -> None:
        super().__init__()
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape.heads, num_positions, 1, shape.size))


class SlotAttention(_Buffers):
    """Attention to the rows in the slots."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, rows: SlotPlaces
    ) -> Tensor:
        for batch, buffer in ((key, self.keys), (value, self.values)):
            torch.ops.llama.update_cache_with_indices(_as_held(batch), buffer, 0, rows.slots)
        seen = cast("Tensor", bias).shape[2]
        keys, values = (torch.slice_copy(buffer, 1, 0, seen) for buffer in (self.keys, self.values))
        return _attention(query, keys, values, bias)


class SourceAttention(_Buffers):
    """Attention to the source, whose K and V `cross` writes."""

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Take in K and V of a source, [1, heads, n, size]."""
        for batch, buffer in ((key, self.keys), (value, self.values)):
            torch.ops.llama.update_cache(_as_held(batch), buffer, 0)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, rows: SlotPlaces
    ) -> Tensor:
        keys, values = (buffer.index_select(1, rows.source) for buffer in (key, value))
        return _attention(query, keys, values)


def _as_held(batch: Tensor) -> Tensor:
    """[1, heads, n, size] → [heads, n, 1, size]."""
    return batch.reshape(batch.shape[1], -1, 1, batch.shape[3])


def _attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """[1, heads, n, size], twice [1, heads, m, size] or [heads, m, 1, size], [heads, n, m] → [1, n, heads, size]."""
    heads, size = query.shape[1], query.shape[3]
    query, keys, values = (x.reshape(heads, -1, size) for x in (query, keys, values))
    scores = torch.bmm(query, keys.transpose(1, 2))
    if bias is not None:
        scores = scores + bias
    out = torch.bmm(torch.softmax(scores, -1), values)
    return out.transpose(0, 1).reshape(1, -1, heads, size)


@dataclass(frozen=True)
class StaticCores:
    """The cores of a program; see `skipstone.exporters.encoder_decoder.Cores`."""

    slots: int
    source_length: int

    def encoder(self, shape: HeadShape) -> AttentionCore:
        return FullAttention()

    def decoder(self, shape: HeadShape) -> AttentionCore:
        return SlotAttention(shape, self.slots)

    def source(self, shape: HeadShape) -> AttentionCore:
        return SourceAttention(shape, self.source_length)


class StaticProjection(SourceProjection):
    """Writes the source's K and V: hidden states [1, n, hidden_size] → n as int64 [1]."""

    def forward(self, hidden: Tensor) -> Tensor:
        for core, key, value in self.project(hidden):
            cast("SourceAttention", core).keep(key, value)
        return torch.full((1,), hidden.shape[1], dtype=torch.long)


class SlotSegment(DecoderSegment):
    """A segment of the decoder whose rows have slots."""

    def forward(self, hidden: Tensor, slots: Tensor, distances: Tensor, source: Tensor) -> Tensor:
        heads = source_attention(next(iter(self.layers.values()))).n_heads
        return self.run(hidden, distances, SlotPlaces(slots.expand(heads, -1), source))


class SlotCompaction(nn.Module):
    """Moves rows' K and V in every layer of the decoder: as `skipstone.exporters.formats.executorch.modules.Compaction`.

    Args:
        segments: whose layers it moves.
    """

    def __init__(self, segments: Sequence[DecoderSegment]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {name: layer for segment in segments for name, layer in segment.layers.items()}
        )

    def forward(self, sources: Tensor, targets: Tensor) -> Tensor:
        for layer in self.layers.values():
            attention = self_attention(layer)
            for buffer in (attention.core.keys, attention.core.values):
                moved = buffer.index_select(1, sources)
                places = targets.expand(attention.n_heads, -1)
                torch.ops.llama.update_cache_with_indices(moved, buffer, 0, places)
        return sources
