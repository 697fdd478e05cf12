"""Models to tune: one continued from a checkpoint, or a new one from a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from skipstone.errors import CheckpointError, SkipstoneError
from skipstone.exporters.checkpoint import open_checkpoint, quiet_loading
from skipstone.exporters.tune import objective, seq2seq

_AUTO: dict[str, Any] = {"decoder": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}


def load_model(
    source: str, dtype: torch.dtype, task: str = "decoder"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model and the tokenizer of a checkpoint folder or hub name.

    Raises SkipstoneError when it is missing, unreadable or not a model with early exits to tune by that task.
    """
    from transformers import AutoTokenizer

    folder = open_checkpoint(source).path
    try:
        with quiet_loading():
            model = _AUTO[task].from_pretrained(folder, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{source}: cannot be loaded ({reason})", hint="check the checkpoint's files"
        ) from error
    _check(model, task)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(f"{source}: has no tokenizer.json", hint="convert its tokenizer to a fast one")
    return cast(PreTrainedModel, model), tokenizer


def fresh_model(config: Path, dtype: torch.dtype, task: str = "decoder") -> PreTrainedModel:
    """A newly initialised model with the configuration in a config.json or in a folder that has one.

    Raises SkipstoneError when the file is missing or does not describe a model for that task.
    """
    file = config / "config.json" if config.is_dir() else config
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        model = _AUTO[task].from_config(AutoConfig.for_model(**content), dtype=dtype)
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SkipstoneError(
            f"--from-config {file}: not the configuration of a model ({reason})",
            hint="give a Hugging Face config.json such as samples/recipes/coder.config.json",
        ) from error
    _check(model, task)
    if task == "seq2seq":
        seq2seq.scale_residual_projections(model)
    else:
        objective.scale_residual_projections(model)
    return cast(PreTrainedModel, model)


def decoder_layers(model: PreTrainedModel) -> int:
    """Layers of the stack that has the exits: the decoder's of an encoder-decoder."""
    config: Any = model.config
    return int(config.num_decoder_layers if config.is_encoder_decoder else config.num_hidden_layers)


def _check(model: PreTrainedModel, task: str) -> None:
    if task == "seq2seq":
        seq2seq.check_encoder_decoder(model)
    else:
        objective.check_decoder(model)
