"""Cuts a Hugging Face decoder into modules that every compiled format is made from: embedding, segments, heads.

The layers are transformers' own; no architecture is written a second time. Only the core of attention is replaced,
through `ALL_ATTENTION_FUNCTIONS`: every attention module is given a `KeyValues` submodule that keeps K and V and attends
to them. What that is depends on the format: a static buffer for ExecuTorch, inputs and outputs for ONNX.

    model = load_decoder("samples/models/coder")
    parts = cut_decoder(model, (3,), draft_tokens, lambda shape: StaticKeyValues(shape, 512))

Layers hang in a ModuleDict under their number in the whole model, so that a buffer has the same name in every module
that holds the layer. ExecuTorch shares state between methods by that name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skipstone.errors import CheckpointError
from skipstone.exporters.checkpoint import quiet_loading
from skipstone.exporters.factors import put_factors

ATTENTION = "skipstone_rows"
_NORMS = ("norm", "final_layernorm")
_PARTS = ("embed_tokens", "layers", "rotary_emb")


@dataclass(frozen=True)
class HeadShape:
    """Measures of one attention module's K and V.

    Attributes:
        heads: key-value heads.
        size: channels per head.
    """

    heads: int
    size: int


class KeyValues(nn.Module):
    """Keeps one attention module's K and V and attends to them."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, rows: Any) -> Tensor:
        """Take in the batch's K and V and attend.

        Args:
            query: [1, heads, n, size].
            key: [1, key-value heads, n, size].
            value: likewise.
            scaling: of the scores.
            rows: what the format's segments were called with to say where the rows stand.

        Returns:
            [1, n, heads, size].
        """
        raise NotImplementedError


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention modules call once `ATTENTION` is chosen."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    key_values = cast("KeyValues", module.key_values)
    return key_values.attend(query, key, value, scale, kwargs["rows"]), None


class Embedding(nn.Module):
    """Token ids [1, n] → hidden states [1, n, hidden_size]."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table
        if isinstance(table, nn.Embedding):
            table.padding_idx = (
                None  # matters for training alone, and keeps backends from recognising the lookup
            )

    def forward(self, tokens: Tensor) -> Tensor:
        return _in_float32(cast("Tensor", self.table(tokens)))


class Segment(nn.Module):
    """A run of layers: hidden states [1, n, hidden_size] → the same.

    Args:
        layers: by their number in the whole model.
        rotary: the model's rotary embedding.
    """

    def __init__(self, layers: dict[int, nn.Module], rotary: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({f"layer_{index}": layer for index, layer in layers.items()})
        self.rotary = rotary

    def run(self, hidden: Tensor, positions: Tensor, rows: Any) -> Tensor:
        """Run the layers.

        Args:
            hidden: [1, n, hidden_size].
            positions: places in the text, int64 [1, n].
            rows: handed to every `KeyValues`.
        """
        hidden = _as_computed(hidden, self.layers)
        angles = self.rotary(hidden, positions)
        for layer in self.layers.values():
            out: Tensor | tuple[Tensor, ...] = layer(
                hidden,
                attention_mask=None,
                position_ids=positions,
                past_key_values=None,
                use_cache=False,
                position_embeddings=angles,
                rows=rows,
            )
            hidden = out[0] if isinstance(out, tuple) else out
        return _in_float32(hidden)


class Head(nn.Module):
    """Final norm and LM head: hidden states [1, n, hidden_size] → logits [1, n, rows of the head]."""

    def __init__(self, norm: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.norm, self.projection = norm, projection

    def forward(self, hidden: Tensor) -> Tensor:
        return _in_float32(cast("Tensor", self.projection(self.norm(_as_computed(hidden, self.norm)))))


def _as_computed(hidden: Tensor, module: nn.Module) -> Tensor:
    """Hidden states, which travel in float32, in the type that a module computes with."""
    dtype = next(module.parameters()).dtype
    return hidden if dtype == torch.float32 else hidden.to(dtype)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.float()


@dataclass(frozen=True)
class Parts:
    """A decoder, cut.

    Attributes:
        embedding: token ids → hidden states.
        segments: between the exits, in order.
        head: final norm and LM head.
        draft_head: the same over a part of the vocabulary; None without inner exits.
    """

    embedding: Embedding
    segments: tuple[Segment, ...]
    head: Head
    draft_head: Head | None


def load_decoder(folder: Path) -> nn.Module:
    """A checkpoint's decoder in float32, its attention ready to be cut; pairs for the layers that it has factors of.

    Raises:
        CheckpointError: transformers cannot load it, it is not built as a plain decoder, or its factors are another's.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
    try:
        with quiet_loading():
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {error}") from error
    decoder = getattr(model, "model", None)
    if not all(hasattr(decoder, part) for part in _PARTS) or not hasattr(model, "lm_head"):
        raise CheckpointError(
            f"{folder}: {type(model).__name__} is not built as a plain decoder",
            hint=f"needed: model.{', model.'.join(_PARTS)}, lm_head",
        )
    model.config._attn_implementation = ATTENTION
    return put_factors(cast("nn.Module", model.eval().requires_grad_(False)), folder)


def cut_decoder(
    model: nn.Module,
    exits: Sequence[int],
    draft_tokens: NDArray[np.int32] | None,
    key_values: Callable[[HeadShape], KeyValues],
    segment: Callable[[dict[int, nn.Module], nn.Module], Segment] = Segment,
) -> Parts:
    """Cut a decoder at its exits.

    Args:
        model: from `load_decoder`; its layers become the segments' layers.
        exits: inner exits, ascending layer counts.
        draft_tokens: token ids of the draft head's rows; None: no draft head.
        key_values: makes the K/V of one attention module.
        segment: makes a segment of layers and the rotary embedding; a format's own class.
    """
    whole: Any = model
    decoder, config = whole.model, whole.config
    for layer in decoder.layers:
        attention = layer.self_attn
        shape = HeadShape(config.num_key_value_heads, attention.head_dim)
        attention.key_values = key_values(shape)
    edges = (0, *exits, len(decoder.layers))
    segments = tuple(
        segment({index: decoder.layers[index] for index in range(start, stop)}, decoder.rotary_emb)
        for start, stop in pairwise(edges)
    )
    norm = next(getattr(decoder, name) for name in _NORMS if hasattr(decoder, name))
    return Parts(
        embedding=Embedding(decoder.embed_tokens),
        segments=segments,
        head=Head(norm, rows_of(whole.lm_head, None)),
        draft_head=None if draft_tokens is None else Head(norm, rows_of(whole.lm_head, draft_tokens)),
    )


def rows_of(head: nn.Linear, tokens: NDArray[np.int32] | None) -> nn.Linear:
    """Some rows of an LM head, all of them for None; a copy, so that a tied embedding can be quantised apart."""
    rows = slice(None) if tokens is None else torch.from_numpy(tokens.astype(np.int64))
    weight = head.weight.detach()[rows].clone()
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=head.bias is not None)
    part.weight = nn.Parameter(weight, requires_grad=False)
    if head.bias is not None:
        part.bias = nn.Parameter(head.bias.detach()[rows].clone(), requires_grad=False)
    return part
