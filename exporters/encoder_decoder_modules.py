"""The modules of a cut T5: transformers' own blocks, called whole, with cores in their attention.

`encoder_decoder` cuts a model into them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from skipstone.exporters.segments import HeadShape
from skipstone.runtimes.quiet import quiet_libraries

with quiet_libraries():  # transformers loads what quantisers it finds, and those write what they lack
    from transformers.cache_utils import Cache, EncoderDecoderCache


class AttentionCore(nn.Module):
    """What stands between an attention module's projections."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, rows: Any) -> Tensor:
        """Attend.

        Args:
            query: [1, heads, n, size], not to be scaled: T5 does without.
            key: [1, heads, n, size]; of cross-attention, what `keys` of the core is.
            value: likewise.
            bias: what the segment looked up, [heads, n, positions in sight]; nothing to go by in cross-attention.
            rows: what the format's segments were called with to say where the rows stand.

        Returns:
            [1, n, heads, size].
        """
        raise NotImplementedError


class Cores(Protocol):
    """A format's cores."""

    def encoder(self, shape: HeadShape) -> AttentionCore:
        """For an encoder layer, all of whose rows see each other."""

    def decoder(self, shape: HeadShape) -> AttentionCore:
        """For a decoder layer's attention to earlier rows."""

    def source(self, shape: HeadShape) -> AttentionCore:
        """For a decoder layer's attention to the source; has tensors `keys` and `values`, axis -2 of any length."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention modules call once `ATTENTION` is chosen; attention itself is in float32."""
    core, rows, dtype = cast("AttentionCore", module.core), kwargs["rows"], query.dtype
    if dtype == torch.float32:
        return core.attend(query, key, value, position_bias, rows), None
    query, key, value = (x.float() for x in (query, key, value))
    return core.attend(query, key, value, position_bias, rows).to(dtype), None


class EncoderSegment(nn.Module):
    """A run of encoder layers over a whole source: hidden states [1, n, hidden_size] → the same, without the final norm.

    Args:
        layers: transformers' blocks by their number in the encoder.
        table: bias by how far a key lies behind its query, float32 [2 * most positions - 1, heads]; the middle is 0.
    """

    table: Tensor

    def __init__(self, layers: Mapping[int, nn.Module], table: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({f"encoder_layer_{index}": layer for index, layer in layers.items()})
        self.register_buffer("table", table, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        places = torch.arange(hidden.shape[1])
        distances = places[None] - places[:, None] + self.table.shape[0] // 2
        bias = look_up(self.table, distances)
        for layer in self.layers.values():
            hidden = layer(hidden, position_bias=bias, rows=None)[0]
        return hidden


class DecoderSegment(nn.Module):
    """A run of decoder layers: hidden states [1, n, hidden_size] → the same.

    Args:
        layers: transformers' blocks by their number in the decoder.
        table: bias by how far a key lies before its query, float32 [positions + 1, heads]; the first row, for
            distance -1, hides.
    """

    table: Tensor

    def __init__(self, layers: Mapping[int, nn.Module], table: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({f"layer_{index}": layer for index, layer in layers.items()})
        self.register_buffer("table", table, persistent=False)

    def run(self, hidden: Tensor, distances: Tensor, rows: Any) -> Tensor:
        """Run the layers.

        Args:
            hidden: [1, n, hidden_size].
            distances: int64 [n, positions in sight], of every row from every position; -1: out of sight.
            rows: handed to every core.
        """
        bias = look_up(self.table, distances + 1)
        kept = _KeptByCores(self.layers.values())
        for layer in self.layers.values():
            hidden = layer(
                hidden,
                position_bias=bias,
                encoder_hidden_states=hidden,  # not read: the source's K and V are there
                past_key_values=kept,
                rows=rows,
            )[0]
        return hidden


class SourceProjection(nn.Module):
    """The encoder's final norm, and what every decoder layer makes of the source: hidden states [1, n, hidden_size].

    Args:
        norm: the encoder's.
        layers: the decoder's blocks by their number.
    """

    def __init__(self, norm: nn.Module, layers: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.norm = norm
        self.layers = nn.ModuleDict({f"layer_{index}": layer for index, layer in layers.items()})

    def project(self, hidden: Tensor) -> Iterator[tuple[AttentionCore, Tensor, Tensor]]:
        """By decoder layer: the core of its attention to the source, and K and V, float32 [1, heads, n, size]."""
        states = self.norm(hidden)
        for layer in self.layers.values():
            attention = source_attention(layer)
            shape = (1, -1, attention.n_heads, attention.key_value_proj_dim)
            pair = (project(states).view(shape).transpose(1, 2) for project in (attention.k, attention.v))
            key, value = (x if x.dtype == torch.float32 else x.float() for x in pair)
            yield attention.core, key, value


class _Passing(Cache):
    """Hands on the K and V of a batch: the cores keep them."""

    def __init__(self) -> None:
        self.layers = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *_arguments: Any, **_options: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class _Kept(Cache):
    """Hands out the `keys` and `values` of the cores of the attention to the source."""

    def __init__(self, cores: Mapping[int, AttentionCore]) -> None:
        self.layers: Any = cores


class _KeptByCores(EncoderDecoderCache):
    """Tells transformers' attention that the source's K and V are there, and leaves all keeping to the cores."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        found = {attention.layer_idx: attention.core for attention in map(source_attention, layers)}
        self.self_attention_cache: Any = _Passing()
        self.cross_attention_cache: Any = _Kept(found)
        self.is_updated = dict.fromkeys(found, True)


def self_attention(layer: Any) -> Any:
    """A block's attention to its own stack's rows."""
    return layer.layer[0].SelfAttention


def source_attention(layer: Any) -> Any:
    """A decoder block's attention to the source."""
    return layer.layer[1].EncDecAttention


def look_up(table: Tensor, places: Tensor) -> Tensor:
    """Rows of a table: [rows, heads], int64 [n, m] → [heads, n, m]."""
    return nn.functional.embedding(places, table).permute(2, 0, 1)
