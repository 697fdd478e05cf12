"""Several drafters' trees in one: equal paths are shared, and what each says of a token is weighed against the others.

The estimate for a child is σ(bias + Σ opinions), over the drafters that propose any child of its parent: one that
proposes this child adds `present + weight·logit p`, one that proposes only others adds `absent`. So do context-mixing
compressors join their models (Mahoney, Data Compression Explained, section 4.3, logistic mixing). Two that agree are
surer than either, and one that says too much or too little of itself is found out: all figures are learned from what
verification shows, down the slope of the log loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.tree import TokenTree

_LEARNING, _SLOWER = 0.02, 0.25  # of what is added, and of weights, in parts of that
_SURE = 0.99  # no opinion is taken to be firmer
_LEAST_ODDS = -30.0  # keeps exp from overflowing
_STEPS, _TINY = 128, 1e-9
_LOG_ODDS = [
    math.log(p / (1.0 - p)) for p in (min(max(i / _STEPS, 1.0 - _SURE), _SURE) for i in range(_STEPS + 1))
]


@dataclass(slots=True)
class Opinion:
    """How much a drafter's word counts.

    Attributes:
        weight: of the log odds that it gives to a child.
        present: added where it proposes the child.
        absent: added where it proposes only others.
    """

    weight: float = 0.8
    present: float = 0.2
    absent: float = -1.0


# Begun with: what fits the shipped models' texts.
_COUNTED, _COPIED = (1.2, 0.3, -1.0), (0.5, 0.1, -1.2)
_FIRST = {"katz": _COUNTED, "table": _COUNTED, "n-gram": _COPIED}


class _Union:
    """The parts' trees in one, and which part said what; parts by their places."""

    def __init__(self, trees: Sequence[TokenTree]) -> None:
        self.tree = TokenTree()
        self.said: list[list[tuple[int, float]]] = []  # by node: who proposes it, and the log odds given
        self.speakers: dict[int, list[int]] = {}  # by parent: who proposes a child
        self.children: dict[int, list[int]] = {}
        self.estimates: list[float] = []  # by node, given its parent
        self._index: dict[tuple[int, int], int] = {}
        for part, tree in enumerate(trees):
            self._take_in(part, tree)

    def _take_in(self, part: int, tree: TokenTree) -> None:
        index, said, scores = self._index, self.said, tree.scores
        number: list[int] = []
        for token, parent, score in zip(tree.tokens, tree.parents, scores, strict=True):
            if parent != ROOT:
                score, parent = score / max(scores[parent], _TINY), number[parent]
            node = index.get((parent, token))
            if node is None:
                node = index[parent, token] = self.tree.add(token, parent)
                said.append([])
                self.children.setdefault(parent, []).append(node)
            said[node].append((part, _LOG_ODDS[int(_STEPS * score)]))
            speakers = self.speakers.setdefault(parent, [])
            if not speakers or speakers[-1] != part:
                speakers.append(part)
            number.append(node)


class PooledDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`. Its parts must draft deterministically.

    Args:
        parts: the drafters whose trees are joined.

    Attributes:
        opinions: how much each part's word counts by now.
        bias: the log odds of a child that nobody has said anything of.
    """

    def __init__(self, parts: Sequence[Drafter]) -> None:
        self._parts = tuple(parts)
        self.opinions = [Opinion(*_FIRST.get(part.name, ())) for part in parts]
        self.bias = 0.5
        self._last: tuple[int, _Union] | None = None  # length of the context, and what was proposed for it
        self.name = "+".join(part.name for part in parts)

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        self._last = None
        for part in self._parts:
            part.reset(prompt, source)

    def propose(self, request: DraftRequest) -> TokenTree:
        union = _Union([part.propose(request) for part in self._parts])
        self._last = len(request.context), union
        self._estimate(union)
        return union.tree.best(request.limit)

    def observe(self, observation: Observation) -> None:
        if self._last is not None:
            length, union = self._last
            if length == len(observation.context) - observation.fresh:
                self._learn(union, observation.context[length:])
            self._last = None
        for part in self._parts:
            part.observe(observation)

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def _estimate(self, union: _Union) -> None:
        """Probabilities of all nodes given their parents, and scores of their paths."""
        opinions, tree, estimates = self.opinions, union.tree, union.estimates
        estimates[:] = [0.0] * len(tree)
        for parent, nodes in union.children.items():
            silence = self.bias + sum(opinions[part].absent for part in union.speakers[parent])
            total = 0.0
            for node in nodes:
                odds = silence
                for part, said in union.said[node]:
                    opinion = opinions[part]
                    odds += opinion.present - opinion.absent + opinion.weight * said
                estimates[node] = share = 1.0 / (1.0 + math.exp(-max(odds, _LEAST_ODDS)))
                total += share
            above = 1.0 if parent == ROOT else tree.scores[parent]
            scale = above * min(1.0, _SURE / total)
            for node in nodes:
                tree.scores[node] = scale * estimates[node]

    def _learn(self, union: _Union, fresh: Sequence[int]) -> None:
        """The text went on so: children on its path are right, their siblings wrong."""
        node = ROOT
        for token in fresh:
            following = ROOT
            for child in union.children.get(node, ()):
                hit = union.tree.tokens[child] == token
                following = child if hit else following
                self._correct(union, node, child, _LEARNING * (hit - union.estimates[child]))
            if following == ROOT:
                return
            node = following

    def _correct(self, union: _Union, parent: int, child: int, step: float) -> None:
        """Move all that was added for a child by a step, the weights by their inputs."""
        self.bias += step
        proposing = dict(union.said[child])
        for part in union.speakers[parent]:
            opinion = self.opinions[part]
            if part in proposing:
                opinion.present += step
                opinion.weight += _SLOWER * step * proposing[part]
            else:
                opinion.absent += step
