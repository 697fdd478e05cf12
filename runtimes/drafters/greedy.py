"""Greedy growth: the drafting model judges the nodes of the stage before, and adds candidates of its own."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skipstone.runtimes.drafters.base import Drafter
from skipstone.runtimes.drafters.growth import Growth
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import likeliest, softmax
from skipstone.runtimes.tree import TokenTree

_LEARNING = 0.02
_SURE = 0.995  # no estimate is trusted beyond


class Calibration:
    """What a stated probability is worth: σ(bias + weight·logit p), fitted online (Platt scaling)."""

    def __init__(self, bias: float, weight: float) -> None:
        self._bias, self._weight = bias, weight

    def estimate(self, p: float) -> float:
        """The probability to act on."""
        return _sigmoid(self._bias + self._weight * _logit(p))

    def learn(self, p: float, hit: bool) -> None:
        """One event of stated probability `p` did or did not happen."""
        error = float(hit) - self.estimate(p)
        self._bias = _clip(self._bias + _LEARNING * error, -2.0, 2.0)
        self._weight = _clip(self._weight + _LEARNING * error * _logit(p) * 0.25, 0.5, 2.0)


@dataclass(frozen=True, slots=True)
class Opinion:
    """What the stages said of a child when its parent was examined.

    Attributes:
        token: the child's.
        before: the stage before's probability, 0 for a child it did not propose.
        model: this model's probability.
        left: mass the stage before left to other children; 0 for its own.
        rank: place among this model's choices.
    """

    token: int
    before: float
    model: float
    left: float = 0.0
    rank: int = 0


class Trust:
    """How far a stage's opinion moves the estimate of the stage before, learned from verification.

    For a child the stage before gives probability s and this model p, the estimate is
    σ(bias + logit s + weight·logit p): logistic pooling of two experts. Children it did not propose share the mass
    left over, in proportion to p; what such a share is worth is learned apart for the model's first choice, which
    proves right more often than it says, and for its further ones, which do less often.
    """

    def __init__(self) -> None:
        self.bias, self.weight = 0.5, 0.25
        self._own = (Calibration(0.4, 1.4), Calibration(-0.7, 1.1))

    def pooled(self, before: float, model: float) -> float:
        """Estimate for a child both have an opinion on."""
        return _sigmoid(self.bias + _logit(before) + self.weight * _logit(model))

    def alone(self, share: float, rank: int) -> float:
        """Estimate for a child that only this model proposes.

        Args:
            share: its part of the mass left over.
            rank: 0 for the model's first choice, 1 for its second, …
        """
        return self._own[min(rank, 1)].estimate(share)

    def learn(self, opinion: Opinion, hit: bool) -> None:
        """One child of an accepted node: was it the target's token?"""
        if opinion.before > 0.0:
            error = float(hit) - self.pooled(opinion.before, opinion.model)
            self.bias = _clip(self.bias + _LEARNING * error, -2.0, 2.0)
            self.weight = _clip(self.weight + _LEARNING * error * _logit(opinion.model) * 0.25, 0.0, 1.5)
        else:
            self._own[min(opinion.rank, 1)].learn(opinion.left * opinion.model, hit)


class GreedyGrowth:
    """Grows one round's tree for greedy decoding.

    Args:
        growth: the shared part.
        trust: this stage's.
    """

    def __init__(self, growth: Growth, trust: Trust) -> None:
        self._growth, self._trust = growth, trust
        self._shares: list[float] = []  # probability of each node given its parent
        self._ids = memoryview(growth.model.ids)  # type: ignore[arg-type]  # single items sooner than from an array
        self._children: defaultdict[int, dict[int, int]] = defaultdict(dict)  # by token, of every node
        self._examined: set[int] = set()
        self.records: dict[tuple[int, ...], list[Opinion]] = {}

    def grow(self, source: Drafter | None) -> TokenTree:
        """The tree worth verifying."""
        growth = self._growth
        wave = [ROOT, *self._first_guesses(source)]
        while wave:
            self._examine(wave, np.stack(list(growth.run([growth.row(node) for node in wave]).values())))
            self._rescore()
            wave = growth.next_wave(self._leaves(), self._examined, growth.fitting())
        return self._worth_verifying()

    def _first_guesses(self, source: Drafter | None) -> list[int]:
        """Take over the stage before's tree; returns the nodes of it to examine with the root."""
        growth = self._growth
        if source is None or min(growth.options.guesses, growth.rows_left) < 1:
            return []
        before = self._within_length(source.propose(growth.request))
        most = max(0, min(growth.options.guesses, growth.rows_left))  # the stage before took rows of its own
        for token, parent, score in zip(before.tokens, before.parents, before.scores, strict=True):
            self._add(token, parent, score / (before.scores[parent] if parent != ROOT else 1.0))
        order = sorted(range(len(before)), key=lambda node: (-before.scores[node], node))
        scores = [before.scores[node] for node in order]
        count = growth.request.costs.best_count(scores, 0.0, limit=most, ceiling=growth.request.ceiling)[0]
        self._rescore()
        return sorted(order[:count])

    def _within_length(self, tree: TokenTree) -> TokenTree:
        """The tree without levels below the asked length."""
        length = self._growth.options.length
        if length is None:
            return tree
        levels: list[int] = []
        for parent in tree.parents:
            levels.append(1 + (levels[parent] if parent != ROOT else 0))
        return tree.subtree([node for node, level in enumerate(levels) if level <= length])

    def _add(self, token: int, parent: int, share: float) -> None:
        self._shares.append(min(share, _SURE))
        self._children[parent][token] = self._growth.tree.add(token, parent)

    def _examine(self, wave: Sequence[int], logits: NDArray[np.float32]) -> None:
        """Pool both opinions on the children of a wave's nodes, and give them new ones; logits [nodes, ids]."""
        probabilities, best = softmax(logits), likeliest(logits, self._growth.options.branching)
        for node, p, ranked in zip(wave, probabilities, best.tolist(), strict=True):
            self._examined.add(node)
            if not self._growth.deep_enough(node):
                self.records[tuple(self._growth.tree.path_tokens(node))] = self._judge(node, p, ranked)

    def _judge(self, node: int, p: NDArray[np.float64], ranked: Sequence[int]) -> list[Opinion]:
        """Pool both opinions on a node's children, and give it those of the model's choices that are new."""
        children, shares, record = self._children[node], self._shares, []
        for token, child in children.items():
            model = self._probability(p, token)
            record.append(Opinion(token, shares[child], model))
            shares[child] = self._trust.pooled(shares[child], model)
        total = sum(shares[child] for child in children.values())
        for child in children.values():
            shares[child] *= min(1.0, _SURE / total)
        left = max(0.0, 1.0 - total)
        for rank, at in enumerate(ranked):
            token, model = self._ids[at], float(p[at])
            if token not in children and model >= self._growth.options.confidence:
                record.append(Opinion(token, 0.0, model, left, rank))
                self._add(token, node, self._trust.alone(left * model, rank))
        return record

    def _probability(self, p: NDArray[np.float64], token: int) -> float:
        """The model's probability of a token; a small one where its head leaves the token out."""
        at = bisect_left(self._ids, token)
        return float(p[at]) if at < len(self._ids) and self._ids[at] == token else 0.1

    def _rescore(self) -> None:
        """Path probabilities from the shares, top down (parents precede children)."""
        tree = self._growth.tree
        tree.scores = []
        for share, parent in zip(self._shares, tree.parents, strict=True):
            tree.scores.append(share * (tree.scores[parent] if parent != ROOT else 1.0))

    def _leaves(self) -> dict[int, float]:
        """Nodes that may be run next: unexamined, likely enough, their parents examined or runnable with them."""
        floor, tree = self._growth.options.floor, self._growth.tree
        return {
            node: score
            for node, score in enumerate(tree.scores)
            if node not in self._examined
            and score >= floor
            and (tree.parents[node] == ROOT or tree.parents[node] in self._examined)
        }

    def _worth_verifying(self) -> TokenTree:
        """The nodes that maximise expected tokens per second."""
        growth, tree = self._growth, self._growth.tree
        order = sorted(range(len(tree)), key=lambda node: (-tree.scores[node], node))
        behind = [node not in self._examined for node in order] if growth.model.is_target else ()
        count, _ = growth.request.costs.best_count(
            [tree.scores[node] for node in order],
            growth.spent,
            start=growth.start,
            limit=growth.request.limit,
            behind=behind,
            ceiling=growth.request.ceiling,
        )
        return tree.best(count)

    def learn(self, fresh: Sequence[int]) -> None:
        """Take in the tokens verification found to follow the context."""
        for depth, token in enumerate(fresh):
            for opinion in self.records.get(tuple(fresh[:depth]), ()):
                self._trust.learn(opinion, opinion.token == token)


def _logit(p: float) -> float:
    p = min(max(p, 0.003), _SURE)
    return math.log(p / (1.0 - p))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def _clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)
