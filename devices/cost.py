"""Measuring the cost curve of an opened engine: seconds per segment and width.

    >>> curve = measure(engine)
    >>> curve.segments[0]        # seconds of segment 0 at each of curve.widths

The figures are lower quartiles of interleaved runs, taken on the machine and at the thread count the engine runs with.
Of an encoder-decoder it is the decoder's curve, behind a source of a sentence's length.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence

import numpy as np

from skipstone.bundle import CostCurve
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.session import Session

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
WIDE = (*WIDTHS, 40, 48, 64)  # an encoder-decoder's source is drafted from as a whole
_PREFIX, _SOURCE = 64, 32
_MIN_REPEATS, _MAX_REPEATS = 3, 25
_QUANTILE = 0.25  # interruptions only ever make a call slower


def measure(
    engine: Engine, widths: Sequence[int] | None = None, *, budget_seconds: float = 10.0
) -> CostCurve:
    """Measure every segment and the draft head at every width.

    A decoder is measured after a context of 64 tokens; an encoder-decoder behind a source of 32 tokens and after as many
    of its own.

    Args:
        engine: weights; a cache of its own is opened and closed.
        widths: rows per batch, ascending; None: up to 32, an encoder-decoder's up to 64.
        budget_seconds: about how long it may take; every point is measured at least three times.
    """
    encoder = engine.encoder
    widths = widths or (WIDTHS if encoder is None else WIDE)
    prefix = min(_PREFIX if encoder is None else _SOURCE, engine.max_context_length // 2)
    with Session(engine, min(engine.max_context_length, prefix + max(widths) + 1)) as session:
        fitting = [
            width for width in widths if width <= min(session.max_width, session.context_length - prefix)
        ]
        if encoder is not None:
            session.encode(
                [token % engine.vocab_size for token in range(min(_SOURCE, encoder.max_source_length))]
            )
        session.prefill([index % engine.vocab_size for index in range(prefix)])
        began = time.perf_counter()
        _sweep(session, fitting)
        once = time.perf_counter() - began
        repeats = int(np.clip(budget_seconds / max(once, 1e-6), _MIN_REPEATS, _MAX_REPEATS))
        samples = [_sweep(session, fitting) for _ in range(repeats)]
    typical = np.quantile(np.array(samples), _QUANTILE, axis=0)
    parts = len(engine.exits)
    return CostCurve(
        widths=tuple(fitting),
        segments=tuple(tuple(float(x) for x in typical[part]) for part in range(parts)),
        draft_head=tuple(float(x) for x in typical[parts]) if engine.draft_vocabulary is not None else (),
        threads=getattr(engine, "threads", 1),
        machine=f"{platform.system()} {platform.machine()} {platform.processor() or ''}".strip(),
    )


def _sweep(session: Session, widths: Sequence[int]) -> list[list[float]]:
    """Seconds once over: one list per segment, then one for the draft head, each over the widths."""
    return [list(column) for column in zip(*(_at_width(session, width) for width in widths), strict=True)]


def _at_width(session: Session, width: int) -> list[float]:
    """Seconds of every segment and of the draft head (0 without one) for `width` rows, clean-up included.

    Single rows follow each other in plain decoding, so engines that reuse their graph get to do so here too; wider
    batches change their width from round to round and hang in a tree.
    """
    if width == 1:
        _once(session, 1)
    return _once(session, width)


def _once(session: Session, width: int) -> list[float]:
    vocab = session.engine.vocab_size
    parents = [ROOT if row == 0 else (row - 2 if row % 3 == 0 else row - 1) for row in range(width)]
    rows: list[int] = []
    for index, parent in enumerate(parents):
        rows += session.push([(7 * index + 3) % vocab], [ROOT if parent == ROOT else rows[parent]])
    seconds, head = [], 0.0
    for exit_layer in session.exits[:-1]:
        began = time.perf_counter()
        session.run(rows, exit_layer)
        seconds.append(time.perf_counter() - began)
        if exit_layer == session.exits[0] and session.engine.draft_vocabulary is not None:
            began = time.perf_counter()
            session.advance(rows, exit_layer)
            head = time.perf_counter() - began
    began = time.perf_counter()
    session.advance(rows, session.exits[-1])
    session.discard()
    seconds.append(time.perf_counter() - began)
    return [*seconds, head]
