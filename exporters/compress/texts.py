"""Calibration and held-out texts as windows of token ids."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from skipstone.bundle import ModelFacts, hash_file
from skipstone.errors import UsageError
from skipstone.exporters.compress.work import Windows
from skipstone.exporters.quality import check_kind, held_out_texts, probes

WINDOW = 512


def read_windows(file: Path, flag: str, tokenizer: Tokenizer, facts: ModelFacts, tokens: int) -> Windows:
    """The first `tokens` tokens of a text, in windows of at most 512 tokens, or what the model takes if that is less.

    Args:
        file: text, or .jsonl of `{"text": …}`; for an encoder-decoder of `{"source": …, "target": …}`.
        flag: that the user named it with.
        tokenizer: the model's.
        facts: of the model.
        tokens: to read at most.

    Raises:
        UsageError: it cannot be read, or is not what this kind of model needs, or holds next to nothing.
    """
    texts = held_out_texts(file, flag)
    check_kind(file, texts, encodes=facts.encoder is not None, flag=flag)
    found = list(probes(tokenizer, texts, facts, min(WINDOW, facts.context_length), tokens))
    if not found:
        raise UsageError(f"{flag} {file}: no two tokens to predict in it", hint="pass a longer text")
    return Windows(
        windows=tuple(torch.tensor(probe.tokens) for probe in found),
        sources=tuple(torch.tensor(probe.source) for probe in found) if facts.encoder is not None else None,
        sha256=hash_file(file),
    )
