"""Reads a checkpoint's shape, and refuses what compression cannot take."""

from __future__ import annotations

import os

from skipstone.bundle import ModelFacts
from skipstone.errors import CheckpointError, UsageError
from skipstone.exporters.checkpoint import FACTORS_FILE, Checkpoint, open_checkpoint
from skipstone.exporters.compress.folder import read_codes
from skipstone.exporters.compress.steps import Shape
from skipstone.exporters.facts import (
    DEFAULT_LENGTH,
    checkpoint_facts,
    encoder_facts,
    load_tokenizer,
    num_weights,
)

_DECODERS = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)


def open_source(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint to compress: a folder or a hub name.

    Raises:
        UsageError: a .gguf file.
        CheckpointError: as `open_checkpoint`, or an architecture whose parts are not known.
    """
    if os.fspath(source).endswith(".gguf"):
        raise UsageError(
            f"{source}: compression starts from a checkpoint", hint="pass the Hugging Face folder or hub name"
        )
    checkpoint = open_checkpoint(source)
    if checkpoint.architecture not in _DECODERS and not checkpoint.is_encoder_decoder:
        raise CheckpointError(
            f"{checkpoint.path}/config.json: {checkpoint.architecture} cannot be compressed",
            hint=f"one of {', '.join(_DECODERS)}, T5ForConditionalGeneration",
        )
    return checkpoint


def shape_of(checkpoint: Checkpoint) -> Shape:
    """The shape of a checkpoint's model.

    Raises:
        CheckpointError: it has codes that cannot be read.
    """
    config = checkpoint.config
    codes = read_codes(checkpoint.path)
    quantized = None if codes is None else codes.scheme
    factored = (checkpoint.path / FACTORS_FILE).is_file()
    if checkpoint.is_encoder_decoder:
        return Shape(
            architecture=checkpoint.architecture,
            layers=config.num_decoder_layers,
            encoder_layers=config.num_layers,
            hidden_size=config.d_model,
            heads=config.num_heads,
            key_value_heads=config.num_heads,
            head_size=config.d_kv,
            ffn_size=config.d_ff,
            quantized=quantized,
            factored=factored,
        )
    heads = config.num_attention_heads
    patterned = getattr(config, "no_rope_layers", None) is not None
    return Shape(
        architecture=checkpoint.architecture,
        layers=config.num_hidden_layers,
        encoder_layers=0,
        hidden_size=config.hidden_size,
        heads=heads,
        key_value_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn_size=config.intermediate_size,
        period=config.no_rope_layer_interval if patterned else 1,
        quantized=quantized,
        factored=factored,
    )


def facts_of(checkpoint: Checkpoint) -> ModelFacts:
    """What texts for a checkpoint's model are read by."""
    encoder = encoder_facts(checkpoint, None, None)
    length = DEFAULT_LENGTH if encoder is not None else checkpoint.config.max_position_embeddings
    tokenizer = load_tokenizer(checkpoint)
    return checkpoint_facts(checkpoint, tokenizer, length, num_weights(checkpoint), encoder)
