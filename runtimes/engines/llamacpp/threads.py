"""How many threads a part is run with, by measurement.

A part of a small model is computed in less time than a second thread takes to join in, and two threads of one core share
its matrix unit: there, one thread is faster than all. What is large is bound by its arithmetic or by memory, and keeps
all of them.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from skipstone.runtimes.engines.llamacpp.cross import CrossLane
from skipstone.runtimes.engines.llamacpp.encoder import EncoderLane
from skipstone.runtimes.engines.llamacpp.lane import Lane, LaneOptions, Part
from skipstone.runtimes.engines.llamacpp.pace import Threads

_LARGEST_BYTES = 64_000_000
_CONTEXT, _WIDTH, _REPEATS = 32, 8, 7
_GAIN = 0.9  # of the seconds of one thread: all of them must save a tenth


def choose_threads(part: Part, output: str, options: LaneOptions, lane_class: type[Lane] = Lane) -> Threads:
    """The faster of one thread and all of them, for single rows and for batches of eight; a tenth of a second.

    Args:
        part: its weights.
        output: how rows leave it.
        options: `threads` is all of them.
        lane_class: `CrossLane` for a part of an encoder-decoder.
    """
    if _keeps_all(part, options):
        return Threads(options.threads, options.threads)
    choices = (1, options.threads)
    lane = lane_class(part, output, 2 * options.max_width, options)
    try:
        if isinstance(lane, CrossLane):
            lane.take_in_anything(min(_CONTEXT, options.source_length))
        seconds = [
            [[_seconds(lane, width, count) for count in choices] for width in (1, _WIDTH)]
            for _ in range(_REPEATS)
        ]
    finally:
        lane.close()
    one, eight = np.median(seconds, axis=0)
    return Threads(_choice(one, options), _choice(eight, options))


def choose_encoder_threads(part: Part, options: LaneOptions) -> Threads:
    """The same for a segment of an encoder, which computes a source's rows at once."""
    if _keeps_all(part, options):
        return Threads(options.threads, options.threads)
    choices = (1, options.threads)
    lane = EncoderLane(part, options)
    rows = np.ones((min(_CONTEXT, options.source_length), part.hidden_size), np.float32)
    seconds = np.empty((_REPEATS, len(choices)))
    try:
        for repeat in range(_REPEATS):
            for index, count in enumerate(choices):
                lane.set_threads(Threads(count, count))
                began = time.perf_counter()
                lane.run(rows)
                seconds[repeat, index] = time.perf_counter() - began
    finally:
        lane.close()
    fastest = _choice(np.median(seconds, axis=0), options)
    return Threads(fastest, fastest)


def _choice(seconds: NDArray[np.float64], options: LaneOptions) -> int:
    """One thread or all of them, which took these two times. One has nobody to wait for, and is given the doubt."""
    alone, together = seconds
    return options.threads if together < _GAIN * alone else 1


def _keeps_all(part: Part, options: LaneOptions) -> bool:
    return options.threads == 1 or part.path.stat().st_size > _LARGEST_BYTES


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
