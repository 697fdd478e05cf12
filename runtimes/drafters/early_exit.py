"""LayerSkip self-speculation: the target's own early exit drafts (arXiv 2404.16710, section 4.3).

Draft rows are rows of the target's session advanced to an early exit; verification advances the same rows further.
With a `source` the exit is a stage: it verifies what a cheaper drafter guesses and proposes to the next stage. Sources
may be early exits themselves, so stages nest to any depth.
"""

from __future__ import annotations

from collections.abc import Sequence

from skipstone.errors import UsageError
from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.drafters.growth import Growth, GrowthOptions
from skipstone.runtimes.tree import TokenTree


class EarlyExitDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`.

    Args:
        exit: number of layers to draft with, one of the engine's inner exits.
        source: a cheaper drafter that guesses ahead, or None.
        options: shape of the tree; `GrowthOptions(branching=1)` is the plain chain of the paper.
    """

    def __init__(self, exit: int, source: Drafter | None = None, options: GrowthOptions | None = None) -> None:
        self.exit, self._source, self._options = exit, source, options or GrowthOptions()
        self.name = f"{source.name} → exit {exit}" if source else f"exit {exit}"

    def reset(self, prompt: Sequence[int]) -> None:
        if self._source is not None:
            self._source.reset(prompt)

    def propose(self, request: DraftRequest) -> TokenTree:
        session, costs = request.session, request.costs
        ids = session.engine.draft_vocabulary
        if self.exit not in session.exits[:-1] or ids is None:
            inner = ", ".join(map(str, session.exits[:-1])) or "none"
            raise UsageError(f"--assistant-early-exit {self.exit}: this bundle's inner exits are: {inner}")
        (root,) = session.push(request.context[-1:])
        growth = Growth(session, root, self.exit, ids, request, self._options)
        spent = 0.0
        while wave := growth.next_wave(spent, own_target=True):
            spent += costs.draft(0, self.exit, growth.grow(wave, self._source))
        if not request.sampler.greedy:
            return growth.tree
        count, _ = costs.best_count(
            sorted(growth.tree.scores, reverse=True), spent, start=self.exit, limit=request.limit
        )
        return growth.tree.best(count)

    def observe(self, observation: Observation) -> None:
        if self._source is not None:
            self._source.observe(observation)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
