"""Cutting a whole T5 GGUF: encoder segments and decoder segments, each a file of its own fed by hidden states.

An encoder segment is a model of llama.cpp's architecture "t5encoder". A decoder segment is a "t5", whose encoder must
have as many layers as its decoder, for llama.cpp makes room for the K/V of so many: they are idle, zeros in the smallest
type, and do nothing but hand the source's hidden states to the encoder's final norm. T5 adds the position biases of
its first layer in every layer, and llama.cpp takes a file's first layer's, so each segment's has a copy.
"""

from __future__ import annotations

from pathlib import Path

from skipstone.exporters.formats.gguf.cut import DUMMY_VOCABULARY, NO_TOKENIZER, Cut
from skipstone.exporters.formats.gguf.parts import (
    GgufModel,
    MetaValue,
    TensorPart,
    renamed,
    uint32,
    write_parts,
    zero_part,
)
from skipstone.exporters.formats.gguf.t5 import ARCH, idle_encoder_layer

ENCODER_ARCH = "t5encoder"
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_ENCODER_NORM, _DECODER_NORM = "enc.output_norm.weight", "dec.output_norm.weight"
_OF_THE_DECODER = ("decoder_block_count", "decoder_start_token_id")


def write_encoder_segment(model: GgufModel, first: int, stop: int, path: Path) -> None:
    """Write the encoder's layers `first` to `stop` (excluded). Rows leave before the final norm and after it."""
    meta = _meta(model, ENCODER_ARCH, stop - first, DUMMY_VOCABULARY)
    for key in _OF_THE_DECODER:
        del meta[f"{ENCODER_ARCH}.{key}"]
    parts = [*_blocks(model, "enc", first, stop), model.parts[_ENCODER_NORM], _dummy_table(model)]
    write_parts(path, ENCODER_ARCH, meta, parts)


def write_decoder_segment(model: GgufModel, cut: Cut, path: Path) -> None:
    """Write the decoder's layers of a cut, with the head if it is the last."""
    layers, last = cut.stop - cut.first, cut.output == "logits"
    table = model.parts[_EMBEDDING] if last else _dummy_table(model)
    meta = _meta(model, ARCH, layers, table.shape[0])
    meta[f"{ARCH}.decoder_block_count"] = uint32(layers)
    idle = [part for layer in range(layers) for part in _idle_layer(model, layer)]
    head = [model.parts[_HEAD]] if last and _HEAD in model.parts else []
    norms = [model.parts[_ENCODER_NORM], model.parts[_DECODER_NORM]]
    write_parts(path, ARCH, meta, [*idle, *_blocks(model, "dec", cut.first, cut.stop), *norms, table, *head])


def _meta(model: GgufModel, arch: str, layers: int, vocab_size: int) -> dict[str, MetaValue]:
    prefix = f"{ARCH}."
    own = {key.removeprefix(prefix): value for key, value in model.meta.items() if key.startswith(prefix)}
    own |= {"block_count": uint32(layers), "vocab_size": uint32(vocab_size)}
    return {f"{arch}.{key}": value for key, value in own.items()} | NO_TOKENIZER


def _blocks(model: GgufModel, side: str, first: int, stop: int) -> list[TensorPart]:
    """One side's layers, numbered from 0, the position biases in the first."""
    biases = model.parts[f"{side}.blk.0.attn_rel_b.weight"]
    blocks = [renamed(biases, f"{side}.blk.0.attn_rel_b.weight")]
    for name, part in model.parts.items():
        if name.startswith(f"{side}.blk.") and name != biases.name:
            _, _, layer, rest = name.split(".", 3)
            if first <= int(layer) < stop:
                blocks.append(renamed(part, f"{side}.blk.{int(layer) - first}.{rest}"))
    return blocks


def _idle_layer(model: GgufModel, layer: int) -> list[TensorPart]:
    """One of the encoder's layers that compute nothing; the first needs a table of position biases."""
    heads = model.fact("attention.head_count")
    parts = idle_encoder_layer(
        layer,
        model.fact("embedding_length"),
        heads * model.fact("attention.key_length"),
        model.fact("feed_forward_length"),
    )
    buckets = model.fact("attention.relative_buckets_count")
    return [zero_part("enc.blk.0.attn_rel_b.weight", buckets, heads), *parts] if layer == 0 else parts


def _dummy_table(model: GgufModel) -> TensorPart:
    return zero_part(_EMBEDDING, DUMMY_VOCABULARY, model.fact("embedding_length"))
