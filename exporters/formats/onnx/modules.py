"""What the graphs of an ONNX bundle compute: segments that are given the past's K and V and give back the batch's own.

The host keeps K and V as arrays; no graph has a state. A graph lays the past and the batch's own K and V beside each
other and attends to both, so that writing rows, committing a path and rewinding are moves of the host's arrays.

Inputs of a segment's graph (n rows, S slots of past, H channels; `layer` counts in the whole model):

    hidden                          float32 [1, n, H]
    positions                       int32 [1, n]            places in the text, below the rotary tables' length
    mask                            float32 [1, 1, n, S+n]  added to the scores: 0 where a row may look, else `MASKED`;
                                                            the S past slots first, then the batch's own n rows
    past_key_values.{layer}.key     float32 [1, key-value heads, S, head size], rotated
    past_key_values.{layer}.value   likewise

Outputs:

    hidden_out                      float32 [1, n, H]
    present.{layer}.key             float32 [1, key-value heads, n, head size]: of the batch's rows alone, rotated
    present.{layer}.value           likewise

The graphs `head` and `draft_head` take `hidden` [1, n, H] and give `logits` [1, n, rows of the head], final norm
included. Embeddings are looked up on the host, in a table of [vocabulary, H] in a file of its own.

Every row must look at something, itself at least: rows that only fill a batch up look at themselves. The angles of the
rotary embedding are read from tables [context, head size] that transformers' own module filled, because half-precision
devices cannot compute sines of large angles. Everything has at most four axes, and weights lie as [inputs, outputs].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skipstone.errors import CheckpointError
from skipstone.exporters.segments import HeadShape, KeyValues, Parts, Segment, cut_decoder, load_decoder

# Far enough below any score that the exponential is 0, and yet within what float16 holds.
MASKED = -1e4
_MEASURED_ROPE = ("dynamic", "longrope")  # their angles change with the length of the text


@dataclass(frozen=True)
class GraphRows:
    """What a segment was called with, for its attention modules.

    Attributes:
        mask: see the module.
        past: key and value of every layer of the segment, in order.
        present: the same of the batch's rows; every attention module appends its own.
    """

    mask: Tensor
    past: Sequence[tuple[Tensor, Tensor]]
    present: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class GraphKeyValues(KeyValues):
    """K and V that come in with the call and leave with it.

    Args:
        shape: of the attention module's K and V.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, rows: GraphRows) -> Tensor:
        past_key, past_value = rows.past[len(rows.present)]
        rows.present.append((key, value))
        keys, values = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
        heads, count, seen = query.shape[1], query.shape[2], keys.shape[2]
        # query heads that share a key-value head stand beside its rows, so that K and V are never repeated
        grouped = (query * scaling).reshape(1, self.shape.heads, -1, self.shape.size)
        scores = (grouped @ keys.transpose(2, 3)).reshape(1, heads, count, seen) + rows.mask
        weights = torch.softmax(scores, -1).reshape(1, self.shape.heads, -1, seen)
        return (weights @ values).reshape(1, heads, count, self.shape.size).transpose(1, 2)


class RotaryTable(nn.Module):
    """The angles of a model's rotary embedding, looked up.

    Args:
        rotary: transformers' module.
        length: positions.
    """

    def __init__(self, rotary: nn.Module, length: int) -> None:
        super().__init__()
        with torch.no_grad():
            cosines, sines = rotary(torch.zeros(1), torch.arange(length)[None])
        self.register_buffer("cosines", cosines[0].contiguous())
        self.register_buffer("sines", sines[0].contiguous())

    def forward(self, _hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        lookup = nn.functional.embedding
        return lookup(positions, self.get_buffer("cosines")), lookup(positions, self.get_buffer("sines"))


class Product(nn.Module):
    """A linear layer whose weight lies as ONNX multiplies, [inputs, outputs]; exporters fold small transposes only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        product = hidden @ self.weight
        return product if self.bias is None else product + self.bias


class GraphSegment(Segment):
    """A segment whose K and V are inputs and outputs."""

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Its layers' numbers in the whole model."""
        return tuple(int(name.removeprefix("layer_")) for name in self.layers)

    @property
    def shapes(self) -> tuple[HeadShape, ...]:
        """Measures of its layers' K and V."""
        layers: Any = self.layers.values()
        return tuple(layer.self_attn.key_values.shape for layer in layers)

    def forward(
        self, hidden: Tensor, positions: Tensor, mask: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """The module's outputs in its order; `past` has key and value of every layer, one after the other."""
        rows = GraphRows(mask, list(zip(past[::2], past[1::2], strict=True)))
        hidden = self.run(hidden, positions, rows)
        return hidden, *(tensor for pair in rows.present for tensor in pair)


def cut_for_graphs(
    checkpoint: Path, exits: Sequence[int], draft_tokens: NDArray[np.int32] | None, context: int
) -> Parts:
    """Cut a checkpoint's decoder into modules that can be traced; its segments are `GraphSegment`s.

    Args:
        checkpoint: folder.
        exits: inner exits, ascending layer counts.
        draft_tokens: token ids of the draft head's rows; None: no draft head.
        context: positions of the rotary tables.

    Raises:
        CheckpointError: no plain decoder, or one whose angles depend on the length of the text.
    """
    model: Any = load_decoder(checkpoint)
    check_rope(checkpoint, model.config, context)
    model.model.rotary_emb = RotaryTable(model.model.rotary_emb, context)
    parts = cut_decoder(model, exits, draft_tokens, GraphKeyValues, GraphSegment)
    for module in (*parts.segments, *(head for head in (parts.head, parts.draft_head) if head is not None)):
        use_products(module)
    return parts


def use_products(module: nn.Module) -> None:
    """Put a `Product` in the place of every linear layer, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Product(child))
        else:
            use_products(child)


def check_rope(checkpoint: Path, config: Any, context: int) -> None:
    """Refuse a model whose rotary angles cannot be read from a table of so many positions.

    Raises:
        CheckpointError: they change with the length of the text.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kind, trained = rope.get("rope_type"), rope.get("original_max_position_embeddings")
    limit = config.max_position_embeddings if trained is None else trained
    if kind in _MEASURED_ROPE and context > limit:
        raise CheckpointError(
            f"{checkpoint}/config.json: rope_type {kind} changes its angles past {limit} positions, {context} are "
            "asked for",
            hint=f"pass --context-length {limit}, or use --format gguf",
        )
