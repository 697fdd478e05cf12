"""A clock that no busy machine moves."""

from __future__ import annotations


class EvenTime:
    """Stands where `time` stands: every round takes as long as any other, on however busy a machine."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def perf_counter(self) -> float:
        self.now += self.step
        return self.now
