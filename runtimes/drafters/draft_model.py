"""A separate draft model with its own session (arXiv 2211.17192), itself drafted for if a source is given.

The draft session follows the target's context: it is rewound to the common prefix and catches up on new tokens in one
batch. Drafts grow as an early exit's do. Of an encoder-decoder it reads the target's source with an encoder of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from skipstone.errors import VocabularyMismatchError
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.drafters.grower import Grower
from skipstone.runtimes.drafters.growth import DraftingModel, GrowthOptions
from skipstone.runtimes.prefix import common_prefix_length
from skipstone.runtimes.session import Session
from skipstone.runtimes.tree import TokenTree

# From a source, or None, and the tree's shape to the drafter.
DraftModelMaker = Callable[[Drafter | None, GrowthOptions], Drafter]


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
        self._grower = Grower(source, self._options)
        self._fits = True
        self._ids = np.arange(session.engine.vocab_size, dtype=np.int32)
        self.name = f"{source.name} → {name}" if source else name

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        session, encoder = self._session, self._session.engine.encoder
        session.discard()
        self._fits = encoder is None or len(source) <= encoder.max_source_length
        if encoder is not None and self._fits:
            session.encode(source)
        if self._source is not None:
            self._source.reset(prompt, source)

    def propose(self, request: DraftRequest) -> TokenTree:
        session, last = self._session, self._session.exits[-1]
        room = session.context_length - request.limit - self._options.guesses
        if not self._fits or len(request.context) >= room:
            return TokenTree()
        if not self._affords_to_follow(request):
            return TokenTree()
        self._follow(request.context[:-1])
        (root,) = session.push(request.context[-1:])
        return self._grower.grow(
            DraftingModel(session, last, self._ids, self._costs, is_target=False), root, request
        )

    def observe(self, observation: Observation) -> None:
        self._grower.learn(observation)
        if self._source is not None:
            self._source.observe(observation)

    def close(self) -> None:
        self._session.close()
        if self._source is not None:
            self._source.close()

    def _affords_to_follow(self, request: DraftRequest) -> bool:
        """Whether catching up, with a whole prompt say, takes no more seconds than the round may."""
        missing = len(request.context) - common_prefix_length(self._session.tokens, request.context[:-1])
        return self._costs.run(0, self._session.exits[-1], missing) <= request.ceiling

    def _follow(self, context: Sequence[int]) -> None:
        """Make the draft session's context equal to `context`; rows drafted before are found again, new ones lag."""
        session = self._session
        held = session.tokens
        common = common_prefix_length(held, context)
        if common < len(held):
            session.rewind(common)
        rows = session.push(context[common:])
        if rows:
            session.commit(rows[-1])
        else:
            session.discard()


def check_vocabularies(
    target: Sequence[str], draft: Sequence[str], target_name: str, draft_name: str
) -> None:
    """Refuse a draft model whose token ids mean other tokens.

    Args:
        target: the target's vocabulary, token text by id.
        draft: the draft model's.
        target_name: for the message.
        draft_name: likewise.

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
