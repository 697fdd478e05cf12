"""What the functions of a Core ML package compute: segments that keep K and V as Core ML's states.

Inputs of a segment's function (n rows, S slots, H channels):

    hidden      float16 [1, n, H]
    positions   int32 [1, n]            places in the text
    places      float16 [S, n]          1 where a slot takes a row's K and V, else 0; a row that only fills the batch up
                                        takes none
    mask        float16 [1, 1, n, S]    added to the scores: 0 where a row may look, itself included, else `MASKED`

Output: `hidden_out`, float16 [1, n, H]. The functions `head` and `draft_head` take `hidden` and give `logits`, float16
[1, n, rows of the head], final norm included. Embeddings are looked up on the host, in a table of a file of its own.

K and V of a layer are two states [1, key-value heads, S, head size]. They are written by a product with `places`
instead of by indices, so that rows may go to any slots (a tree's, or those that lag) and every shape is known when the
package is compiled. The functions of one part declare the same states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skipstone.exporters.formats.onnx.modules import RotaryTable, check_rope
from skipstone.exporters.segments import HeadShape, KeyValues, Parts, Segment, cut_decoder, load_decoder


@dataclass(frozen=True)
class PlacedRows:
    """What a segment was called with, for its attention modules; see the module."""

    places: Tensor
    mask: Tensor


class StatefulKeyValues(KeyValues):
    """K and V in buffers, which become states.

    Args:
        shape: of the attention module's K and V.
        slots: positions.
    """

    def __init__(self, shape: HeadShape, slots: int) -> None:
        super().__init__()
        self.shape = shape
        for name in ("key", "value"):
            self.register_buffer(name, torch.zeros(1, shape.heads, slots, shape.size))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, rows: PlacedRows) -> Tensor:
        kept = 1 - rows.places.sum(1)[None, None, :, None]
        keys, values = self.get_buffer("key"), self.get_buffer("value")
        keys.mul_(kept).add_(rows.places @ key)
        values.mul_(kept).add_(rows.places @ value)
        heads, count, slots = query.shape[1], query.shape[2], keys.shape[2]
        # query heads that share a key-value head stand beside its rows, so that K and V are never repeated
        grouped = (query * scaling).reshape(1, self.shape.heads, -1, self.shape.size)
        scores = (grouped @ keys.transpose(2, 3)).reshape(1, heads, count, slots) + rows.mask
        weights = torch.softmax(scores, -1).reshape(1, self.shape.heads, -1, slots)
        return (weights @ values).reshape(1, heads, count, self.shape.size).transpose(1, 2)


class StatefulSegment(Segment):
    """A segment whose K and V are states."""

    def forward(self, hidden: Tensor, positions: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        return self.run(hidden, positions, PlacedRows(places, mask))

    @property
    def shapes(self) -> set[HeadShape]:
        """Measures of its layers' K and V."""
        layers: Any = self.layers.values()
        return {layer.self_attn.key_values.shape for layer in layers}


def cut_for_package(
    checkpoint: Path, exits: Sequence[int], draft_tokens: NDArray[np.int32] | None, slots: int
) -> Parts:
    """Cut a checkpoint's decoder into modules whose segments are `StatefulSegment`s.

    Args:
        checkpoint: folder.
        exits: inner exits, ascending layer counts.
        draft_tokens: token ids of the draft head's rows; None: no draft head.
        slots: positions of K/V and of the rotary tables.

    Raises:
        CheckpointError: no plain decoder, or one whose angles depend on the length of the text.
    """
    model: Any = load_decoder(checkpoint)
    check_rope(checkpoint, model.config, slots)
    model.model.rotary_emb = RotaryTable(model.model.rotary_emb, slots)
    return cut_decoder(
        model, exits, draft_tokens, lambda shape: StatefulKeyValues(shape, slots), StatefulSegment
    )
