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
_SETTLING = 4  # single rows before the one that is timed
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
    widths = widths or (WIDTHS if engine.encoder is None else WIDE)
    length = min(engine.max_context_length, _prefix(engine) + max(widths) + 1)
    with Session(engine, length) as session:
        sampler = CurveSampler(session, widths)
        began = time.perf_counter()
        sampler.sweep(timed=False)
        once = time.perf_counter() - began
        for _ in range(int(np.clip(budget_seconds / max(once, 1e-6), _MIN_REPEATS, _MAX_REPEATS))):
            sampler.sweep()
        return sampler.curve()


class CurveSampler:
    """Collects samples of a curve on a session that others use in between; it replaces what the session holds.

    Args:
        session: of the engine to measure.
        widths: rows per batch, ascending; those that fit the session are taken. None: see `measure`.
    """

    def __init__(self, session: Session, widths: Sequence[int] | None = None) -> None:
        engine = session.engine
        chosen, room = widths or (WIDTHS if engine.encoder is None else WIDE), session.context_length
        self._session = session
        self._prefix = min(_prefix(engine), max(room - max(chosen), room // 2))
        most = min(session.max_width, room - self._prefix)
        self.widths = tuple(width for width in chosen if width <= most)
        self._context = [index % engine.vocab_size for index in range(self._prefix)]
        self._samples: list[list[list[float]]] = []

    def sweep(self, *, timed: bool = True) -> None:
        """Run every width once, and take the times as a sample if asked to."""
        if list(self._session.tokens) != self._context:
            self._settle_in()
        sample = _sweep(self._session, self.widths)
        if timed:
            self._samples.append(sample)

    def curve(self) -> CostCurve:
        """The lower quartiles of the samples, of which there must be one."""
        engine = self._session.engine
        typical = np.quantile(np.array(self._samples), _QUANTILE, axis=0)
        parts = len(engine.exits)
        return CostCurve(
            widths=self.widths,
            segments=tuple(tuple(float(x) for x in typical[part]) for part in range(parts)),
            draft_head=tuple(float(x) for x in typical[parts]) if engine.draft_vocabulary is not None else (),
            threads=getattr(engine, "threads", 1),
            machine=f"{platform.system()} {platform.machine()} {platform.processor() or ''}".strip(),
        )

    def _settle_in(self) -> None:
        """The source and the context behind which rows are measured."""
        session, encoder = self._session, self._session.engine.encoder
        session.rewind(0)
        if encoder is not None:
            length = min(_SOURCE, encoder.max_source_length)
            session.encode([token % session.engine.vocab_size for token in range(length)])
        session.prefill(self._context)


def _prefix(engine: Engine) -> int:
    """Tokens of the context."""
    return min(_PREFIX if engine.encoder is None else _SOURCE, engine.max_context_length // 2)


def _sweep(session: Session, widths: Sequence[int]) -> list[list[float]]:
    """Seconds once over: one list per segment, then one for the draft head, each over the widths."""
    return [list(column) for column in zip(*(_at_width(session, width) for width in widths), strict=True)]


def _at_width(session: Session, width: int) -> list[float]:
    """Seconds of every segment and of the draft head (0 without one) for `width` rows, clean-up included.

    Single rows follow each other in plain decoding: engines that reuse their graph get to do so here too, and what a
    wide batch has driven out of the processor's caches comes back within a few (a small model's single row is half as
    dear again right behind 32 rows). Wider batches change their width from round to round and hang in a tree.
    """
    for _ in range(_SETTLING if width == 1 else 0):
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
