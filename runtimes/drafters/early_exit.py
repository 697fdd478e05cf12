"""LayerSkip self-speculation: the target's own early exit drafts (arXiv 2404.16710, section 4.3).

Draft rows are rows of the target's session advanced to an early exit; verification advances the same rows further.
With a `source` the exit is a stage: it judges what a cheaper drafter proposes and proposes to the next stage. Sources
may be early exits themselves, so stages nest to any depth.
"""

from __future__ import annotations

from collections.abc import Sequence

from skipstone.errors import UsageError
from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.drafters.grower import Grower
from skipstone.runtimes.drafters.growth import DraftingModel, GrowthOptions
from skipstone.runtimes.tree import TokenTree


class EarlyExitDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`.

    Args:
        exit: number of layers to draft with, one of the engine's inner exits.
        source: the stage before, or None.
        options: shape of the tree; `GrowthOptions(branching=1)` is the plain chain of the paper.
    """

    def __init__(
        self, exit: int, source: Drafter | None = None, options: GrowthOptions | None = None
    ) -> None:
        self.exit, self._source = exit, source
        self._grower = Grower(source, options or GrowthOptions())
        self.name = f"{source.name} → exit {exit}" if source else f"exit {exit}"

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        if self._source is not None:
            self._source.reset(prompt, source)

    def propose(self, request: DraftRequest) -> TokenTree:
        session = request.session
        ids = session.engine.draft_vocabulary
        if self.exit not in session.exits[:-1] or ids is None:
            inner = ", ".join(map(str, session.exits[:-1])) or "none"
            raise UsageError(f"--assistant-early-exit {self.exit}: this bundle's inner exits are: {inner}")
        root = session.push(request.context[session.length :])[-1]
        return self._grower.grow(
            DraftingModel(session, self.exit, ids, request.costs, is_target=True), root, request
        )

    def observe(self, observation: Observation) -> None:
        self._grower.learn(observation)
        if self._source is not None:
            self._source.observe(observation)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
