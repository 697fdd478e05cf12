"""Acceptance: greedy paths by brute force, sampled tokens by their distribution."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from skipstone.runtimes import verify
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.tree import Sparse, TokenTree
from skipstone.runtimes.verify import accept_greedy, accept_sampled, choose
from tests.runtimes.chi_square import goodness_of_fit

V = 8
DRAWS = 12_000
Draw = Callable[[np.random.Generator], int]


@st.composite
def trees(draw: st.DrawFn, vocab: int = 4, size: int = 12) -> TokenTree:
    """A tree without equal siblings."""
    tree = TokenTree()
    used: set[tuple[int, int]] = set()
    for _ in range(draw(st.integers(0, size))):
        key = (draw(st.integers(ROOT, len(tree) - 1)), draw(st.integers(0, vocab - 1)))
        if key not in used:
            used.add(key)
            tree.add(key[1], key[0])
    return tree


@given(tree=trees(), best=st.dictionaries(st.integers(ROOT, 11), st.integers(0, 3)))
def test_greedy_acceptance_is_the_longest_path_the_target_would_have_taken(
    tree: TokenTree, best: dict[int, int]
) -> None:
    verdict = accept_greedy(tree, lambda node: best.get(node, 0))
    paths = {tuple(tree.path_tokens(node)): node for node in range(len(tree))}
    text, node = [], ROOT
    while (*text, best.get(node, 0)) in paths:
        text.append(best.get(node, 0))
        node = paths[tuple(text)]
    assert [tree.tokens[n] for n in verdict.accepted] == text
    assert verdict.token == best.get(node, 0)
    assert [tree.parents[n] for n in verdict.accepted] == [ROOT, *verdict.accepted][: len(text)]


@given(tree=trees(), seed=st.integers(0, 10_000), data=st.data())
def test_sampled_acceptance_is_a_path_of_the_tree_and_a_token_the_target_allows(
    tree: TokenTree, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    targets = {node: random_distribution(rng, 4, zeros=2) for node in range(ROOT, len(tree))}
    for parent, children in tree.children().items():
        if data.draw(st.booleans()):
            q = np.full(4, 0.1)
            q[[tree.tokens[child] for child in children]] = 1.0
            tree.distributions[parent] = Sparse(np.arange(4, dtype=np.int32), q / q.sum())
    verdict = accept_sampled(tree, targets.__getitem__, rng)
    node = ROOT
    for accepted in verdict.accepted:
        assert tree.parents[accepted] == node
        assert targets[node][tree.tokens[accepted]] > 0
        node = accepted
    assert targets[node][verdict.token] > 0


def random_distribution(rng: np.random.Generator, size: int = V, zeros: int = 0) -> NDArray[np.float64]:
    p = rng.dirichlet(np.full(size, 0.7))
    p[rng.permutation(size)[:zeros]] = 0.0
    return p / p.sum()


P = random_distribution(np.random.default_rng(1))
Q = random_distribution(np.random.default_rng(2))
IDS = np.arange(V, dtype=np.int32)


def draw_without_replacement(q: Sparse, count: int, rng: np.random.Generator) -> list[int]:
    """Exponential race: token i arrives after Exp(q_i), the first ones are a draw without replacement."""
    count = min(count, int(np.count_nonzero(q.probs)))
    with np.errstate(divide="ignore"):
        arrival = rng.standard_exponential(len(q.ids)) / q.probs
    return [int(token) for token in q.ids[np.argsort(arrival)[:count]]]


def one_position(p: NDArray[np.float64], q: Sparse | None, candidates: int | list[int]) -> Draw:
    """The token that comes out of one position: `candidates` drawn from q, or fixed ones."""

    def draw(rng: np.random.Generator) -> int:
        tokens = (
            draw_without_replacement(q, candidates, rng)
            if q is not None and isinstance(candidates, int)
            else list(candidates)  # type: ignore[arg-type]
        )
        return verify.choose(p, tokens, q, rng)[1]

    return draw


FORBIDDEN = np.where(np.arange(V) < 3, 0.0, P) / P[3:].sum()
PARTIAL = Sparse(IDS[2:6], Q[2:6] / Q[2:6].sum())
UNIFORM = np.array([1 / 3] * 3 + [0.0] * (V - 3))
CASES: dict[str, tuple[NDArray[np.float64], Sparse | None, int | list[int]]] = {
    "one candidate": (P, Sparse(IDS, Q), 1),
    "three candidates without replacement": (P, Sparse(IDS, Q), 3),
    "every token a candidate": (P, Sparse(IDS, Q), V),
    "one deterministic candidate": (P, None, [5]),
    "three deterministic candidates": (P, None, [int(i) for i in np.argsort(-P)[:3]]),
    "candidates the target forbids": (FORBIDDEN, Sparse(IDS, Q), 3),
    "deterministic candidates the target forbids": (FORBIDDEN, None, [0, 6, 1]),
    "q over a part of the vocabulary": (P, PARTIAL, 2),
    "q over a part, all of it drawn": (P, PARTIAL, 4),
    "two candidates of a peaked q": (UNIFORM, Sparse(IDS[:3], np.array([0.8, 0.15, 0.05])), 2),
    "three candidates of a peaked q": (
        P,
        Sparse(IDS, np.array([0.01, 0.01, 0.02, 0.02, 0.8, 0.1, 0.02, 0.02])),
        3,
    ),
    "p and q equal": (P, Sparse(IDS, P), 2),
    "q all on one token": (P, Sparse(IDS, np.eye(V)[2]), 1),
    "p all on one token": (np.eye(V)[2], Sparse(IDS, Q), 2),
}


def emitted(draw: Callable[[np.random.Generator], Hashable], seed: int = 0) -> Counter[Hashable]:
    rng = np.random.default_rng(seed)
    return Counter(draw(rng) for _ in range(DRAWS))


@pytest.mark.parametrize("case", CASES)
def test_the_emitted_token_has_the_targets_distribution(case: str) -> None:
    p, q, candidates = CASES[case]
    found = emitted(one_position(p, q, candidates))
    assert goodness_of_fit(found, dict(enumerate(p))) > 1e-3


def test_equal_distributions_accept_every_first_candidate() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2_000):
        token = draw_without_replacement(Sparse(IDS, P), 1, rng)
        assert choose(P, token, Sparse(IDS, P), rng) == (0, token[0])


def choose_from_p_after_refusal(p, candidates, q, rng):  # type: ignore[no-untyped-def]
    """Broken: a refused candidate's token is drawn from p instead of the residual."""
    for index, token in enumerate(candidates):
        at = 1.0 if q is None else q.probs[list(q.ids).index(token)]
        if rng.random() * at < p[token]:
            return index, token
    return None, int(rng.choice(len(p), p=p))


@pytest.mark.parametrize(
    "case",
    [
        "one candidate",
        "three candidates without replacement",
        "three deterministic candidates",
        "deterministic candidates the target forbids",
        "q over a part of the vocabulary",
    ],
)
def test_the_same_test_fails_where_the_token_is_drawn_from_p_instead_of_the_residual(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, q, candidates = CASES[case]
    monkeypatch.setattr(verify, "choose", choose_from_p_after_refusal)
    found = emitted(one_position(p, q, candidates))
    assert goodness_of_fit(found, dict(enumerate(p))) < 1e-9


@pytest.mark.parametrize(
    "case",
    ["candidates the target forbids", "two candidates of a peaked q", "three candidates of a peaked q"],
)
def test_the_same_test_fails_where_q_is_not_renormalised_after_a_draw(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, q, candidates = CASES[case]
    monkeypatch.setattr(verify, "_without", lambda q_probs, _index: q_probs)
    found = emitted(one_position(p, q, candidates))
    assert goodness_of_fit(found, dict(enumerate(p))) < 1e-9


# --- two tokens in a row, through trees ---

FIRST = random_distribution(np.random.default_rng(3), 5)
SECOND = np.stack([random_distribution(np.random.default_rng(10 + t), 5, zeros=1) for t in range(5)])
DRAFT_FIRST = random_distribution(np.random.default_rng(20), 5)
DRAFT_SECOND = np.stack([random_distribution(np.random.default_rng(30 + t), 5) for t in range(5)])
JOINT = {(a, b): FIRST[a] * SECOND[a, b] for a, b in itertools.product(range(5), repeat=2)}


def sampled_tree(rng: np.random.Generator, branching: int) -> TokenTree:
    """Two levels, every node's children drawn without replacement."""
    tree, ids = TokenTree(), np.arange(5, dtype=np.int32)
    tree.distributions[ROOT] = Sparse(ids, DRAFT_FIRST)
    for token in draw_without_replacement(tree.distributions[ROOT], branching, rng):
        node = tree.add(token, ROOT)
        tree.distributions[node] = Sparse(ids, DRAFT_SECOND[token])
        for second in draw_without_replacement(tree.distributions[node], branching, rng):
            tree.add(second, node)
    return tree


def fixed_tree(_rng: np.random.Generator, _branching: int) -> TokenTree:
    tree = TokenTree()
    for a in (1, 4, 0):
        node = tree.add(a, ROOT)
        for b in (2, 3):
            tree.add(b, node)
    return tree


def half_sampled_tree(rng: np.random.Generator, branching: int) -> TokenTree:
    """The first level deterministic, the second one drawn."""
    tree = TokenTree()
    for a in (1, 4):
        node = tree.add(a, ROOT)
        tree.distributions[node] = Sparse(np.arange(5, dtype=np.int32), DRAFT_SECOND[a])
        for b in draw_without_replacement(tree.distributions[node], branching, rng):
            tree.add(b, node)
    return tree


def two_tokens(
    make: Callable[[np.random.Generator, int], TokenTree], branching: int
) -> Callable[[np.random.Generator], tuple[int, ...]]:
    def draw(rng: np.random.Generator) -> tuple[int, ...]:
        tree = make(rng, branching)

        def target(node: int) -> NDArray[np.float64]:
            path = tree.path_tokens(node)
            return FIRST if not path else SECOND[path[0]] if len(path) == 1 else np.full(5, 0.2)

        verdict = accept_sampled(tree, target, rng)
        tokens = [*(tree.tokens[node] for node in verdict.accepted), verdict.token]
        if len(tokens) == 1:
            tokens.append(int(rng.choice(5, p=SECOND[tokens[0]])))
        return tuple(tokens[:2])

    return draw


@pytest.mark.parametrize("branching", [1, 3])
@pytest.mark.parametrize("make", [sampled_tree, fixed_tree, half_sampled_tree])
def test_two_tokens_in_a_row_have_the_targets_joint_distribution(
    make: Callable[[np.random.Generator, int], TokenTree], branching: int
) -> None:
    assert goodness_of_fit(emitted(two_tokens(make, branching)), JOINT) > 1e-3


@pytest.mark.parametrize("make", [sampled_tree, fixed_tree, half_sampled_tree])
def test_the_joint_test_fails_where_the_residual_step_is_broken(
    make: Callable[[np.random.Generator, int], TokenTree], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "choose", choose_from_p_after_refusal)
    assert goodness_of_fit(emitted(two_tokens(make, 2)), JOINT) < 1e-9


@given(seed=st.integers(0, 2**32 - 1))
def test_a_token_of_probability_zero_is_never_emitted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = random_distribution(rng, V, zeros=5), random_distribution(rng, V, zeros=2)
    candidates = draw_without_replacement(Sparse(IDS, q), 3, rng)
    assert p[choose(p, candidates, Sparse(IDS, q), rng)[1]] > 0
