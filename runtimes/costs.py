"""Seconds per batch as a function of its width, from a measured cost curve.

Speed-up = expected tokens per round / (draft cost + verify cost at that width): every decision about exits, draft
lengths and tree sizes is taken on these figures (hardware-aware trees: PPD, arXiv 2405.18628, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from skipstone.bundle import CostCurve


class CostModel:
    """Interpolated cost of running rows through segments.

    Args:
        curve: measured seconds per segment and width.
        exits: layer counts at the segments' ends, ascending.
    """

    def __init__(self, curve: CostCurve, exits: Sequence[int]) -> None:
        self.widest = max(curve.widths)
        grid = np.arange(self.widest + 1)
        segments = np.array([np.interp(grid, curve.widths, seconds) for seconds in curve.segments])
        head = np.interp(grid, curve.widths, curve.draft_head) if curve.draft_head else np.zeros(len(grid))
        segments[:, 0] = head[0] = 0.0
        # plain lists: looked up many times a round
        sums = np.concatenate([np.zeros((1, len(grid))), np.cumsum(segments, axis=0)])
        self._up_to: dict[int, list[float]] = dict(zip((0, *exits), sums.tolist(), strict=True))
        self._head: list[float] = head.tolist()
        self.last_exit = exits[-1]
        self._spans: dict[tuple[int, int], list[float]] = {}

    def run(self, start: int, stop: int, width: int) -> float:
        """Seconds for `width` rows from layer `start` to layer `stop` (exits, or 0); past the grid it grows linearly."""
        measured = min(width, self.widest)
        seconds = self._up_to[stop][measured] - self._up_to[start][measured]
        return seconds * max(1.0, width / self.widest)

    def _between(self, start: int, stop: int, most: int) -> list[float]:
        """`run` for every width up to `most`; the index is the width."""
        known = self._spans.get((start, stop))
        if known is None or len(known) <= most:
            known = [self.run(start, stop, width) for width in range(max(most, self.widest) + 1)]
            self._spans[start, stop] = known
        return known

    def draft(self, start: int, exit: int, width: int) -> float:
        """Seconds to bring `width` rows from `start` to an inner exit and through the draft head."""
        head = 0.0 if exit == self.last_exit else self._head[min(width, self.widest)]
        return self.run(start, exit, width) + head

    @property
    def plain(self) -> float:
        """Seconds per token of plain decoding."""
        return self.run(0, self.last_exit, 1)

    @cached_property
    def least_score(self) -> float:
        """Drafts less likely than this never pay: half the price of a row where rows are cheapest, in plain tokens."""
        one, *more = self._up_to[self.last_exit][1:]
        chords = [(seconds - one) / extra for extra, seconds in enumerate(more, 1)]
        return max(0.0, 0.5 * min(chords, default=one) / one)

    def best_count(
        self,
        scores: Sequence[float],
        spent: float,
        *,
        start: int = 0,
        limit: int,
        behind: Sequence[bool] = (),
        ceiling: float = math.inf,
    ) -> tuple[int, float]:
        """How many drafts to verify, and the expected tokens per second then.

        Args:
            scores: acceptance probabilities of the drafts, descending.
            spent: seconds spent on drafting them.
            start: exit the drafts and the root stand at.
            limit: most drafts to verify.
            behind: for each draft, whether it has not been run to `start` yet; none given: all stand there.
            ceiling: most seconds that drafting and verifying may take.
        """
        best, expected, waiting = 0, 1.0, 0
        most = min(limit, len(scores)) + 1
        verify = self._between(start, self.last_exit, most)
        catch_up = self._between(0, start, most) if behind else ()
        rate = 1.0 / (spent + verify[1])
        for count, score in enumerate(scores[:limit], 1):
            expected += score
            seconds = spent + verify[count + 1]
            if behind and behind[count - 1]:
                waiting += 1
            if waiting:
                seconds += catch_up[waiting]
            if seconds > ceiling:
                break
            if expected > rate * seconds:
                best, rate = count, expected / seconds
        return best, rate
