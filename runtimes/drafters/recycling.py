"""Token recycling (arXiv 2408.08696): the successors every verification scores anyway are kept and drafted from.

A matrix [vocabulary, k] holds, for every token, the k best next tokens of the last time the token was scored (the
paper's adjacency matrix, section 3.1). The draft is the tree of its most probable paths by breadth-first search
(section 3.2), with the shape not fixed in advance but given by how often the i-th successor was accepted so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from skipstone.runtimes.drafters.base import DraftRequest, Observation
from skipstone.runtimes.drafters.best_first import most_probable_paths
from skipstone.runtimes.sampling import likeliest
from skipstone.runtimes.tree import TokenTree

_PRIOR = (0.42, 0.13, 0.07, 0.05)
_LEARNING = 0.03
_UNSEEN = -1


class RecyclingDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`. The matrix outlives sequences: text of one kind repeats itself.

    Args:
        vocab_size: rows of the matrix.
        successors: columns of the matrix, at most 4.
    """

    name = "recycling"

    def __init__(self, vocab_size: int, successors: int = 4) -> None:
        self._successors = min(successors, vocab_size)
        self._matrix: NDArray[np.int32] = np.full((vocab_size, self._successors), _UNSEEN, np.int32)
        self._trust = list(_PRIOR[: self._successors])

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        """Only the bigrams of prompt and source are entered; the matrix stays."""
        for token, following in chain(pairwise(prompt), pairwise(source)):
            if self._matrix[token, 0] == _UNSEEN:
                self._matrix[token, 0] = following

    def propose(self, request: DraftRequest) -> TokenTree:
        return most_probable_paths(
            request.context[-1],
            self._kept,
            lambda _, token: token,
            limit=request.limit,
            floor=request.floor,
        )

    def observe(self, observation: Observation) -> None:
        self._learn_ranks(observation.context[-observation.fresh - 1 :])
        if observation.tokens:
            self._matrix[observation.tokens] = likeliest(np.stack(observation.logits), self._successors)

    def close(self) -> None:
        return None

    def _kept(self, token: int) -> Iterator[tuple[int, float]]:
        for following, trust in zip(self._matrix[token].tolist(), self._trust, strict=True):
            if following == _UNSEEN:
                return
            yield following, trust

    def _learn_ranks(self, text: Sequence[int]) -> None:
        """How often the i-th kept successor was the next token."""
        for token, following in pairwise(text):
            row = self._matrix[token].tolist()
            if row[0] == _UNSEEN:
                continue
            for rank in range(self._successors):
                self._trust[rank] += _LEARNING * ((row[rank] == following) - self._trust[rank])
