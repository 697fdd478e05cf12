"""How many ranks every matrix gets of a budget for all: each step goes where a weight saves most error."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from skipstone.errors import UsageError


@dataclass(frozen=True)
class Choice:
    """A rank that a matrix can have.

    Attributes:
        rank: None: it stays whole.
        weights: that it takes.
        whole: that the matrix itself has.
        lost: what the model loses by it, in a unit that all matrices share.
    """

    rank: int | None
    weights: int
    whole: int
    lost: float


def choices(outputs: int, inputs: int, lost: Sequence[float], multiple: int) -> tuple[Choice, ...]:
    """What a matrix can be: pairs that are smaller than it, and itself.

    Args:
        outputs: its rows.
        inputs: its columns.
        lost: by rank from 0 on, what the model loses.
        multiple: ranks come in multiples of it.
    """
    whole = outputs * inputs
    ranks = range(multiple, min(outputs, inputs) + 1, multiple)
    pairs = (Choice(rank, rank * (outputs + inputs), whole, float(lost[rank])) for rank in ranks)
    return (*(pair for pair in pairs if pair.weights < whole), Choice(None, whole, whole, 0.0))


def allot(options: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice]:
    """A choice for every matrix, so that together they take no more than a share of all their weights.

    From the least that each can be, the step that saves most loss per weight is taken, over and over, as long as it
    fits. Steps may pass ranks over: a matrix that stays whole loses nothing, which can be worth more than its last
    ranks.

    Args:
        options: by matrix, in ascending order of weights; the last is the whole.
        budget: 0 … 1.

    Raises:
        UsageError: less than the least that every matrix can be.
    """
    chosen = {name: found[0] for name, found in options.items()}
    whole = sum(choice.whole for choice in chosen.values())
    left = int(budget * whole) - sum(choice.weights for choice in chosen.values())
    if left < 0:
        raise UsageError(
            f"low_rank: budget={budget} is less than the lowest ranks take: {budget - left / whole:.3f}",
            hint="keep more, factor fewer places, or give a lower multiple",
        )
    order = {name: number for number, name in enumerate(options)}
    waiting: list[tuple[float, int, str, Choice]] = []

    def propose(name: str) -> None:
        """The best step that a matrix can take with what is left."""
        now = chosen[name]
        steps = [
            ((now.lost - step.lost) / (step.weights - now.weights), step)
            for step in options[name]
            if 0 < step.weights - now.weights <= left
        ]
        if steps:
            worth, step = max(steps, key=lambda one: one[0])
            heapq.heappush(waiting, (-worth, order[name], name, step))

    for name in options:
        propose(name)
    while waiting:
        _, _, name, step = heapq.heappop(waiting)
        added = step.weights - chosen[name].weights
        if added <= left:
            chosen[name], left = step, left - added
        propose(name)
    return chosen
