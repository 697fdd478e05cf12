"""Tiny random T5s whose logits have clear preferences, the same wherever they are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import T5Config, T5ForConditionalGeneration

VOCAB = 96
PAD, EOS, START = 0, 1, 0


def tiny_t5(seed: int = 0, *, gated: bool = False, tied: bool = True, sharpness: float = 4.0) -> Any:
    """Four encoder and three decoder layers; heads of another width than d_model / num_heads."""
    config = T5Config(
        vocab_size=VOCAB,
        d_model=48,
        d_kv=16,
        d_ff=96,
        num_layers=4,
        num_decoder_layers=3,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=24,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=tied,
        decoder_start_token_id=START,
        pad_token_id=PAD,
        eos_token_id=EOS,
        attn_implementation="eager",
    )
    model = T5ForConditionalGeneration(config).eval()
    if not tied:  # transformers shares the table whatever the configuration says
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, config.d_model))
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.from_numpy(random.standard_normal(tuple(parameter.shape), np.float32))
            if "layer_norm" in name:
                parameter.copy_(1.0 + 0.1 * values)
            elif "relative" in name or "shared" in name:
                parameter.copy_(values)
            else:
                parameter.copy_(values / parameter.shape[-1] ** 0.5)
        model.decoder.final_layer_norm.weight.mul_(sharpness)
    return model


def whole(model: Any, source: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits [n, vocabulary] of transformers' own forward pass."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([list(source)]), decoder_input_ids=torch.tensor([list(tokens)]))
    return np.array(out.logits[0].numpy())
