"""What the graphs of an encoder-decoder compute beside those of `modules`.

The encoder reads a source once, `cross` makes K and V of it once, and the decoder's segments are given them as inputs.

Graphs (n rows, S slots of past, l tokens of the source, H channels; layers count in their stack):

    encoder_0, …  hidden float32 [1, l, H], the whole source → hidden_out, before the encoder's final norm
    cross         hidden float32 [1, l, H] → present.{layer}.encoder.key and .value, float32 [1, heads, l, size], of all
                  layers of the decoder
    segment_0, …  hidden     float32 [1, n, H]
                  distances  int32 [n, S+n]: how far before row i in the text the row in a slot, or in the batch, stands.
                             0 for itself, 1 for its parent; -1: out of sight. The S slots come first
                  past_key_values.{layer}.decoder.key and .value, float32 [1, heads, S, size]
                  past_key_values.{layer}.encoder.key and .value, which `cross` gave
                  → hidden_out, and present.{layer}.decoder.key and .value, [1, heads, n, size], of the batch alone

T5 adds to every score a bias by head and distance, and -1 has one that hides; so distances say all that positions and
mask say elsewhere. The bias is looked up once per segment. The heads are a decoder's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skipstone.exporters.encoder_decoder import (
    Cuts,
    EncoderDecoderParts,
    Limits,
    cut_encoder_decoder,
    load_encoder_decoder,
)
from skipstone.exporters.encoder_decoder_modules import (
    AttentionCore,
    DecoderSegment,
    SourceProjection,
    self_attention,
)
from skipstone.exporters.formats.onnx.modules import use_products
from skipstone.exporters.segments import HeadShape


@dataclass(frozen=True)
class SourceRows:
    """What a segment was called with, for its attention modules.

    Attributes:
        past: key and value of every layer of the segment, in order.
        source: the same of the source.
        present: the same of the batch's rows; every layer's attention to the rows appends its own.
    """

    past: Sequence[tuple[Tensor, Tensor]]
    source: Sequence[tuple[Tensor, Tensor]]
    present: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Core(AttentionCore):
    """Knows the shape of its K and V."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape


class _FullAttention(_Core):
    """Every row sees every row."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, rows: object) -> Tensor:
        return _attention(query, key, value, bias)


class _RowAttention(_Core):
    """Attention to the past and the batch, which lie beside each other."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, rows: SourceRows
    ) -> Tensor:
        past_key, past_value = rows.past[len(rows.present)]
        rows.present.append((key, value))
        return _attention(query, torch.cat((past_key, key), 2), torch.cat((past_value, value), 2), bias)


class _SourceAttention(_Core):
    """Attention to the source, whose K and V come with the call."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape)
        for name in ("keys", "values"):  # transformers hands these over; nothing is computed with them
            self.register_buffer(name, torch.zeros(1, shape.heads, 1, shape.size), persistent=False)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, rows: SourceRows
    ) -> Tensor:
        return _attention(
            query, *rows.source[len(rows.present) - 1]
        )  # behind the layer's attention to the rows


def _attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """[1, heads, n, size], twice [1, heads, m, size], [heads, n, m] → [1, n, heads, size]."""
    scores = query @ keys.transpose(2, 3)
    if bias is not None:
        scores = scores + bias
    return (torch.softmax(scores, -1) @ values).transpose(1, 2)


class GraphCores:
    """See `skipstone.exporters.encoder_decoder_modules.Cores`."""

    def encoder(self, shape: HeadShape) -> AttentionCore:
        return _FullAttention(shape)

    def decoder(self, shape: HeadShape) -> AttentionCore:
        return _RowAttention(shape)

    def source(self, shape: HeadShape) -> AttentionCore:
        return _SourceAttention(shape)


class SourceGraphSegment(DecoderSegment):
    """A segment of the decoder whose K and V, and the source's, are inputs and outputs."""

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Its layers' numbers in the decoder."""
        return tuple(int(name.removeprefix("layer_")) for name in self.layers)

    @property
    def shapes(self) -> tuple[HeadShape, ...]:
        """Measures of its layers' K and V."""
        return tuple(self_attention(layer).core.shape for layer in self.layers.values())

    def forward(
        self, hidden: Tensor, distances: Tensor, past: Sequence[Tensor], source: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """The module's outputs in its order; `past` and `source` have key and value of every layer, one after the
        other.
        """
        rows = SourceRows(_pairs(past), _pairs(source))
        hidden = self.run(hidden, distances, rows)
        return hidden, *(tensor for pair in rows.present for tensor in pair)


class GraphProjection(SourceProjection):
    """Gives K and V of the source: hidden states [1, l, hidden_size] → key and value of every layer of the decoder."""

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """The decoder's layers."""
        return tuple(range(len(self.layers)))

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for _core, key, value in self.project(hidden) for tensor in (key, value))


def _pairs(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def cut_source_for_graphs(
    checkpoint: Path, cuts: Cuts, limits: Limits, draft_tokens: NDArray[np.int32] | None
) -> EncoderDecoderParts:
    """Cut a checkpoint's encoder-decoder into modules that can be traced; its decoder's are `SourceGraphSegment`s, its
    `source` is a `GraphProjection`.

    Args:
        checkpoint: folder.
        cuts: inner exits.
        limits: longest texts.
        draft_tokens: token ids of the draft head's rows; None: no draft head.

    Raises:
        CheckpointError: transformers cannot load it, or it is no T5.
    """
    parts = cut_encoder_decoder(
        load_encoder_decoder(checkpoint),
        cuts,
        limits,
        draft_tokens,
        GraphCores(),
        decoder_segment=SourceGraphSegment,
        projection=GraphProjection,
    )
    modules: list[nn.Module | None] = [
        *parts.encoder,
        parts.source,
        *parts.decoder,
        parts.head,
        parts.draft_head,
    ]
    for module in modules:
        if module is not None:
            use_products(module)
    return parts
