"""Ranges of all values in a model's graphs, found by running text through them in float32.

The text is the user's (`--calibration`) or, without one, what the model itself writes when it samples: that follows the
distribution it was trained on, and needs no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from tokenizers import Tokenizer

from skipstone.bundle import ModelFacts
from skipstone.errors import UsageError
from skipstone.exporters.facts import read_text
from skipstone.exporters.formats.onnx.graphs import fixed
from skipstone.exporters.formats.onnx.norms import fuse_norms
from skipstone.exporters.formats.onnx.qdq import Range, share_ranges
from skipstone.exporters.formats.onnx.walk import Walk

NUM_TOKENS = 512
_LEAST = 64
_ROWS = 16
_SEED = 0

Table = NDArray[np.floating[Any]]


def read_tokens(file: Path, tokenizer: Tokenizer) -> list[int]:
    """The first tokens of the user's text.

    Raises:
        UsageError: it cannot be read, or is too short.
    """
    tokens = tokenizer.encode(read_text(file, "--calibration"), add_special_tokens=False).ids
    if len(tokens) < _LEAST:
        raise UsageError(f"--calibration {file}: {len(tokens)} tokens, at least {_LEAST} are needed")
    return list(tokens[:NUM_TOKENS])


def write_tokens(graphs: Mapping[str, ir.Model], table: Table, facts: ModelFacts, slots: int) -> list[int]:
    """What the model writes: contexts of `slots` tokens, sampled at temperature 1, the same ones every time.

    Args:
        graphs: as traced.
        table: embeddings.
        facts: of the model.
        slots: of a context.
    """
    random = np.random.default_rng(_SEED)
    walk = Walk({part: _fused(graph, 1, slots) for part, graph in graphs.items()}, table, 1, slots)
    tokens: list[int] = []
    while len(tokens) < NUM_TOKENS:
        walk.begin()
        starts = (facts.bos_token_id, *facts.eos_token_ids)
        token = next((start for start in starts if start is not None), 0)
        for _ in range(slots):
            tokens.append(token)
            logits = walk.logits([token])[0].astype(np.float64)
            weights = np.exp(logits - logits.max())
            token = int(random.choice(len(weights), p=weights / weights.sum()))
    return tokens[:NUM_TOKENS]


def measure_ranges(
    graphs: Mapping[str, ir.Model], table: Table, tokens: Sequence[int], slots: int
) -> dict[str, dict[str, Range]]:
    """By part, the range of every float value, shared as `qdq.share_ranges` says.

    Args:
        graphs: as traced.
        table: embeddings.
        tokens: of the text; every context of `slots` of them begins anew.
        slots: of a context.
    """
    rows = min(_ROWS, slots)
    narrow = {part: _fused(graph, rows, slots) for part, graph in graphs.items()}
    found: dict[str, dict[str, Range]] = {part: {} for part in graphs}

    def observe(part: str, values: Mapping[str, NDArray[Any]]) -> None:
        known = found[part]
        for name, value in values.items():
            if value.dtype == np.float32:
                seen = Range(float(value.min()), float(value.max()))
                known[name] = known.get(name, seen).joined(seen)

    walk = Walk(narrow, table, rows, slots, observe)
    for first in range(0, len(tokens), slots):
        walk.begin()
        context = tokens[first : first + slots]
        for start in range(0, len(context), rows):
            walk.logits(context[start : start + rows])
    return {part: share_ranges(narrow[part], ranges) for part, ranges in found.items()}


def _fused(graph: ir.Model, rows: int, slots: int) -> ir.Model:
    narrow = fixed(graph, rows, slots)
    fuse_norms(narrow)
    return narrow
