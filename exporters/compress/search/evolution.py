"""EvoPress ([2410.14649](https://arxiv.org/abs/2410.14649)): evolution of one level per unit under a global budget.

    found = evolve(Space(costs), budget=6e6, score=score, schedule=Schedule(), seed=0)

A unit is a part of the model, say a layer; its levels are versions of it, cheapest first. One parent has many children,
each with a few levels switched between units; the children are judged on a few samples, the better of them on more, and
the best becomes the next parent unless the old one is better still. All randomness comes from the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import TypeAlias

from skipstone.errors import UsageError

Candidate: TypeAlias = tuple[int, ...]
Score: TypeAlias = Callable[[Sequence[Candidate], Sequence[int]], Sequence[float]]

_MOST_SWITCHES = 3  # of one mutation, in each of two draws whose smaller one counts (section 3, "mutation")
_TRIES = 20  # per child, for one that was not seen this generation


@dataclass(frozen=True)
class Space:
    """What there is to choose from.

    Attributes:
        costs: by unit, then by level, rising: bytes, seconds or whatever the budget counts.
    """

    costs: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for costs in self.costs:
            if not costs or any(low > high for low, high in pairwise(costs)):
                raise ValueError(f"levels must be sorted by cost, found {costs}")

    def cost(self, candidate: Candidate) -> float:
        """What a candidate costs."""
        return sum(costs[level] for costs, level in zip(self.costs, candidate, strict=True))

    @property
    def lowest(self) -> Candidate:
        """The cheapest candidate."""
        return (0,) * len(self.costs)

    @property
    def highest(self) -> Candidate:
        """The dearest candidate."""
        return tuple(len(costs) - 1 for costs in self.costs)


@dataclass(frozen=True)
class Stage:
    """One selection.

    Attributes:
        samples: how many are drawn to judge by.
        survivors: how many candidates are left.
    """

    samples: int
    survivors: int


@dataclass(frozen=True)
class Schedule:
    """How long a search takes.

    Attributes:
        generations: how many.
        offspring: children of each; as many random candidates compete to be the first parent.
        stages: selections on growing samples; the parent takes part in the last.
        samples: how many there are to draw from.
    """

    generations: int = 30
    offspring: int = 16
    stages: tuple[Stage, ...] = (Stage(1, 4), Stage(4, 1))
    samples: int = 8


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        candidate: the best.
        score: on all samples.
        cost: of it.
        history: by generation, the parent's score on the samples of the last stage.
        evaluations: candidates judged, times samples.
    """

    candidate: Candidate
    score: float
    cost: float
    history: tuple[float, ...]
    evaluations: int


def evolve(
    space: Space,
    budget: float,
    score: Score,
    schedule: Schedule,
    *,
    seed: int,
    starts: Iterable[Candidate] = (),
) -> Found:
    """Search for the candidate with the lowest score within a budget.

    Args:
        space: what there is to choose from.
        budget: no candidate that is judged costs more.
        score: the scores of candidates on samples by their numbers; lower is better.
        schedule: how long.
        seed: of all draws.
        starts: candidates to begin with, beside random ones; those over the budget are brought under it.

    Raises:
        UsageError: even the cheapest levels cost more than the budget.
    """
    cheapest = space.cost(space.lowest)
    if cheapest > budget:
        raise UsageError(
            f"search: the smallest there is costs {cheapest:.6g}, more than the budget of {budget:.6g}",
            hint="raise the target, or give smaller levels",
        )
    random, judge = Random(seed), _Judge(score)
    first = [*(_within(start, space, budget, random) for start in starts), _uniform(space, budget, random)]
    first += [_filled(space.lowest, space, budget, random) for _ in range(schedule.offspring)]
    parent, _ = _select(list(dict.fromkeys(first)), None, schedule, judge, random)
    history = []
    for _ in range(schedule.generations):
        children = _children(parent, space, budget, schedule.offspring, random)
        parent, best = _select(children, parent, schedule, judge, random)
        history.append(best)
    final = judge([parent], range(schedule.samples))[0]
    return Found(parent, final, space.cost(parent), tuple(history), judge.evaluations)


@dataclass
class _Judge:
    """Scores candidates, none twice on the same samples."""

    score: Score
    known: dict[tuple[Candidate, tuple[int, ...]], float] = field(default_factory=dict)
    evaluations: int = 0

    def __call__(self, candidates: Sequence[Candidate], samples: Sequence[int]) -> list[float]:
        drawn = tuple(samples)
        new = [candidate for candidate in candidates if (candidate, drawn) not in self.known]
        for candidate, score in zip(new, self.score(new, drawn) if new else (), strict=True):
            self.known[candidate, drawn] = score
        self.evaluations += len(new) * len(drawn)
        return [self.known[candidate, drawn] for candidate in candidates]


def _select(
    candidates: list[Candidate], parent: Candidate | None, schedule: Schedule, judge: _Judge, random: Random
) -> tuple[Candidate, float]:
    """The best of some candidates, and its score: fewer and fewer of them on more and more samples."""
    last = len(schedule.stages) - 1
    for number, stage in enumerate(schedule.stages):
        if number == last and parent is not None:
            candidates = [parent, *candidates]  # first, so that it wins a draw
        if not candidates:  # the parent has no neighbours
            continue
        samples = sorted(random.sample(range(schedule.samples), min(stage.samples, schedule.samples)))
        scores = judge(candidates, samples)
        order = sorted(range(len(candidates)), key=lambda index: scores[index])
        survivors = order[: 1 if number == last else stage.survivors]
        candidates, best = [candidates[index] for index in survivors], scores[survivors[0]]
    return candidates[0], best


def _children(parent: Candidate, space: Space, budget: float, count: int, random: Random) -> list[Candidate]:
    """Up to `count` children, no two alike and none like the parent."""
    children: dict[Candidate, None] = {}
    for _ in range(_TRIES * count):
        child = _mutated(parent, space, budget, random)
        if child != parent:
            children[child] = None
        if len(children) == count:
            break
    return list(children)


def _mutated(parent: Candidate, space: Space, budget: float, random: Random) -> Candidate:
    """A child: a few times one unit goes up a level, and others go down until the budget is kept."""
    child = parent
    for _ in range(min(random.randint(1, _MOST_SWITCHES), random.randint(1, _MOST_SWITCHES))):
        able = [unit for unit, level in enumerate(child) if level + 1 < len(space.costs[unit])]
        if able:
            raised = random.choice(able)
            switched = _within(_moved(child, raised, 1), space, budget, random, spared=raised)
            child = child if space.cost(switched) > budget else switched
    return _filled(child, space, budget, random)


def _within(
    candidate: Candidate, space: Space, budget: float, random: Random, spared: int | None = None
) -> Candidate:
    """The candidate with units drawn at random, the spared one apart, lowered level by level until it keeps the budget
    or nothing is left to lower.
    """
    while space.cost(candidate) > budget:
        able = [unit for unit, level in enumerate(candidate) if level > 0 and unit != spared]
        if not able:
            break
        candidate = _moved(candidate, random.choice(able), -1)
    return candidate


def _filled(candidate: Candidate, space: Space, budget: float, random: Random) -> Candidate:
    """The candidate with units drawn at random raised level by level for as long as any raise keeps the budget."""
    cost = space.cost(candidate)
    while True:
        raises = [
            (unit, costs[level + 1] - costs[level])
            for unit, (costs, level) in enumerate(zip(space.costs, candidate, strict=True))
            if level + 1 < len(costs) and cost + costs[level + 1] - costs[level] <= budget
        ]
        if not raises:
            return candidate
        unit, more = random.choice(raises)
        candidate, cost = _moved(candidate, unit, 1), cost + more


def _uniform(space: Space, budget: float, random: Random) -> Candidate:
    """The highest level that all units can have, and what then still fits."""
    level, candidate = 0, space.lowest
    while candidate != space.highest:
        level += 1
        raised = tuple(min(level, highest) for highest in space.highest)
        if space.cost(raised) > budget:
            break
        candidate = raised
    return _filled(candidate, space, budget, random)


def _moved(candidate: Candidate, unit: int, step: int) -> Candidate:
    return (*candidate[:unit], candidate[unit] + step, *candidate[unit + 1 :])


def smallest(
    space: Space, bound: float, search: Callable[[float, Sequence[Candidate]], Found], rounds: int = 6
) -> Found:
    """The cheapest of several searches whose score is within a bound; the budget is halved in on.

    Args:
        space: what there is to choose from.
        bound: of the score.
        search: `evolve` for a budget, from candidates found before.
        rounds: searches at most.

    Raises:
        UsageError: the dearest candidate is beyond the bound already.
    """
    low, high = space.cost(space.lowest), space.cost(space.highest)
    best = search(high, ())
    if best.score > bound:
        raise UsageError(
            f"search: even the best levels there are diverge by {best.score:.4g}, more than max_kl = {bound:.4g}",
            hint="raise max_kl, or give larger levels",
        )
    for _ in range(rounds):
        budget = (low + high) / 2
        found = search(budget, (best.candidate,))
        if found.score <= bound:
            best, high = found, found.cost
        else:
            low = budget
    return best
