"""Which tokens the draft head knows: the most frequent ones, so that drafting pays for few rows of the LM
head.

Verification always uses the full vocabulary, so a token left out costs a rejected draft and never a wrong
output. The idea is that of FR-Spec (arXiv 2502.14856, section 4).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import CheckpointError, UsageError

FREQUENCIES_FILE = "token_frequencies.json"
_ROW_MULTIPLE = 32
_MIN_ROWS = 1024


def default_size(vocab_size: int) -> int:
    """A quarter of the vocabulary, at least 1,024, rounded up to a multiple of 32."""
    wanted = max(_MIN_ROWS, vocab_size // 4)
    return min(vocab_size, -(-wanted // _ROW_MULTIPLE) * _ROW_MULTIPLE)


def choose_tokens(
    vocab_size: int, size: int | None, frequencies: Mapping[int, int] | None, always: Iterable[int]
) -> NDArray[np.int32]:
    """Token ids of the draft head's rows, ascending.

    Args:
        vocab_size: rows of the full head.
        size: rows wanted; None: `default_size`; 0: all.
        frequencies: token id → count; None: ids in order, as byte-pair merges are numbered by frequency.
        always: ids that are never left out (end of text).

    Raises:
        UsageError: a size that is negative or past the vocabulary.
    """
    if size is not None and not 0 <= size <= vocab_size:
        raise UsageError(
            f"--draft-vocab-size {size}: expected 0 (all) to {vocab_size}, the size of the vocabulary"
        )
    rows = default_size(vocab_size) if size is None else (size or vocab_size)
    counts = frequencies or {}
    ranked = sorted(range(vocab_size), key=lambda token: (-counts.get(token, 0), token))
    kept = dict.fromkeys(token for token in always if 0 <= token < vocab_size)
    chosen = [*kept, *(token for token in ranked if token not in kept)][:rows]
    return np.sort(np.array(chosen, dtype=np.int32))


def count_tokens(tokens: Iterable[int]) -> Counter[int]:
    """How often every token occurs in a text, given as token ids."""
    return Counter(tokens)


def read_frequencies(file: Path) -> dict[int, int]:
    """Counts saved beside a checkpoint: a JSON list (index: token id) or an object {token id: count}.

    Raises:
        CheckpointError: neither of the two.
    """
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        pairs = enumerate(content) if isinstance(content, list) else content.items()
        return {int(token): int(count) for token, count in pairs}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: a JSON list of counts or an object from token id to count was expected: {error}",
            hint="remove the file or pass --draft-text",
        ) from error
