"""Lossless verification of a token tree.

Greedy: follow the target's best token as long as the tree has it.

Sampling: speculative sampling (arXiv 2211.17192, section 2.3) for several candidates per node, drawn without
replacement (multi-candidate speculative decoding, 2401.06706, algorithm 2; 2409.10644). At a node with target
distribution p and candidates x_1, x_2, … drawn one after the other from q without putting any back:

    accept x_i with probability min(1, p(x_i) / q(x_i));
    otherwise p ← norm(max(0, p − q)), q ← q without x_i, renormalised; try the next;
    when all are refused, draw the token from p.

The emitted token has the target's distribution whatever q is. Candidates chosen deterministically are the case where q
puts all its mass on one token after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import Probabilities, draw
from skipstone.runtimes.tree import Sparse, TokenTree


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verification decided.

    Attributes:
        accepted: nodes of the accepted path, top down.
        token: the token after it, from the target's own distribution.
    """

    accepted: tuple[int, ...]
    token: int


def accept_greedy(tree: TokenTree, best: Callable[[int], int]) -> Verdict:
    """Walk down along the target's best tokens.

    Args:
        tree: the draft.
        best: from a node (or ROOT) to the target's best next token after it.
    """
    index = {
        (parent, token): node
        for node, (parent, token) in enumerate(zip(tree.parents, tree.tokens, strict=True))
    }
    accepted: list[int] = []
    node = ROOT
    while True:
        token = best(node)
        child = index.get((node, token))
        if child is None:
            return Verdict(tuple(accepted), token)
        accepted.append(child)
        node = child


def accept_sampled(
    tree: TokenTree, target: Callable[[int], Probabilities], rng: np.random.Generator
) -> Verdict:
    """Walk down by speculative sampling.

    Args:
        tree: the draft; `tree.distributions` says what each node's children were drawn from.
        target: from a node (or ROOT) to the target's distribution after it, float64 [vocab_size].
        rng: source of the acceptance draws.
    """
    children = tree.children()
    accepted: list[int] = []
    node = ROOT
    while True:
        candidates = children.get(node, [])
        tokens = [tree.tokens[child] for child in candidates]
        choice, token = choose(target(node), tokens, tree.distributions.get(node), rng)
        if choice is None:
            return Verdict(tuple(accepted), token)
        node = candidates[choice]
        accepted.append(node)


def choose(
    p: Probabilities, candidates: Sequence[int], q: Sparse | None, rng: np.random.Generator
) -> tuple[int | None, int]:
    """One position: the accepted candidate's index and token, or None and a token from the residual.

    Args:
        p: the target's distribution, [vocab_size].
        candidates: tokens in the order they were drawn.
        q: what they were drawn from, without replacement; None: they were chosen deterministically.
        rng: source of the draws.
    """
    q_probs = None if q is None else q.probs
    for index, token in enumerate(candidates):
        residual = p.copy()
        if q is None or q_probs is None:
            accepted = rng.random() < p[token]
            residual[token] = 0.0
        else:
            at = int(np.searchsorted(q.ids, token))
            accepted = rng.random() * q_probs[at] < p[token]
            residual[q.ids] = np.maximum(0.0, p[q.ids] - q_probs)
            q_probs = _without(q_probs, at)
        mass = residual.sum()
        if (
            accepted or mass <= 0.0
        ):  # nothing is left over: p and q were equal, refusing was a matter of rounding
            return index, token
        p = residual / mass
    return None, draw(p, rng)


def _without(q: Probabilities, index: int) -> Probabilities:
    """Q after its candidate was drawn and not put back."""
    rest = q.copy()
    rest[index] = 0.0
    total = rest.sum()
    scaled: Probabilities = rest / total if total > 0.0 else rest
    return scaled
