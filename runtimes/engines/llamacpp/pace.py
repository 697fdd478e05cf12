"""Threads that stand in each other's way are noticed, and their part is computed by one alone for a while.

llama.cpp's threads wait for each other by spinning. After a pause of a twentieth of a second, the system may wake two of
them on one core; each then spins away the time that the other needs, and a batch of a small part takes thirty times as
long, as do the next ones for a second or more. One thread has nobody to wait for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from skipstone.runtimes.engines.llamacpp.library import library
from skipstone.runtimes.engines.llamacpp.thread import undisturbed

_TIMES = 5  # what is usual: no batch takes so long but for a reason
_SECONDS = 2e-3  # nor so much longer; less is a hiccup that is over already
_FIRST_REST, _LONGEST_REST = 0.1, 3.2


@dataclass(frozen=True)
class Threads:
    """Threads for a single row, and for batches of more."""

    one: int
    more: int

    def of(self, count: int) -> int:
        """For a batch of so many rows."""
        return self.one if count == 1 else self.more


ONE = Threads(1, 1)


class Pace:
    """What batches of a part usually take, and whether its threads rest.

    Args:
        clock: seconds that pass.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._usual: dict[int, float] = {}
        self._until = self._rest = 0.0

    @property
    def rests(self) -> bool:
        """Whether one thread shall compute alone."""
        return self._rest > 0 and self.clock() < self._until

    def took(self, count: int, seconds: float, threads: int) -> None:
        """A batch of `count` rows took so long with so many threads."""
        usual = self._expected(count)
        self._usual[count] = min(seconds, self._usual.get(count, seconds))
        if threads == 1 or usual is None or seconds < max(_TIMES * usual, usual + _SECONDS):
            return
        now = self.clock()
        again = now - self._until < self._rest  # it did not last: the cause is still there
        self._rest = min(2 * self._rest, _LONGEST_REST) if again else _FIRST_REST
        self._until = now + self._rest

    def _expected(self, count: int) -> float | None:
        """Seconds of so many rows: the least seen, or as much as all of them one by one; None: nothing was seen yet."""
        if count in self._usual:
            return self._usual[count]
        fewer = [seconds * count / width for width, seconds in self._usual.items() if width < count]
        more = [seconds for width, seconds in self._usual.items() if width > count]
        return min(fewer + more, default=None)


class Paced:
    """A context whose threads rest with its part's.

    Args:
        context: of llama.cpp.
        threads: to begin with, as the context was made.
        pace: of its part.
    """

    def __init__(self, context: Any, threads: Threads, pace: Pace) -> None:
        self._context, self._wanted, self._present, self._pace = context, threads, threads, pace

    def set_threads(self, threads: Threads) -> None:
        """Compute with so many from now on, but for rests."""
        self._wanted = threads
        self._use(threads)

    def run(self, count: int, call: Callable[[], int]) -> int:
        """The status of `call`, which computes so many rows."""
        pace = self._pace
        self._use(ONE if pace.rests else self._wanted)
        began = pace.clock()
        status = undisturbed(call)
        pace.took(count, pace.clock() - began, self._present.of(count))
        return status

    def _use(self, threads: Threads) -> None:
        if threads != self._present:
            library().llama.llama_set_n_threads(self._context, threads.one, threads.more)
            self._present = threads
