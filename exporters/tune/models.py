"""Models to tune: one continued from a checkpoint, or a new one from a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from skipstone.errors import CheckpointError, SkipstoneError
from skipstone.exporters.checkpoint import open_checkpoint, quiet_loading
from skipstone.exporters.tune.objective import check_decoder, scale_residual_projections


def load_model(source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The decoder and the tokenizer of a checkpoint folder or hub name.

    Raises SkipstoneError when it is missing, unreadable or not a decoder with early exits to tune.
    """
    from transformers import AutoTokenizer

    folder = open_checkpoint(source).path
    try:
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{source}: cannot be loaded ({reason})", hint="check the checkpoint's files"
        ) from error
    check_decoder(model)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(f"{source}: has no tokenizer.json", hint="convert its tokenizer to a fast one")
    return cast(PreTrainedModel, model), tokenizer


def fresh_model(config: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A newly initialised decoder with the configuration in a config.json or in a folder that has one.

    Raises SkipstoneError when the file is missing or does not describe a decoder.
    """
    file = config / "config.json" if config.is_dir() else config
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content), dtype=dtype)  # type: ignore[no-untyped-call]
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SkipstoneError(
            f"--from-config {file}: not the configuration of a model ({reason})",
            hint="give a Hugging Face config.json such as samples/recipes/coder.config.json",
        ) from error
    check_decoder(model)
    scale_residual_projections(model)
    return cast(PreTrainedModel, model)
