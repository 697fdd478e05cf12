"""Cuts a T5 into modules that compiled formats are made from: embedding, encoder, source, decoder, heads.

The layers are transformers' own blocks, called whole; as for decoders (`segments`), only the core of attention is
replaced, through `ALL_ATTENTION_FUNCTIONS`: every attention module is given a `core` that keeps what K and V must
outlive a call, and attends. The bias by relative position, which T5 keeps in the first layer of either stack and adds
in all of them, is looked up once per segment, so that a stack can be cut anywhere.

    model = load_encoder_decoder("samples/models/speller")
    parts = cut_encoder_decoder(model, Cuts((3,), ()), draft_tokens, cores, 512)

Layers hang in a ModuleDict under their number in their stack, decoder layers under the same names in every module that
holds them: ExecuTorch shares state between methods by that name.
"""

from __future__ import annotations

import copy
import math
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
from skipstone.exporters.encoder_decoder_modules import (
    Cores,
    DecoderSegment,
    EncoderSegment,
    SourceProjection,
    attend,
    self_attention,
    source_attention,
)
from skipstone.exporters.factors import put_factors
from skipstone.exporters.segments import Embedding, Head, HeadShape, rows_of
from skipstone.runtimes.quiet import quiet_libraries

with quiet_libraries():  # transformers loads what quantisers it finds, and those write what they lack
    from transformers.activations import NewGELUActivation
    from transformers.models.t5.modeling_t5 import T5LayerNorm

ATTENTION = "skipstone_cores"
HIDDEN = -1e9  # added to a score: out of sight; finite, as not every backend's softmax takes infinities


@dataclass(frozen=True)
class Cuts:
    """Where an encoder-decoder is cut.

    Attributes:
        exits: inner exits of the decoder, ascending layer counts.
        encoder_exits: of the encoder.
    """

    exits: tuple[int, ...]
    encoder_exits: tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """How long texts may be.

    Attributes:
        source: tokens of a source.
        slots: positions of the decoder, drafts included.
    """

    source: int
    slots: int


@dataclass(frozen=True)
class EncoderDecoderParts:
    """An encoder-decoder, cut.

    Attributes:
        embedding: token ids → hidden states, of source and text alike.
        encoder: between the encoder's exits, in order.
        decoder: between the decoder's exits, in order.
        source: encoder's final norm and the K and V that the decoder makes of the source.
        head: final norm and LM head.
        draft_head: the same over a part of the vocabulary; None without inner exits.
    """

    embedding: Embedding
    encoder: tuple[EncoderSegment, ...]
    source: SourceProjection
    decoder: tuple[DecoderSegment, ...]
    head: Head
    draft_head: Head | None


class _Gelu(nn.Module):
    """transformers' NewGELUActivation, the cube written as products: delegates know no powers but squares."""

    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class _Norm(nn.Module):
    """transformers' T5LayerNorm, the mean over channels written as a product: XNNPACK takes no such mean, and every norm
    would part its delegates.

    Args:
        norm: what it computes; the weight is shared.
    """

    mean: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon
        size = len(norm.weight)
        self.register_buffer("mean", torch.full((1, size), 1 / size), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden if hidden.dtype == torch.float32 else hidden.float()
        squares = nn.functional.linear(hidden * hidden, self.mean)
        normed = hidden * torch.rsqrt(squares + self.epsilon)
        weight: Tensor = self.weight
        return weight * (normed if weight.dtype == torch.float32 else normed.to(weight.dtype))


def load_encoder_decoder(folder: Path) -> nn.Module:
    """A checkpoint's T5 in float32, its attention ready to be cut; pairs for the layers that it has factors of.

    Raises:
        CheckpointError: transformers cannot load it, it is no T5, or its factors are another's.
    """
    from transformers import AutoModelForSeq2SeqLM, T5ForConditionalGeneration
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
    try:
        with quiet_loading(), quiet_libraries():  # which say at length that Flan-T5's head is its own
            model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {error}") from error
    if not isinstance(model, T5ForConditionalGeneration):
        raise CheckpointError(
            f"{folder}: {type(model).__name__} is an encoder-decoder of another kind",
            hint="T5ForConditionalGeneration is supported",
        )
    for stack in (model.encoder, model.decoder):
        stack.config._attn_implementation = ATTENTION
    whole: Any = model
    return put_factors(cast("nn.Module", whole.eval().requires_grad_(False)), folder)


def write_for_delegates(model: nn.Module) -> nn.Module:
    """Put modules that compute the same in operators that ExecuTorch's delegates know in the place of transformers' own,
    in place; the model.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, T5LayerNorm):
                setattr(module, name, _Norm(child))
            elif isinstance(child, NewGELUActivation):
                setattr(module, name, _Gelu())
    return model


def cut_encoder_decoder(
    model: nn.Module,
    cuts: Cuts,
    limits: Limits,
    draft_tokens: NDArray[np.int32] | None,
    cores: Cores,
    *,
    decoder_segment: Callable[[dict[int, nn.Module], Tensor], DecoderSegment] = DecoderSegment,
    projection: Callable[[nn.Module, dict[int, nn.Module]], SourceProjection] = SourceProjection,
) -> EncoderDecoderParts:
    """Cut an encoder-decoder at its exits.

    Args:
        model: from `load_encoder_decoder`; its layers become the segments' layers.
        cuts: inner exits of both stacks.
        limits: longest texts, to look biases up for.
        draft_tokens: token ids of the draft head's rows; None: no draft head.
        cores: make the cores of the attention modules.
        decoder_segment: makes the format's own kind of decoder segment.
        projection: makes the format's own kind of source projection.
    """
    whole: Any = model
    encoder, decoder, config = whole.encoder, whole.decoder, whole.config
    shape = HeadShape(config.num_heads, config.d_kv)
    for layer in encoder.block:
        self_attention(layer).core = cores.encoder(shape)
    for layer in decoder.block:
        self_attention(layer).core = cores.decoder(shape)
        source_attention(layer).core = cores.source(shape)
    ahead = encoder_table(encoder, limits.source)
    behind = decoder_table(decoder, limits.slots)
    for stack in (encoder, decoder):
        # the tables hold it, in float32 whatever the layers are quantised to
        del self_attention(stack.block[0]).relative_attention_bias
    norm = _norm_of_head(whole)
    return EncoderDecoderParts(
        embedding=Embedding(whole.shared),
        encoder=tuple(EncoderSegment(run, ahead) for run in _runs(encoder.block, cuts.encoder_exits)),
        source=projection(encoder.final_layer_norm, dict(enumerate(decoder.block))),
        decoder=tuple(decoder_segment(run, behind) for run in _runs(decoder.block, cuts.exits)),
        head=Head(norm, rows_of(whole.lm_head, None)),
        draft_head=None if draft_tokens is None else Head(norm, rows_of(whole.lm_head, draft_tokens)),
    )


def _runs(blocks: nn.ModuleList, exits: Sequence[int]) -> list[dict[int, nn.Module]]:
    """The blocks between the exits, by number."""
    edges = (0, *exits, len(blocks))
    return [{index: blocks[index] for index in range(*run)} for run in pairwise(edges)]


def encoder_table(encoder: Any, positions: int) -> Tensor:
    """Bias by key position less query position, float32 [2 * positions - 1, heads]; the middle is position 0."""
    return _bias(self_attention(encoder.block[0]), torch.arange(1 - positions, positions), True)


def decoder_table(decoder: Any, positions: int) -> Tensor:
    """Bias by query position less key position plus 1, float32 [positions + 1, heads]; the first row hides."""
    bias = _bias(self_attention(decoder.block[0]), -torch.arange(positions), False)
    return torch.cat([torch.full_like(bias[:1], HIDDEN), bias])


def _bias(attention: Any, relative: Tensor, bidirectional: bool) -> Tensor:
    buckets = attention._relative_position_bucket(
        relative,
        bidirectional=bidirectional,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    weight: Tensor = attention.relative_attention_bias.weight
    return weight.detach()[buckets]


def _norm_of_head(whole: Any) -> nn.Module:
    """The decoder's final norm. T5 with tied embeddings scales what leaves it: its weight is scaled instead."""
    norm = copy.deepcopy(whole.decoder.final_layer_norm)
    if whole.config.scale_decoder_outputs:
        norm.weight.mul_(whole.config.d_model**-0.5)
    return cast("nn.Module", norm)
