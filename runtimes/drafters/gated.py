"""A text drafter whose tree is cut to the size that pays, which may be none at all."""

from __future__ import annotations

from collections.abc import Sequence

from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.tree import TokenTree

_MEMORY = 0.15  # weight of the newest round
_WORTH = 1.02  # a draft must promise at least this gain over plain decoding


class GatedDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`.

    Args:
        source: drafts deterministically from text, at next to no cost.
    """

    def __init__(self, source: Drafter) -> None:
        self._source = source
        self.name = source.name
        self._overhead = 0.0

    def reset(self, prompt: Sequence[int]) -> None:
        self._source.reset(prompt)

    def propose(self, request: DraftRequest) -> TokenTree:
        tree = self._source.propose(request)
        scores = sorted(tree.scores, reverse=True)
        count, rate = request.costs.best_count(scores, self._overhead, limit=request.limit)
        return tree.best(count if rate * request.costs.plain > _WORTH else 0)

    def clocked(self, predicted: float, seconds: float) -> None:
        """Learn what a round with drafts costs beyond the cost model: drafting, bookkeeping, learning.

        Args:
            predicted: seconds the cost model gave for its verification.
            seconds: what the round took.
        """
        extra = min(max(0.0, seconds - predicted), predicted)
        self._overhead += _MEMORY * (extra - self._overhead)

    def observe(self, observation: Observation) -> None:
        self._source.observe(observation)

    def close(self) -> None:
        self._source.close()
