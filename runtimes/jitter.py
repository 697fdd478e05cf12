"""How much the choice of a token depends on the last bits of what is computed.

The same sums in another order differ by about a millionth. Where activations, or K and V, are rounded to few values,
such a difference may flip a rounding and grow by much: two best tokens closer together than this are a near-tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from skipstone.runtimes.engines.base import Engine, SourceCache
from skipstone.runtimes.rows import RowTree

FloatArray = NDArray[np.float32]

_SIZE, _RUNS = 1e-6, 3


def gap_jitter(engine: Engine, tokens: Sequence[int], source: Sequence[int] = ()) -> float:
    """Largest change of the gap between a position's two best tokens when rows entering a segment change by a millionth.

    Args:
        engine: the weights.
        tokens: a text; as much of it is run as one batch takes.
        source: what an encoder-decoder is given first.
    """
    random, last = np.random.default_rng(0), len(engine.exits) - 1

    def logits(shake: np.random.Generator | None) -> FloatArray:
        (found,) = (state for k, state in segment_by_segment(engine, tokens, source, shake) if k == last)
        return found

    plain, worst = logits(None), 0.0
    best = np.argsort(plain, axis=-1)[:, -2:]
    for _ in range(_RUNS):
        gaps = (np.take_along_axis(found, best, -1) for found in (plain, logits(random)))
        before, after = (gap[:, 1] - gap[:, 0] for gap in gaps)
        worst = max(worst, float(np.abs(before - after).max()))
    return worst


def segment_by_segment(
    engine: Engine,
    tokens: Sequence[int],
    source: Sequence[int] = (),
    shake: np.random.Generator | None = None,
) -> Iterator[tuple[int, FloatArray]]:
    """After each segment: its index and the rows' hidden states (after the last one, their logits).

    Args:
        engine: see `gap_jitter`.
        tokens: likewise.
        source: likewise.
        shake: draws what the rows are changed by before each segment; None: they are left alone.
    """
    tree = RowTree()
    cache = engine.open_cache(min(engine.max_context_length, 2 * len(tokens)), tree)
    if source:
        cast("SourceCache", cache).encode(source)
    tokens = tokens[: cache.max_width]
    chain = [tree.add(token, index - 1) for index, token in enumerate(tokens)]
    state = cache.embed(tokens)
    for segment in range(len(engine.exits)):
        if shake is not None:
            scale = _SIZE * np.sqrt((state**2).mean(-1, keepdims=True))
            state = state + scale * shake.standard_normal(state.shape, np.float32)
        state = cache.run(segment, chain, list(state), [True] * len(chain))
        for row in chain:
            tree.progress[row] = segment + 1
        yield segment, state
    cache.close()
