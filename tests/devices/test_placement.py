"""Placements chosen from artificial curves whose best answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest

from skipstone.bundle import CostCurve
from skipstone.devices.placement import (
    Acceptance,
    Choice,
    DraftPlan,
    best_plan,
    choose_placement,
    merged_curve,
)
from skipstone.errors import UsageError
from skipstone.runtimes.costs import CostModel

EXITS = (2, 6, 12)
WIDTHS = (1, 2, 4, 8, 16)
LIKELY = Acceptance(exits=(0.8, 0.85), text=0.1)


def curve(
    *parts: tuple[float, float], head: float | None = 0.05, widths: Sequence[int] = WIDTHS
) -> CostCurve:
    """Milliseconds of one row, and of each further one, by segment."""
    return CostCurve(
        widths=tuple(widths),
        segments=tuple(tuple((one + more * (width - 1)) * 1e-3 for width in widths) for one, more in parts),
        draft_head=() if head is None else (head * 1e-3,) * len(widths),
        threads=1,
        machine="made up",
    )


# a processor: quick with one row, each further one costs as much; an accelerator: slow to start, further rows are free
PROCESSOR = curve((1, 1), (4, 4), (8, 8))
ACCELERATOR = curve((3, 0), (5, 0), (9, 0))


def test_drafts_go_to_what_is_quick_with_one_row_and_verification_to_what_takes_many() -> None:
    choice = choose_placement([PROCESSOR, ACCELERATOR], EXITS, LIKELY)
    assert choice.owners == (0, 1, 1)
    assert choice.drafts == 0
    assert choice.plan.exit == 2
    assert choice.plan.length > 2


def test_the_reverse_is_found_too() -> None:
    """Here the accelerator is the quick one, and does not hold the large segments well."""
    small, processor = curve((0.2, 0), (20, 0), (40, 0)), curve((2, 0.2), (4, 0.4), (8, 0.8))
    choice = choose_placement([processor, small], EXITS, LIKELY)
    assert choice.owners == (1, 0, 0)
    assert choice.drafts == 1
    assert choice.plan.exit == 2


def test_the_order_of_the_candidates_does_not_matter() -> None:
    one = choose_placement([PROCESSOR, ACCELERATOR], EXITS, LIKELY)
    other = choose_placement([ACCELERATOR, PROCESSOR], EXITS, LIKELY)
    assert other.owners == (1, 0, 0)
    assert other.tokens_per_second == pytest.approx(one.tokens_per_second)


def test_an_engine_that_is_better_everywhere_runs_everything() -> None:
    slow = curve((2, 2), (8, 8), (16, 16))
    assert choose_placement([slow, PROCESSOR], EXITS, LIKELY).owners == (1, 1, 1)
    assert choose_placement([PROCESSOR, slow], EXITS, LIKELY).owners == (0, 0, 0)


def test_equal_engines_leave_everything_where_it_is() -> None:
    assert choose_placement([PROCESSOR, PROCESSOR], EXITS, LIKELY).owners == (0, 0, 0)


def test_a_gain_within_what_measurements_vary_is_no_reason_for_a_second_engine() -> None:
    barely = curve((1, 1), (3.9, 3.9), (8, 8))
    assert choose_placement([PROCESSOR, barely], EXITS, Acceptance((0.0, 0.0), 0.0)).owners in (
        (0, 0, 0),
        (1, 1, 1),
    )
    clearly = curve((9, 9), (1, 1), (18, 18))
    assert choose_placement([PROCESSOR, clearly], EXITS, Acceptance((0.0, 0.0), 0.0)).owners == (0, 1, 0)


def test_hopeless_drafts_leave_the_cost_of_one_row_to_decide() -> None:
    choice = choose_placement([PROCESSOR, ACCELERATOR], EXITS, Acceptance((0.0, 0.0), 0.0))
    assert choice == Choice((0, 0, 0), None, DraftPlan(0, 0), pytest.approx(1000 / 13))


def test_a_bundle_without_a_draft_head_has_the_other_ones() -> None:
    headless = curve((1, 1), (4, 4), (8, 8), head=None)
    choice = choose_placement([headless, ACCELERATOR], EXITS, LIKELY)
    assert choice.drafts in (None, 1)
    neither = choose_placement([headless, curve((3, 0), (5, 0), (9, 0), head=None)], EXITS, LIKELY)
    assert neither.drafts is None
    assert neither.plan.exit == 0


def test_the_search_finds_what_trying_everything_by_hand_finds() -> None:
    """The oracle adds up rounds itself, from the tables alone."""
    curves, acceptance = (
        [PROCESSOR, ACCELERATOR, curve((1.5, 0.3), (5, 1), (7, 2))],
        Acceptance((0.6, 0.7), 0.3),
    )

    def seconds(owner: int, segment: int, width: int) -> float:
        one, two = curves[owner].segments[segment][:2]
        return one + (two - one) * (width - 1)  # the curves are straight

    def rate(owners: tuple[int, ...], head: int, stop: int, length: int, likely: float) -> float:
        tokens = sum(likely**power for power in range(length + 1))
        drafting = sum(seconds(owners[k], k, 1) for k in range(stop))
        verifying = sum(seconds(owners[k], k, length + 1) for k in range(stop, 3))
        heads = length * curves[head].draft_head[0] if stop else 0.0
        return tokens / ((length + 1) * drafting + heads + verifying)

    plain = {o: 1 / sum(seconds(o[k], k, 1) for k in range(3)) for o in product(range(3), repeat=3)}
    found = {
        (owners, stop, length): rate(owners, owners[0], stop, length, likely)
        for owners in plain
        for stop, likely in enumerate((acceptance.text, *acceptance.exits))
        for length in range(1, 16)
    }
    expected = max([*found.values(), *plain.values()])
    choice = choose_placement(curves, EXITS, acceptance)
    assert choice.tokens_per_second == pytest.approx(expected)
    stop = (0, *EXITS).index(choice.plan.exit)
    assert found[choice.owners, stop, choice.plan.length] == pytest.approx(expected)


def test_text_drafts_are_verified_by_the_whole_model() -> None:
    costs = CostModel(ACCELERATOR, EXITS)
    plan, rate = best_plan(costs, EXITS, Acceptance((0.0, 0.0), 0.5))
    assert plan == DraftPlan(0, 15)
    assert rate == pytest.approx(sum(0.5**power for power in range(16)) / 17e-3)


def test_a_merged_curve_has_every_width_that_all_engines_take() -> None:
    narrow = curve((1, 1), (1, 1), (1, 1), widths=(1, 3, 8))
    merged = merged_curve([PROCESSOR, narrow], (0, 1, 0), 1)
    assert merged.widths == (1, 2, 3, 4, 8)
    assert merged.segments[0] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 8e-3])
    assert merged.segments[1] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 8e-3])
    assert len(merged.draft_head) == 5
    assert merged_curve([PROCESSOR, narrow], (0, 0, 0), None).widths == WIDTHS


def test_more_placements_than_can_be_tried_are_refused() -> None:
    many = curve(*[(1, 1)] * 13)
    with pytest.raises(UsageError, match=r"13 segments can be placed on 2 engines in 8192 ways"):
        choose_placement([many, many], tuple(range(1, 14)), Acceptance((0.5,) * 12, 0.5))


def test_without_figures_deeper_exits_are_trusted_more() -> None:
    usual = Acceptance.usual((2, 6, 12))
    assert 0 < usual.exits[0] < usual.exits[1] < 1
    assert len(usual.exits) == 2
