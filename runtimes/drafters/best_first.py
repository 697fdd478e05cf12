"""The tree of a Markov model's most probable paths, grown best first: what every counted drafter does."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import TypeVar

from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.tree import TokenTree

State = TypeVar("State")


def most_probable_paths(
    start: State,
    successors: Callable[[State], Iterable[tuple[int, float]]],
    follow: Callable[[State, int], State],
    *,
    limit: int,
    floor: float,
) -> TokenTree:
    """Grow the tree.

    Args:
        start: what the model knows at the root.
        successors: from a state to tokens and their probabilities, likeliest first.
        follow: the state after a token.
        limit: most nodes.
        floor: paths less probable are left out.
    """
    tree = TokenTree()
    heap: list[tuple[float, int, int, int, State]] = []
    order = 0
    node, state, score = ROOT, start, 1.0
    while True:
        for token, probability in successors(state):
            expected = score * probability
            if expected < floor:
                break
            order += 1  # among equals the older goes first
            heapq.heappush(heap, (-expected, order, node, token, state))
        if not heap or len(tree) >= limit:
            return tree
        negative, _, parent, token, before = heapq.heappop(heap)
        score = -negative
        node, state = tree.add(token, parent, score), follow(before, token)
