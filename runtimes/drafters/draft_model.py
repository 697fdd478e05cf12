"""A separate draft model with its own session (arXiv 2211.17192), itself drafted for if a source is given.

The draft session follows the target's context: it is rewound to the common prefix and catches up on new tokens in one
batch. Drafts grow as an early exit's do.
"""

from __future__ import annotations

from collections.abc import Sequence

from skipstone.errors import VocabularyMismatchError
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.drafters.growth import Growth, GrowthOptions
from skipstone.runtimes.session import Session
from skipstone.runtimes.tree import TokenTree


class DraftModelDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`.

    Args:
        session: the draft model's own session; closed with the drafter.
        costs: the draft model's cost model.
        name: shown in statistics.
        source: a cheaper drafter that guesses for the draft model, or None.
        options: shape of the tree.
    """

    def __init__(
        self,
        session: Session,
        costs: CostModel,
        name: str,
        source: Drafter | None = None,
        options: GrowthOptions | None = None,
    ) -> None:
        self._session, self._costs, self._source = session, costs, source
        self._options = options or GrowthOptions()
        self.name = f"{source.name} → {name}" if source else name

    def reset(self, prompt: Sequence[int]) -> None:
        self._session.discard()
        if self._source is not None:
            self._source.reset(prompt)

    def propose(self, request: DraftRequest) -> TokenTree:
        session, last = self._session, self._session.exits[-1]
        session.discard()
        if len(request.context) + request.limit + self._options.guesses >= session.context_length:
            return TokenTree()
        self._follow(request.context[:-1])
        (root,) = session.push(request.context[-1:])
        growth = Growth(session, root, last, None, request, self._options, self._costs)
        spent = 0.0
        while wave := growth.next_wave(spent, own_target=False):
            spent += self._costs.run(0, last, growth.grow(wave, self._source))
        if not request.sampler.greedy:
            return growth.tree
        scores = sorted(growth.tree.scores, reverse=True)
        return growth.tree.best(request.costs.best_count(scores, spent, limit=request.limit)[0])

    def observe(self, observation: Observation) -> None:
        if self._source is not None:
            self._source.observe(observation)

    def close(self) -> None:
        self._session.close()
        if self._source is not None:
            self._source.close()

    def _follow(self, context: Sequence[int]) -> None:
        """Make the draft session's context equal to `context`, computing only what is new."""
        session = self._session
        held = session.tokens
        common = 0
        while common < min(len(held), len(context)) and held[common] == context[common]:
            common += 1
        session.rewind(common)
        if common < len(context):
            session.prefill(context[common:])


def check_vocabularies(target: Sequence[str], draft: Sequence[str], target_name: str, draft_name: str) -> None:
    """Refuse a draft model whose token ids mean other tokens.

    Args:
        target, draft: the vocabularies as lists, token text by id.
        target_name, draft_name: for the message.

    Raises:
        VocabularyMismatchError: naming the sizes or the first token that differs.
    """
    if len(target) != len(draft):
        raise VocabularyMismatchError(
            f"{draft_name}: {len(draft)} tokens, {target_name} has {len(target)}",
            hint="use a draft model that was trained with the target's tokenizer",
        )
    for index, (ours, theirs) in enumerate(zip(target, draft, strict=True)):
        if ours != theirs:
            raise VocabularyMismatchError(
                f"{draft_name}: token {index} is {theirs!r}, in {target_name} it is {ours!r}",
                hint="use a draft model that was trained with the target's tokenizer",
            )
