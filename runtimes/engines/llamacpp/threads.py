"""How many threads a part is run with, by measurement.

A part of a small model is computed in less time than a second thread takes to join in, and two threads of one core share
its matrix unit: there, one thread is faster than all. What is large is bound by its arithmetic or by memory, and keeps
all of them.
"""

from __future__ import annotations

import time

import numpy as np

from skipstone.runtimes.engines.llamacpp.lane import Lane, LaneOptions, Part, Threads

_LARGEST_BYTES = 64_000_000
_CONTEXT, _WIDTH, _REPEATS = 32, 8, 7


def choose_threads(part: Part, output: str, options: LaneOptions) -> Threads:
    """The faster of one thread and all of them, for single rows and for batches of eight; a tenth of a second.

    Args:
        part: its weights.
        output: how rows leave it.
        options: `threads` is all of them.
    """
    if options.threads == 1 or part.path.stat().st_size > _LARGEST_BYTES:
        return Threads(options.threads, options.threads)
    choices = (1, options.threads)
    lane = Lane(part, output, 2 * options.max_width, options)
    try:
        seconds = [
            [[_seconds(lane, width, count) for count in choices] for width in (1, _WIDTH)]
            for _ in range(_REPEATS)
        ]
    finally:
        lane.close()
    one, eight = np.median(seconds, axis=0)
    return Threads(choices[int(one.argmin())], choices[int(eight.argmin())])


def _seconds(lane: Lane, width: int, count: int) -> float:
    """One batch behind a short context, with so many threads."""
    lane.set_threads(Threads(count, count))
    lane.clear()
    lane.flags[:] = 1
    lane.positions[:] = np.arange(len(lane.positions))
    lane.decode(_CONTEXT)
    lane.positions[:width] += _CONTEXT
    began = time.perf_counter()
    lane.decode(width)
    return time.perf_counter() - began
