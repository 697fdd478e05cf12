"""Counting a draft table from text: which few tokens follow one, two or three tokens.

>>> table = count_table(token_ids, vocab_size=4096)
>>> table.save(Path("draft-table.npz"))
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skipstone.exporters.draft_vocabulary import FREQUENCIES_FILE
from skipstone.runtimes.drafters.table import ORDERS, NGramTable

DRAFT_TABLE_FILE = "draft-table.npz"
SUCCESSORS = 3
_LEAST_FREQUENCY = 0.1
_SCALE = 255


def count_table(
    tokens: NDArray[np.integer],
    vocab_size: int,
    *,
    max_contexts: int = 40_000,
    document_end: int | None = None,
) -> NGramTable:
    """Count a table.

    Args:
        tokens: token ids of the text, [n].
        vocab_size: of the tokenizer.
        max_contexts: contexts kept per length, those seen most often.
        document_end: token between documents; n-grams across it are not counted.
    """
    ids = np.asarray(tokens, np.int64)
    orders = {}
    for length in ORDERS:
        if len(ids) > length:
            orders[length] = _count_order(ids, length, vocab_size, max_contexts, document_end)
    return NGramTable(vocab_size, orders)


def _count_order(
    ids: NDArray[np.int64], length: int, vocab_size: int, max_contexts: int, document_end: int | None
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint8]]:
    """Keys, successors and frequencies of contexts of one length."""
    count = len(ids) - length
    keys = np.zeros(count, np.int64)
    inside = np.ones(count, bool)
    for offset in range(length):
        keys = keys * vocab_size + ids[offset : offset + count]
        if document_end is not None:
            inside &= ids[offset : offset + count] != document_end
    contexts, inverse, totals = np.unique(keys[inside], return_inverse=True, return_counts=True)
    kept = _most_frequent(totals, max_contexts)
    place = np.full(len(contexts), -1, np.int64)
    place[kept] = np.arange(len(kept))
    where = place[inverse]
    pairs = where[where >= 0] * vocab_size + ids[length:][inside][where >= 0]
    return _best_successors(contexts[kept], totals[kept], pairs, vocab_size)


def _most_frequent(totals: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Indices, ascending, of the contexts seen most often and at least twice."""
    order = np.argsort(-totals, kind="stable")[:limit]
    return np.sort(order[totals[order] >= 2])


def _best_successors(
    contexts: NDArray[np.int64], totals: NDArray[np.int64], pairs: NDArray[np.int64], vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint8]]:
    """The likeliest successors of each context; contexts without a likely one are dropped."""
    found, counts = np.unique(pairs, return_counts=True)
    owner, token = found // vocab_size, found % vocab_size
    order = np.lexsort((-counts, owner))
    owner, token, counts = owner[order], token[order], counts[order]
    first = np.searchsorted(owner, np.arange(len(contexts)))
    rank = np.arange(len(owner)) - first[owner]
    top = rank < SUCCESSORS
    tokens = np.zeros((len(contexts), SUCCESSORS), np.uint32)
    frequencies = np.zeros((len(contexts), SUCCESSORS), np.uint8)
    share = (counts[top] - 0.5) / totals[owner[top]]  # absolute discounting
    tokens[owner[top], rank[top]] = token[top]
    frequencies[owner[top], rank[top]] = np.round(share * _SCALE)
    useful = frequencies[:, 0] >= _LEAST_FREQUENCY * _SCALE
    return contexts[useful], tokens[useful], frequencies[useful]


def write_draft_material(
    tokens: NDArray[np.integer], vocab_size: int, document_end: int | None, folder: Path
) -> None:
    """Record with a checkpoint what exports draft from: the training text's token counts and n-gram table."""
    counts = np.bincount(np.asarray(tokens, np.int64), minlength=vocab_size)
    (folder / FREQUENCIES_FILE).write_text(json.dumps(counts.tolist()) + "\n", encoding="utf-8")
    table = count_table(tokens, vocab_size, document_end=document_end)
    table.save(folder / DRAFT_TABLE_FILE)
