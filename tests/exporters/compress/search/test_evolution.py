"""The search on problems whose best answer is known."""

import itertools
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipstone.errors import UsageError
from skipstone.exporters.compress.search.evolution import (
    Candidate,
    Found,
    Schedule,
    Space,
    Stage,
    evolve,
    smallest,
)

_COSTS = ((1.0, 2.0, 4.0, 8.0), (1.0, 2.0, 4.0, 8.0), (2.0, 4.0, 8.0, 16.0)) * 2
_SCHEDULE = Schedule(generations=40, offspring=12, stages=(Stage(1, 4), Stage(4, 1)), samples=4)


class Problem:
    """Losses by unit and level, and losses of pairs that are low at once; a sample adds noise of its own."""

    def __init__(self, costs: Sequence[Sequence[float]], seed: int, noise: float = 0.0) -> None:
        random = Random(seed)
        self.space = Space(tuple(tuple(row) for row in costs))
        self.losses = [sorted((random.random() for _ in row), reverse=True) for row in costs]
        self.pairs = {
            pair: random.random() / 2
            for pair in itertools.combinations(range(len(costs)), 2)
            if random.random() < 0.3
        }
        self.noise, self.seed = noise, seed
        self.judged: list[Candidate] = []

    def loss(self, candidate: Candidate, sample: int = 0) -> float:
        single = sum(self.losses[unit][level] for unit, level in enumerate(candidate))
        double = sum(loss for (a, b), loss in self.pairs.items() if candidate[a] == candidate[b] == 0)
        return single + double + self.noise * Random(f"{self.seed} {candidate} {sample}").gauss(0, 1)

    def score(self, candidates: Sequence[Candidate], samples: Sequence[int]) -> list[float]:
        self.judged += candidates
        return [
            sum(self.loss(candidate, sample) for sample in samples) / len(samples) for candidate in candidates
        ]

    def best(self, budget: float) -> Candidate:
        every = itertools.product(*(range(len(row)) for row in self.space.costs))
        return min((c for c in every if self.space.cost(c) <= budget), key=self.loss)


@pytest.mark.parametrize("budget", [9.0, 14.0, 20.0, 33.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_all_candidates_is_found(budget: float, seed: int) -> None:
    problem = Problem(_COSTS, seed)
    found = evolve(problem.space, budget, problem.score, _SCHEDULE, seed=seed)
    assert problem.loss(found.candidate) == pytest.approx(problem.loss(problem.best(budget)))
    assert found.score == pytest.approx(problem.loss(found.candidate))
    assert found.cost == problem.space.cost(found.candidate)


@pytest.mark.parametrize("dropped", [3, 6, 9])
def test_layers_that_can_be_left_out_are_found_among_twelve(dropped: int) -> None:
    problem = Problem(((0.0, 1.0),) * 12, seed=dropped)
    found = evolve(problem.space, 12.0 - dropped, problem.score, _SCHEDULE, seed=0)
    assert found.candidate == problem.best(12.0 - dropped)


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=5), min_size=1, max_size=6),
    st.integers(0, 120),
    st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_nothing_that_is_judged_is_over_the_budget(costs: list[list[int]], extra: int, seed: int) -> None:
    problem = Problem([sorted(map(float, row)) for row in costs], seed)
    budget = problem.space.cost(problem.space.lowest) + extra
    found = evolve(
        problem.space, budget, problem.score, Schedule(4, 5, (Stage(1, 2), Stage(2, 1)), 2), seed=seed
    )
    assert all(problem.space.cost(candidate) <= budget for candidate in problem.judged)
    assert found.cost <= budget


def test_the_same_seed_gives_the_same_search_and_another_seed_another() -> None:
    first, second, third = (Problem(_COSTS, 1, noise=0.2) for _ in range(3))
    found = [
        evolve(problem.space, 20.0, problem.score, _SCHEDULE, seed=seed)
        for problem, seed in ((first, 5), (second, 5), (third, 6))
    ]
    assert found[0] == found[1]
    assert first.judged == second.judged
    assert first.judged != third.judged


def test_what_was_good_before_is_a_start_even_where_it_costs_too_much_now() -> None:
    problem = Problem(_COSTS, 2)
    best, none = problem.best(20.0), Schedule(generations=0, offspring=1, samples=1, stages=(Stage(1, 1),))
    assert evolve(problem.space, 20.0, problem.score, none, seed=0, starts=(best,)).candidate == best
    cheaper = evolve(problem.space, 12.0, problem.score, none, seed=0, starts=(best,))
    assert cheaper.cost <= 12.0


def test_more_samples_decide_where_few_mislead() -> None:
    """With noise that one sample does not show through, the last stage must find the better ones."""
    problem = Problem(((0.0, 1.0),) * 12, seed=4, noise=0.3)
    true = Problem(((0.0, 1.0),) * 12, seed=4)
    few = Schedule(20, 12, (Stage(1, 1),), 64)
    more = Schedule(20, 12, (Stage(2, 6), Stage(64, 1)), 64)
    losses = [
        sum(
            true.loss(evolve(problem.space, 6.0, problem.score, schedule, seed=seed).candidate)
            for seed in range(5)
        )
        for schedule in (few, more)
    ]
    assert losses[1] < losses[0]


def test_a_budget_below_the_cheapest_levels_is_refused() -> None:
    problem = Problem(_COSTS, 0)
    with pytest.raises(UsageError, match="the smallest there is costs 8, more than the budget of 7"):
        evolve(problem.space, 7.0, problem.score, _SCHEDULE, seed=0)


def test_the_smallest_within_a_bound_is_found() -> None:
    problem = Problem(_COSTS, 3)

    def search(budget: float, starts: Sequence[Candidate]) -> Found:
        return evolve(problem.space, budget, problem.score, _SCHEDULE, seed=0, starts=starts)

    bound = problem.loss(problem.best(20.0)) + 1e-9
    found = smallest(problem.space, bound, search, rounds=12)
    assert found.score <= bound
    every = itertools.product(*(range(len(row)) for row in problem.space.costs))
    assert found.cost == min(problem.space.cost(c) for c in every if problem.loss(c) <= bound)
    with pytest.raises(UsageError, match="more than max_kl"):
        smallest(problem.space, problem.loss(problem.space.highest) - 0.01, search)


def test_levels_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="sorted by cost"):
        Space(((2.0, 1.0),))
