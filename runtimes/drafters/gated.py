"""A text drafter whose tree is cut to the size that pays, which may be none at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.tree import TokenTree

_MEMORY = 0.15  # weight of the newest round's overhead
_FADING = 0.95  # of what earlier rounds showed of the scores
_PRIOR = 4.0  # drafts taken to have kept their promise before any was verified
_WORTH = 1.1  # a draft must promise at least this gain over plain decoding


class GatedDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`. Learns how far its source's scores hold, and what a round costs.

    Args:
        source: drafts deterministically from text, at next to no cost.
    """

    def __init__(self, source: Drafter) -> None:
        self._source = source
        self.name = source.name
        self.overhead = 0.0
        self._promised = self._accepted = _PRIOR
        self._promise = 0.0

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        self._source.reset(prompt, source)

    def propose(self, request: DraftRequest) -> TokenTree:
        costs, self._promise = request.costs, 0.0
        if costs.run(0, costs.last_exit, 2) > request.ceiling:
            return TokenTree()
        tree = self._source.propose(replace(request, floor=max(request.floor, costs.least_score)))
        cut = self.cut(tree, request)
        self._promise = sum(cut.scores)
        return cut

    def cut(self, tree: TokenTree, request: DraftRequest) -> TokenTree:
        """What of a tree of its source it would propose."""
        costs, scores = request.costs, sorted(tree.scores, reverse=True)
        honest = min(1.0, self._accepted / self._promised)
        count, rate = costs.best_count(
            [honest * score for score in scores],
            self.overhead,
            limit=request.limit,
            ceiling=request.ceiling,
        )
        return tree.best(count) if rate * costs.plain > _WORTH else TokenTree()

    def verified(self, accepted: int, predicted: float, seconds: float) -> None:
        """Learn what became of the last draft, and what its round cost beyond the cost model.

        Args:
            accepted: how many drafts were.
            predicted: seconds the cost model gave for its verification.
            seconds: what the round took.
        """
        self._promised = _FADING * self._promised + self._promise
        self._accepted = _FADING * self._accepted + accepted
        extra = min(max(0.0, seconds - predicted), predicted)
        self.overhead += _MEMORY * (extra - self.overhead)

    def observe(self, observation: Observation) -> None:
        self._source.observe(observation)

    def close(self) -> None:
        self._source.close()
