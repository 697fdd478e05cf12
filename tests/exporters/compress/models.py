"""Models in memory, as a run would hand them to its steps, and what they compute."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipstone.exporters.checkpoint import load_eager, open_checkpoint
from skipstone.exporters.compress.steps import Target
from skipstone.exporters.compress.work import Windows, Work
from skipstone.exporters.facts import load_tokenizer

_TOKENS = torch.arange(4, 92, 2)
_SOURCE = torch.arange(50, 80)


def windows(*, encodes: bool = False) -> Windows:
    """Two windows of token ids."""
    parts = (_TOKENS, (_TOKENS * 7 + 3) % 300)
    return Windows(parts, (_SOURCE, _SOURCE + 100) if encodes else None, "0" * 64)


def open_work(folder: Path, **given: Any) -> tuple[Any, Work]:
    """A checkpoint's model and what a run's steps share, with a calibration text."""
    checkpoint = open_checkpoint(folder)
    text = windows(encodes=checkpoint.is_encoder_decoder)
    return load_eager(folder), Work(folder, Target(), load_tokenizer(checkpoint), text, **given)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits [n, vocab_size] over the first window."""
    inputs = next(windows(encodes=model.config.is_encoder_decoder).inputs())
    found: Tensor = model(**inputs).logits[0]
    return found
