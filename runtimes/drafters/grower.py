"""What early exits and draft models share: grow a tree in the right mode, learn from what became of it."""

from __future__ import annotations

from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.drafters.greedy import GreedyGrowth, Trust
from skipstone.runtimes.drafters.growth import DraftingModel, Growth, GrowthOptions
from skipstone.runtimes.drafters.sampled import SampledGrowth
from skipstone.runtimes.drafters.shaped import ShapedGrowth
from skipstone.runtimes.tree import TokenTree


class Grower:
    """Grows trees round after round.

    Args:
        source: the stage before, or None.
        options: shape of the trees.
    """

    def __init__(self, source: Drafter | None, options: GrowthOptions) -> None:
        self._source, self._options = source, options
        self._trust = Trust()
        self._last: GreedyGrowth | None = None

    def grow(self, model: DraftingModel, root: int, request: DraftRequest) -> TokenTree:
        """The tree the drafting model proposes below `root`, a row of its session."""
        self._last = None
        growth = Growth(model, root, request, self._options)
        if self._options.shape is not None:
            ShapedGrowth(growth, self._options.shape).grow()
            return growth.tree
        if not request.sampler.greedy:
            return SampledGrowth(growth).grow(self._source)
        self._last = GreedyGrowth(growth, self._trust)
        return self._last.grow(self._source)

    def learn(self, observation: Observation) -> None:
        """Take in what verification found after the last tree."""
        if self._last is not None and observation.fresh:
            self._last.learn(observation.context[-observation.fresh :])
        self._last = None
