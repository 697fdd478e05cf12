"""The Pareto front: what nothing else beats in one figure without losing in the other."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one dominates, by the first figure, equal points in their order.

    One point dominates another if it is no larger in both figures and smaller in one. Less is better in both.
    """
    front: list[int] = []
    least, at = math.inf, math.nan  # the best second figure so far, and the first figure it was reached at
    for index in sorted(range(len(points)), key=lambda index: (*points[index], index)):
        first, second = points[index]
        if second < least or (second, first) == (least, at):
            front.append(index)
            least, at = second, first
    return front
