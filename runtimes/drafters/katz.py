"""A trigram model with Katz back-off, counted from the context and everything generated.

P(w | u v) = (c(u v w) − d) / c(u v) where the trigram was seen, else α(u v) · P(w | v), and so on down to single
tokens; the mass freed by the discount d goes to the unseen (Katz 1987, with absolute discounting). The draft is the
tree of the most probable paths, grown best first.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

from skipstone.runtimes.drafters.base import DraftRequest, Observation
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.tree import TokenTree

_DISCOUNT = 0.5
_BRANCHES = 4
_FLOOR = 0.05


class KatzDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`."""

    name = "katz"

    def __init__(self) -> None:
        self.reset(())

    def reset(self, prompt: Sequence[int]) -> None:
        self._text: list[int] = []
        self._counts: dict[tuple[int, ...], Counter[int]] = {}
        self._extend(prompt)

    def propose(self, request: DraftRequest) -> TokenTree:
        tree = TokenTree()
        heap: list[tuple[float, int, int, tuple[int, ...]]] = []
        order = 0

        def spread(node: int, history: tuple[int, ...], score: float) -> None:
            nonlocal order
            for token, p in self.successors(history)[:_BRANCHES]:
                if score * p >= _FLOOR:
                    order += 1
                    heapq.heappush(heap, (-score * p, order, node, (*history[-1:], token)))

        spread(ROOT, tuple(request.context[-2:]), 1.0)
        while heap and len(tree) < request.limit:
            negative, _, parent, history = heapq.heappop(heap)
            node = tree.add(history[-1], parent, -negative)
            spread(node, history, -negative)
        return tree

    def observe(self, observation: Observation) -> None:
        self._extend(observation.context[len(self._text) :])

    def close(self) -> None:
        return None

    def successors(self, history: tuple[int, ...]) -> list[tuple[int, float]]:
        """Tokens seen after the history or a shorter one, most probable first, with their back-off probabilities."""
        found: dict[int, float] = {}
        free = 1.0
        for start in range(len(history) + 1):
            counts = self._counts.get(history[start:])
            if not counts:
                continue
            total = counts.total()
            for token, count in counts.most_common(_BRANCHES):
                found.setdefault(token, free * (count - _DISCOUNT) / total)
            free *= _DISCOUNT * len(counts) / total
            if len(found) >= _BRANCHES:
                break
        return sorted(found.items(), key=lambda item: -item[1])

    def _extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for n in range(min(2, len(self._text)) + 1):
                history = tuple(self._text[len(self._text) - n :])
                self._counts.setdefault(history, Counter())[token] += 1
            self._text.append(token)
