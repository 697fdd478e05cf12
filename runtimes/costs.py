"""Seconds per batch as a function of its width, from a measured cost curve.

Speed-up = expected tokens per round / (draft cost + verify cost at that width): every decision about exits, draft
lengths and tree sizes is taken on these figures (hardware-aware trees: PPD, arXiv 2405.18628, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence

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
        self._segments = np.stack([np.interp(grid, curve.widths, seconds) for seconds in curve.segments])
        self._segments[:, 0] = 0.0
        self._head = (
            np.interp(grid, curve.widths, curve.draft_head) if curve.draft_head else np.zeros(len(grid))
        )
        self._head[0] = 0.0
        self._index = {0: 0} | {exit_layer: index + 1 for index, exit_layer in enumerate(exits)}
        self.last_exit = exits[-1]

    def run(self, start: int, stop: int, width: int) -> float:
        """Seconds for `width` rows from layer `start` to layer `stop` (exits, or 0); past the grid it grows linearly."""
        rows = self._segments[self._index[start] : self._index[stop], min(width, self.widest)]
        return float(rows.sum()) * max(1.0, width / self.widest)

    def draft(self, start: int, exit: int, width: int) -> float:
        """Seconds to bring `width` rows from `start` to an inner exit and through the draft head."""
        head = 0.0 if exit == self.last_exit else float(self._head[min(width, self.widest)])
        return self.run(start, exit, width) + head

    @property
    def plain(self) -> float:
        """Seconds per token of plain decoding."""
        return self.run(0, self.last_exit, 1)

    def best_count(
        self,
        scores: Sequence[float],
        spent: float,
        *,
        start: int = 0,
        limit: int,
        behind: Sequence[bool] = (),
    ) -> tuple[int, float]:
        """How many drafts to verify, and the expected tokens per second then.

        Args:
            scores: acceptance probabilities of the drafts, descending.
            spent: seconds spent on drafting them.
            start: exit the drafts and the root stand at.
            limit: most drafts to verify.
            behind: for each draft, whether it has not been run to `start` yet; none given: all stand there.
        """
        best, expected, waiting = 0, 1.0, 0
        rate = 1.0 / (spent + self.run(start, self.last_exit, 1))
        for count, score in enumerate(scores[:limit], 1):
            expected += score
            waiting += bool(behind and behind[count - 1])
            seconds = spent + self.run(start, self.last_exit, count + 1) + self.run(0, start, waiting)
            if expected / seconds > rate:
                best, rate = count, expected / seconds
        return best, rate
