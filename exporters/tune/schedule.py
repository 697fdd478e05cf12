"""What changes while a run goes on: layer dropout by depth, the exits' turn and weight, the learning rate,
the clock.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from skipstone.exporters.tune.recipe import LayerSkip, Training

CLOCK_FILE = "clock.json"
_LONGEST_STEP = 60.0  # seconds; a longer one that is also far above the mean is a pause of the process
_FAR_ABOVE = 20.0


def dropout_rates(max_dropout: float, num_layers: int) -> tuple[float, ...]:
    """p_l = p_max * (2^(l/(L-1)) - 1) for l = 0 … L-1: the probability to skip layer l (arXiv 2404.16710
    §3.1.1).
    """
    if num_layers == 1:
        return (0.0,)
    return tuple(max_dropout * (2 ** (layer / (num_layers - 1)) - 1) for layer in range(num_layers))


@dataclass(frozen=True)
class ExitTurn:
    """The exits that have a loss in one step, the weight of their losses together and the distilled share."""

    exits: tuple[int, ...]
    weight: float
    distil: float


def exit_turn(
    layerskip: LayerSkip, rotation: tuple[tuple[int, ...], ...], step: int, progress: float
) -> ExitTurn:
    """The turn of step `step` (from 0) in a run that is `progress` (0 … 1) done."""
    ramp = 1.0 if layerskip.ramp == 0 else min(1.0, progress / layerskip.ramp)
    scale = layerskip.start + (1 - layerskip.start) * ramp
    return ExitTurn(rotation[step % len(rotation)], layerskip.exit_weight * scale, layerskip.distil * scale)


def learning_rate_factor(training: Training, step: int, progress: float) -> float:
    """Factor on the peak learning rate: linear warm-up by steps, then a cosine of progress down to
    `final_rate`.
    """
    warmup = min(1.0, (step + 1) / training.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return warmup * (training.final_rate + (1 - training.final_rate) * cosine)


class Clock:
    """How far a run limited by time, by steps, or by both has come; the furthest limit counts.

    Time is that spent training: it is saved with each checkpoint (`save`) and taken up again (`resume`), and a step
    during which the process was stopped counts as a mean one.
    """

    def __init__(
        self, *, max_minutes: float | None, max_steps: int | None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_minutes = max_minutes
        self.max_steps = max_steps
        self._now = now
        self._before = 0.0
        self._started: float | None = None
        self._paused = 0.0
        self._steps = 0
        self._stepped = 0.0

    def start(self) -> None:
        """Begin to count; time before this call, such as compiling or tokenising, is free."""
        self._started = self._stepped = self._now()

    def step(self) -> None:
        """A step has ended; the time since the one before does not count where the process was stopped meanwhile."""
        now = self._now()
        took, self._stepped = now - self._stepped, now
        if self._steps and self._started is not None:
            mean = (now - took - self._started - self._paused) / self._steps
            if took > max(_LONGEST_STEP, _FAR_ABOVE * mean):
                self._paused += took - mean
        self._steps += 1

    @property
    def minutes(self) -> float:
        """Minutes spent training, earlier runs of the same training included."""
        running = 0.0 if self._started is None else (self._now() - self._started - self._paused) / 60
        return self._before + running

    def progress(self, step: int) -> float:
        """The part of the run that is done after `step` steps, from 0 to 1."""
        by_time = self.minutes / self.max_minutes if self.max_minutes else 0.0
        by_step = step / self.max_steps if self.max_steps else 0.0
        return min(1.0, max(by_time, by_step))

    def save(self, folder: Path) -> None:
        """Write the minutes spent to `folder`."""
        (folder / CLOCK_FILE).write_text(json.dumps({"minutes": self.minutes}))

    def resume(self, folder: Path) -> None:
        """Go on from the minutes that `save` wrote to `folder`."""
        self._before = float(json.loads((folder / CLOCK_FILE).read_text())["minutes"])
