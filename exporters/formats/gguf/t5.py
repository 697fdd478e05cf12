"""T5 (and Flan-T5, CodeT5) → GGUF: llama.cpp's architecture "t5", tensors named as in its gguf-py.

llama.cpp knows no scale of the head's input, with which T5 multiplies where embeddings and head are one table
(hidden_size ** -0.5). It is folded into the gain of the decoder's final norm, which computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf

from skipstone.errors import CheckpointError
from skipstone.exporters.checkpoint import Checkpoint
from skipstone.exporters.facts import DEFAULT_LENGTH, SHARED_TABLES, has_own_head
from skipstone.exporters.formats.gguf.layout import Layout, Source
from skipstone.exporters.formats.gguf.parts import (
    MetaValue,
    TensorPart,
    array_part,
    float32,
    uint32,
    zero_matrix,
)

ARCH = "t5"
_ATTENTION = ("q", "k", "v", "o")
_MAX_DISTANCE = 128  # of relative positions, fixed in llama.cpp
# Kept in old checkpoints, read by nobody.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@dataclass(frozen=True)
class EncoderDecoder:
    """A T5's measures; counts are of layers, heads, units, tokens."""

    hidden_size: int
    encoder_layers: int
    decoder_layers: int
    num_heads: int
    head_dim: int
    feed_forward: int
    gated: bool
    vocab_size: int
    buckets: int
    norm_eps: float
    own_head: bool
    head_scale: float
    start_token_id: int

    @property
    def inner_size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_dim


def encoder_decoder_of(checkpoint: Checkpoint) -> EncoderDecoder:
    """A checkpoint's measures.

    Raises:
        CheckpointError: the configuration asks for something that llama.cpp's architecture lacks.
    """
    config = checkpoint.config
    _refuse_what_is_missing(checkpoint)
    return EncoderDecoder(
        hidden_size=config.d_model,
        encoder_layers=config.num_layers,
        decoder_layers=config.num_decoder_layers,
        num_heads=config.num_heads,
        head_dim=config.d_kv,
        feed_forward=config.d_ff,
        gated=bool(config.is_gated_act),
        vocab_size=config.vocab_size,
        buckets=config.relative_attention_num_buckets,
        norm_eps=config.layer_norm_epsilon,
        own_head=has_own_head(checkpoint),
        head_scale=config.d_model**-0.5 if config.scale_decoder_outputs else 1.0,
        start_token_id=config.decoder_start_token_id or 0,
    )


def t5_layout(checkpoint: Checkpoint, max_source_length: int = DEFAULT_LENGTH) -> Layout:
    """A checkpoint laid out as one GGUF. llama.cpp makes room for the K/V of as many layers as the encoder has; where
    the decoder has more, layers that compute nothing are appended to the encoder.

    Raises:
        CheckpointError: as `encoder_decoder_of`.
    """
    model = encoder_decoder_of(checkpoint)
    table = next((name for name in SHARED_TABLES if name in checkpoint.tensor_files), SHARED_TABLES[0])
    return Layout(
        arch=ARCH,
        keys=_keys(model, max_source_length),
        sources=_sources(model, table),
        shapes=_shapes(model),
        made=tuple(
            part
            for layer in range(model.encoder_layers, model.decoder_layers)
            for part in idle_encoder_layer(
                layer,
                model.hidden_size,
                model.inner_size,
                model.feed_forward,
                gguf.GGMLQuantizationType.F32,
            )
        ),
        ignored=frozenset({*SHARED_TABLES, "lm_head.weight", _UNUSED}),
    )


def idle_encoder_layer(
    layer: int, hidden: int, inner: int, feed_forward: int, kind: gguf.GGMLQuantizationType | None = None
) -> list[TensorPart]:
    """An encoder layer that passes its input on: what it would add is multiplied by zeros.

    Args:
        layer: its number.
        hidden: hidden size.
        inner: width of all heads together.
        feed_forward: width of the feed-forward network.
        kind: type of the zeros; None: the smallest that fits.
    """
    name = f"enc.blk.{layer}"
    inward = [
        *(zero_matrix(f"{name}.attn_{matrix}.weight", inner, hidden, kind) for matrix in "qkv"),
        zero_matrix(f"{name}.ffn_up.weight", feed_forward, hidden, kind),
    ]
    outward = [
        zero_matrix(f"{name}.attn_o.weight", hidden, inner, kind),
        zero_matrix(f"{name}.ffn_down.weight", hidden, feed_forward, kind),
    ]
    norms = [array_part(f"{name}.{norm}.weight", [1.0] * hidden) for norm in ("attn_norm", "ffn_norm")]
    return [*norms, *inward, *outward]


def _keys(model: EncoderDecoder, max_source_length: int) -> dict[str, MetaValue]:
    keys = {
        "context_length": uint32(max_source_length),
        "embedding_length": uint32(model.hidden_size),
        "feed_forward_length": uint32(model.feed_forward),
        "block_count": uint32(max(model.encoder_layers, model.decoder_layers)),
        "decoder_block_count": uint32(model.decoder_layers),
        "attention.head_count": uint32(model.num_heads),
        "attention.key_length": uint32(model.head_dim),
        "attention.value_length": uint32(model.head_dim),
        "attention.layer_norm_epsilon": float32(model.norm_eps),
        "attention.relative_buckets_count": uint32(model.buckets),
        "attention.layer_norm_rms_epsilon": float32(model.norm_eps),
        "decoder_start_token_id": uint32(model.start_token_id),
        "vocab_size": uint32(model.vocab_size),
    }
    return {f"{ARCH}.{key}": value for key, value in keys.items()}


def _sources(model: EncoderDecoder, table: str) -> dict[str, Source]:
    sources = {"token_embd.weight": Source(table)}
    if model.own_head:
        sources["output.weight"] = Source("lm_head.weight")
    for layer in range(model.encoder_layers):
        sources |= _side("encoder", "enc", layer, model.gated)
    for layer in range(model.decoder_layers):
        sources |= _side("decoder", "dec", layer, model.gated)
    sources["enc.output_norm.weight"] = Source("encoder.final_layer_norm.weight")
    sources["dec.output_norm.weight"] = Source("decoder.final_layer_norm.weight", scale=model.head_scale)
    return sources


def _side(stack: str, short: str, layer: int, gated: bool) -> dict[str, Source]:
    """One layer of one stack: self-attention, for the decoder cross-attention, and the feed-forward network."""
    sublayers = [("attn", "SelfAttention"), ("cross_attn", "EncDecAttention")][: 1 if short == "enc" else 2]
    names: dict[str, str] = {}
    for index, (target, attention) in enumerate(sublayers):
        names[f"{target}_norm"] = f"layer.{index}.layer_norm"
        names |= {f"{target}_{matrix}": f"layer.{index}.{attention}.{matrix}" for matrix in _ATTENTION}
    if layer == 0:
        names["attn_rel_b"] = "layer.0.SelfAttention.relative_attention_bias"
    last = len(sublayers)
    up = {"ffn_gate": "wi_0", "ffn_up": "wi_1"} if gated else {"ffn_up": "wi"}
    names["ffn_norm"] = f"layer.{last}.layer_norm"
    names |= {
        target: f"layer.{last}.DenseReluDense.{name}" for target, name in {**up, "ffn_down": "wo"}.items()
    }
    return {
        f"{short}.blk.{layer}.{target}.weight": Source(f"{stack}.block.{layer}.{name}.weight")
        for target, name in names.items()
    }


def _shapes(model: EncoderDecoder) -> dict[str, tuple[int, ...]]:
    hidden, inner, ffn = model.hidden_size, model.inner_size, model.feed_forward
    kinds: dict[str, tuple[int, ...]] = {
        "attn_rel_b": (model.buckets, model.num_heads),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    for attention in ("attn", "cross_attn"):
        kinds |= {f"{attention}_{matrix}": (inner, hidden) for matrix in "qkv"}
        kinds[f"{attention}_o"] = (hidden, inner)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("token_embd.weight", "output.weight"), (model.vocab_size, hidden)
    )
    for name in _sources(model, SHARED_TABLES[0]):
        if name not in shapes:
            shapes[name] = kinds.get(name.split(".")[-2], (hidden,))
    return shapes


def _refuse_what_is_missing(checkpoint: Checkpoint) -> None:
    config, file = checkpoint.config, checkpoint.path / "config.json"
    if (bool(config.is_gated_act), config.dense_act_fn) not in ((False, "relu"), (True, "gelu_new")):
        raise CheckpointError(
            f"{file}: feed_forward_proj is {config.feed_forward_proj!r}, only 'relu' and 'gated-gelu' are supported"
        )
    if config.relative_attention_max_distance != _MAX_DISTANCE:
        raise CheckpointError(
            f"{file}: relative_attention_max_distance is {config.relative_attention_max_distance}, "
            f"llama.cpp computes with {_MAX_DISTANCE}",
            hint="--format executorch takes any",
        )
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{file}: the weights are quantised already (quantization_config)",
            hint="pass the unquantised checkpoint",
        )
