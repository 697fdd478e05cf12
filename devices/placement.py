"""Which engine runs which segment, chosen from measured cost curves.

    >>> choice = choose_placement([on_cpu, on_npu], exits=(2, 6, 12), acceptance=Acceptance.usual((2, 6, 12)))
    >>> choice.owners, choice.plan
    ((0, 1, 1), DraftPlan(exit=2, length=4))

An engine that is quick with single rows makes good drafts, one whose further rows are cheap verifies well, and both
may be had in one model. Every placement is tried, each with the way to decode that suits it best; the figure is that of
`skipstone.runtimes.costs`: expected tokens per round over the seconds of a round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from skipstone.bundle import CostCurve
from skipstone.errors import UsageError
from skipstone.runtimes.costs import CostModel

_LONGEST = 16  # drafts in a chain
_MOST_WAYS = 4096
_WORTH = 1.02  # a second engine takes memory, and curves are measured: it must be faster by more than that


@dataclass(frozen=True)
class Acceptance:
    """How likely the whole model takes a draft, given that it took the one before.

    Attributes:
        exits: of a draft by each inner exit.
        text: of a draft copied or counted from text.
        source: what it was read from; "": estimated.
    """

    exits: tuple[float, ...]
    text: float
    source: str = ""

    @classmethod
    def usual(cls, exits: Sequence[int]) -> Acceptance:
        """Where nothing was measured: an exit agrees with the last layer the more, the deeper it lies.

        Args:
            exits: layer counts at the segments' ends, the last one included. A model tuned to exit early has agreed 49 %
                after a sixth of its layers, 63 % after half of them and 84 % after three quarters.
        """
        return cls(tuple(0.35 + 0.6 * exit_layer / exits[-1] for exit_layer in exits[:-1]), 0.4)

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.0%}" for share in self.exits)
        source = f"as recorded in {self.source}" if self.source else "estimated from the exits' depth"
        return f"exits {shares}, text {self.text:.0%}, {source}"


@dataclass(frozen=True)
class DraftPlan:
    """A way to decode: `length` drafts a round from the exit after `exit` layers; 0 layers draft from text, 0 drafts is
    plain decoding.
    """

    exit: int
    length: int


@dataclass(frozen=True)
class Choice:
    """The best placement.

    Attributes:
        owners: index of the curve for each segment.
        drafts: index of the curve whose draft head is used; None: the plan needs none.
        plan: the way to decode that it is best with.
        tokens_per_second: expected then.
    """

    owners: tuple[int, ...]
    drafts: int | None
    plan: DraftPlan
    tokens_per_second: float


def choose_placement(curves: Sequence[CostCurve], exits: Sequence[int], acceptance: Acceptance) -> Choice:
    """The placement with the most expected tokens per second.

    Args:
        curves: of the engines, each for all segments; the first one is kept where another is no better.
        exits: layer counts at the segments' ends, the last one included.
        acceptance: of drafts.

    Raises:
        UsageError: more placements than can be tried.
    """
    ways = len(curves) ** len(exits)
    if ways > _MOST_WAYS:
        raise UsageError(
            f"--place auto: {len(exits)} segments can be placed on {len(curves)} engines in {ways} ways",
            hint="name segments yourself: --place 0=DIR",
        )
    best: tuple[float, Choice] | None = None
    for owners, drafts in _placements(curves, len(exits)):
        costs = CostModel(merged_curve(curves, owners, drafts), exits)
        plan, rate = best_plan(costs, exits, acceptance, with_exits=drafts is not None)
        mixed = len({*owners, *(() if drafts is None else (drafts,))}) > 1
        worth = rate / _WORTH if mixed else rate
        if best is None or worth > best[0] * (1 + 1e-9):
            best = worth, Choice(owners, drafts if plan.exit else None, plan, rate)
    if best is None:
        raise AssertionError("there is at least one placement")
    return best[1]


def best_plan(
    costs: CostModel, exits: Sequence[int], acceptance: Acceptance, *, with_exits: bool = True
) -> tuple[DraftPlan, float]:
    """The way to decode with the most expected tokens per second, and that figure.

    With acceptance probability a, a chain of n drafts gives 1 + a + a² + … + aⁿ tokens (Leviathan et al., arXiv
    2211.17192, section 3.1). Its exit is run n times for one row and its head, once more for the last draft; the
    other layers verify n + 1 rows.

    Args:
        costs: of the placement.
        exits: layer counts at the segments' ends, the last one included.
        acceptance: of drafts.
        with_exits: whether inner exits can draft, which takes a draft head.
    """
    best, rate = DraftPlan(0, 0), 1.0 / costs.plain
    drafters = [(0, acceptance.text)]
    if with_exits:
        drafters += list(zip(exits[:-1], acceptance.exits, strict=True))
    for exit_layer, accepted in drafters:
        tokens, likely = 1.0, 1.0
        for length in range(1, min(_LONGEST, costs.widest - 1) + 1):
            likely *= accepted
            tokens += likely
            seconds = costs.run(exit_layer, exits[-1], length + 1)
            if exit_layer:
                seconds += length * costs.draft(0, exit_layer, 1) + costs.run(0, exit_layer, 1)
            if tokens / seconds > rate:
                best, rate = DraftPlan(exit_layer, length), tokens / seconds
    return best, rate


def merged_curve(curves: Sequence[CostCurve], owners: Sequence[int], drafts: int | None) -> CostCurve:
    """The cost curve of a placement, at all widths that any of its engines was measured at and all of them take."""
    used = {*owners, *(() if drafts is None else (drafts,))}
    widest = min(max(curves[index].widths) for index in used)
    widths = sorted({width for index in used for width in curves[index].widths if width <= widest})

    def at(index: int, seconds: Sequence[float]) -> tuple[float, ...]:
        return tuple(float(x) for x in np.interp(widths, curves[index].widths, seconds))

    return CostCurve(
        widths=tuple(widths),
        segments=tuple(at(owner, curves[owner].segments[segment]) for segment, owner in enumerate(owners)),
        draft_head=() if drafts is None else at(drafts, curves[drafts].draft_head),
        threads=max(curves[index].threads for index in used),
        machine=curves[owners[0]].machine,
    )


def _placements(
    curves: Sequence[CostCurve], num_segments: int
) -> Iterator[tuple[tuple[int, ...], int | None]]:
    """Every placement, those with fewer changes of engine first, with each draft head it could use."""
    everyone = product(range(len(curves)), repeat=num_segments)
    for owners in sorted(everyone, key=lambda owners: (_changes(owners), owners)):
        heads = [index for index in dict.fromkeys(owners) if curves[index].draft_head]
        yield from ((owners, drafts) for drafts in heads)
        if not heads:
            yield owners, None


def _changes(owners: Sequence[int]) -> int:
    return sum(a != b for a, b in pairwise(owners))
