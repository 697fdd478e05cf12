"""Tiny random checkpoints of the T5 family, the same to the last bit wherever they are made."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, processors
from transformers import T5Config, T5ForConditionalGeneration

from tests.exporters.tiny import VOCAB_SIZE, make_tokenizer

EOS, PAD = 0, 1  # the tokenizer's special tokens; a text begins with the padding token, as T5's does


@dataclass(frozen=True)
class T5Case:
    """One checkpoint: its configuration beside the common one, size of its layers' weights."""

    config: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0


_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
T5_CASES = {
    "t5": T5Case(),
    "flan-t5": T5Case(_GATED),
    # CodeT5's tokens: a text begins with padding, a source with one of its own.
    "codet5": T5Case({"bos_token_id": 2, "d_kv": 32, "num_heads": 2}),
    "deep-decoder": T5Case({"num_layers": 2, "num_decoder_layers": 5}),
    "gentle": T5Case(scale=0.4),
}


def make_t5(folder: Path, case: T5Case, seed: int = 0) -> Path:
    """Write a checkpoint whose logits have clear preferences; every table of position biases differs."""
    config = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 4,
        "num_decoder_layers": 3,
        "num_heads": 6,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": PAD,
        **case.config,
    }
    model = T5ForConditionalGeneration(T5Config(**config))
    if not config["tie_word_embeddings"]:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(config["vocab_size"], config["d_model"]))
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.from_numpy(random.standard_normal(tuple(parameter.shape), np.float32))
            if "layer_norm" in name:
                parameter.copy_(1.0 + 0.1 * values)
            elif "relative" in name or "shared" in name:
                parameter.copy_(values)
            elif "lm_head" in name:
                parameter.copy_(values * 2 / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(values * case.scale / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    make_source_tokenizer(config.get("bos_token_id")).save(str(folder / "tokenizer.json"))
    specials = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **specials}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def make_source_tokenizer(bos: int | None = None) -> Tokenizer:
    """A tokenizer that ends every source, and begins it with `bos` where there is one."""
    tokenizer = make_tokenizer("gpt-2")
    specials = [("<|endoftext|>", EOS)]
    begin = ""
    if bos is not None:
        token = tokenizer.id_to_token(bos)
        specials.append((token, bos))
        begin = f"{token} "
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin}$A <|endoftext|>", special_tokens=specials
    )
    return tokenizer
