"""How many threads a part is run with, by measurement.

A part of a small model is computed in less time than a second thread takes to join in, and two threads of one core share
its matrix unit: there, one thread is faster than all. What is large is bound by its arithmetic or by memory, and keeps
all of them.
"""

from __future__ import annotations

import time
from dataclasses import replace

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
    lanes = [Lane(part, output, 2 * options.max_width, replace(options, threads=count)) for count in choices]
    try:
        seconds = np.array(
            [[_seconds(lane, width) for lane in lanes for width in (1, _WIDTH)] for _ in range(_REPEATS)]
        )
    finally:
        for lane in lanes:
            lane.close()
    one, eight = np.median(seconds, axis=0).reshape(len(choices), 2).T
    return Threads(choices[int(one.argmin())], choices[int(eight.argmin())])


def _seconds(lane: Lane, width: int) -> float:
    """One batch behind a short context."""
    lane.clear()
    lane.flags[:] = 1
    lane.positions[:] = np.arange(len(lane.positions))
    lane.decode(_CONTEXT)
    lane.positions[:width] += _CONTEXT
    began = time.perf_counter()
    lane.decode(width)
    return time.perf_counter() - began
