"""Opinions pooled: against the formula written out, and against the gradient of the log loss, found by differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone.runtimes.drafters.base import DraftRequest, Observation
from skipstone.runtimes.drafters.katz import KatzDrafter
from skipstone.runtimes.drafters.ngram import NGramDrafter
from skipstone.runtimes.drafters.pooled import Opinion, PooledDrafter
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.tree import TokenTree
from tests.runtimes.toy_engine import ToyEngine, toy_costs

ENGINE = ToyEngine(vocab_size=24)


def request(context: Sequence[int], limit: int = 31) -> DraftRequest:
    sampler = Sampler(SamplingConfig())
    return DraftRequest(list(context), Session(ENGINE, 96), sampler, limit, toy_costs(ENGINE))


class Says:
    """Proposes the same paths every time.

    Args:
        name: its name.
        paths: by path, the probability of its last token given those before; parents first.
    """

    def __init__(self, name: str, paths: dict[tuple[int, ...], float]) -> None:
        self.name = name
        self.tree = TokenTree()
        nodes = {(): ROOT}
        for path, share in paths.items():
            parent = nodes[path[:-1]]
            above = 1.0 if parent == ROOT else self.tree.scores[parent]
            nodes[path] = self.tree.add(path[-1], parent, above * share)

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        return None

    def propose(self, request: DraftRequest) -> TokenTree:
        return self.tree

    def observe(self, observation: Observation) -> None:
        return None

    def close(self) -> None:
        return None


FIRST = {(5,): 0.75, (5, 6): 0.5, (7,): 0.125}
SECOND = {(5,): 0.5, (8,): 0.25, (8, 9): 0.5}


def pooled_of(*paths: dict[tuple[int, ...], float]) -> PooledDrafter:
    drafter = PooledDrafter([Says(f"part {place}", one) for place, one in enumerate(paths)])
    drafter.reset([1, 2])
    return drafter


def scores_of(drafter: PooledDrafter, context: Sequence[int] = (1, 2, 3)) -> dict[tuple[int, ...], float]:
    tree = drafter.propose(request(context))
    return {tuple(tree.path_tokens(node)): tree.scores[node] for node in range(len(tree))}


def odds(opinions: Sequence[Opinion], bias: float, *said: float | None) -> float:
    """Log odds of a child that the parts give these probabilities; None: they propose others, nan: nothing."""
    total = bias
    for opinion, p in zip(opinions, said, strict=True):
        if p is None:
            total += opinion.absent
        elif not math.isnan(p):
            total += opinion.present + opinion.weight * math.log(p / (1.0 - p))
    return total


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def test_scores_are_what_the_formula_says() -> None:
    drafter = pooled_of(FIRST, SECOND)
    opinions, bias, silent = drafter.opinions, drafter.bias, math.nan
    apart = {
        (5,): sigmoid(odds(opinions, bias, 0.75, 0.5)),
        (7,): sigmoid(odds(opinions, bias, 0.125, None)),
        (8,): sigmoid(odds(opinions, bias, None, 0.25)),
    }
    level = {path: p * 0.99 / sum(apart.values()) for path, p in apart.items()}
    assert sum(apart.values()) > 0.99, "they are made to leave something to others"
    expected = level | {
        (5, 6): level[5,] * sigmoid(odds(opinions, bias, 0.5, silent)),
        (8, 9): level[8,] * sigmoid(odds(opinions, bias, silent, 0.5)),
    }
    assert scores_of(drafter) == pytest.approx(expected, rel=1e-6)


def test_two_that_agree_are_surer_than_either() -> None:
    alone, both = scores_of(pooled_of({(5,): 0.7})), scores_of(pooled_of({(5,): 0.7}, {(5,): 0.7}))
    against = scores_of(pooled_of({(5,): 0.7}, {(8,): 0.7}))
    assert against[5,] < alone[5,] < both[5,]


def loss(opinions: Sequence[Opinion], bias: float) -> float:
    """Of the text going on 5, 6, 4: in nats, over all children of the parents on its path."""
    silent = math.nan
    events = [
        ((0.75, 0.5), True),
        ((0.125, None), False),
        ((None, 0.25), False),
        ((0.5, silent), True),
    ]
    return sum(
        math.log1p(math.exp(-odds(opinions, bias, *said) if hit else odds(opinions, bias, *said)))
        for said, hit in events
    )


def test_a_verification_moves_every_figure_down_the_slope_of_the_log_loss() -> None:
    drafter = pooled_of(FIRST, SECOND)
    before, bias = [replace(opinion) for opinion in drafter.opinions], drafter.bias
    drafter.propose(request([1, 2, 3]))
    drafter.observe(Observation([1, 2, 3, 5, 6, 4], 3, TokenTree(), (), (), ()))
    tiny = 1e-5

    def slope(part: int, figure: str) -> float:
        def moved(by: float) -> list[Opinion]:
            return [
                replace(one, **{figure: getattr(one, figure) + by}) if place == part else one
                for place, one in enumerate(before)
            ]

        return (loss(moved(tiny), bias) - loss(moved(-tiny), bias)) / (2 * tiny)

    step = (drafter.bias - bias) / -((loss(before, bias + tiny) - loss(before, bias - tiny)) / (2 * tiny))
    assert step == pytest.approx(0.02, rel=1e-3)
    for part, (old, new) in enumerate(zip(before, drafter.opinions, strict=True)):
        found = [after - earlier for earlier, after in zip(astuple(old), astuple(new), strict=True)]
        shares = {"weight": 0.25, "present": 1.0, "absent": 1.0}
        expected = [-step * share * slope(part, figure) for figure, share in shares.items()]
        assert found == pytest.approx(
            expected, rel=2e-2, abs=1e-6
        )  # the second event sees what the first moved


def test_who_says_too_much_is_found_out() -> None:
    drafter = pooled_of({(5,): 0.9}, {(8,): 0.4})
    first = scores_of(drafter)
    context = [1, 2, 3]
    for _ in range(200):
        drafter.propose(request(context))
        context = [*context, 8]
        drafter.observe(Observation(context, 1, TokenTree(), (), (), ()))
    last = scores_of(drafter, context)
    assert first[5,] > first[8,]
    assert last[8,] > 0.8
    assert last[5,] < 0.2


def test_nothing_is_learned_from_rounds_that_another_drafter_proposed() -> None:
    drafter = pooled_of(FIRST, SECOND)
    before = [replace(opinion) for opinion in drafter.opinions]
    drafter.observe(Observation([1, 2, 3, 5], 1, TokenTree(), (), (), ()))
    drafter.propose(request([1, 2, 3]))
    drafter.observe(Observation([1, 2, 3, 4, 5], 1, TokenTree(), (), (), ()))  # of another context
    drafter.propose(request([1, 2, 3]))
    drafter.reset([1, 2])
    drafter.observe(Observation([1, 2, 3, 5], 1, TokenTree(), (), (), ()))
    assert drafter.opinions == before


@given(
    text=st.lists(st.integers(0, 3), min_size=3, max_size=60),
    rounds=st.lists(st.integers(1, 4), max_size=8),
    limit=st.integers(1, 31),
)
def test_whatever_was_learned_paths_are_the_parts_and_no_likelier_than_their_beginnings(
    text: list[int], rounds: list[int], limit: int
) -> None:
    parts = (NGramDrafter(), KatzDrafter())
    drafter = PooledDrafter(parts)
    drafter.reset(text[:-1])
    for fresh in rounds:
        drafter.propose(request(text))
        text = [*text, *text[:fresh]]
        drafter.observe(Observation(text, min(fresh, len(text)), TokenTree(), (), (), ()))
    everything = {
        tuple(tree.path_tokens(node))
        for tree in (part.propose(request(text, limit)) for part in parts)
        for node in range(len(tree))
    }
    tree = drafter.propose(request(text, limit))
    assert {tuple(tree.path_tokens(node)) for node in range(len(tree))} <= everything
    assert len(tree) == min(limit, len(everything))
    for parent, nodes in tree.children().items():
        above = 1.0 if parent == ROOT else tree.scores[parent]
        assert 0.0 < sum(tree.scores[node] for node in nodes) <= above
