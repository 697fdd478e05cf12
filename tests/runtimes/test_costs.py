"""The cost model: measured points are met, the choice of drafts is the best by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone.bundle import CostCurve
from skipstone.runtimes.costs import CostModel
from tests.runtimes.toy_engine import ToyEngine, toy_costs

SECONDS = st.floats(1e-5, 1e-1)


@st.composite
def models(draw: st.DrawFn) -> CostModel:
    widths = (1, 4, 16)
    curve = CostCurve(
        widths=widths,
        segments=tuple(tuple(draw(SECONDS) for _ in widths) for _ in range(3)),
        draft_head=tuple(draw(SECONDS) for _ in widths),
        threads=1,
        machine="any",
    )
    return CostModel(curve, (2, 4, 6))


@given(
    costs=models(),
    scores=st.lists(st.floats(0, 1), max_size=24).map(lambda s: sorted(s, reverse=True)),
    spent=st.floats(0, 1e-2),
    start=st.sampled_from([0, 2, 4]),
    limit=st.integers(0, 31),
    data=st.data(),
)
def test_the_best_count_maximises_expected_tokens_per_second(
    costs: CostModel, scores: list[float], spent: float, start: int, limit: int, data: st.DataObject
) -> None:
    behind = data.draw(st.just([]) | st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    count, rate = costs.best_count(scores, spent, start=start, limit=limit, behind=behind)

    def by_formula(n: int) -> float:
        waiting = sum(behind[:n])
        catching_up = costs.run(0, start, waiting) if waiting else 0.0
        return (1.0 + sum(scores[:n])) / (spent + catching_up + costs.run(start, 6, n + 1))

    rates = [by_formula(n) for n in range(min(limit, len(scores)) + 1)]
    assert 0 <= count <= min(limit, len(scores))
    assert rate == pytest.approx(max(rates))
    assert rates[count] == pytest.approx(rate)


@given(
    costs=models(),
    scores=st.lists(st.floats(0, 1), max_size=24).map(lambda s: sorted(s, reverse=True)),
    spent=st.floats(0, 1e-2),
    ceiling=st.floats(0, 1e-1),
)
def test_of_the_rounds_within_the_ceiling_the_best_is_planned(
    costs: CostModel, scores: list[float], spent: float, ceiling: float
) -> None:
    """What was spent on drafting counts; more drafts than a count that is too dear are not looked at."""
    count, rate = costs.best_count(scores, spent, limit=31, ceiling=ceiling)
    seconds = [spent + costs.run(0, 6, n + 1) for n in range(len(scores) + 1)]
    within = 0
    while within < len(scores) and seconds[within + 1] <= ceiling:
        within += 1
    rates = [(1.0 + sum(scores[:n])) / seconds[n] for n in range(within + 1)]
    assert count <= within
    assert rate == pytest.approx(max(rates))
    assert rates[count] == pytest.approx(rate)


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_a_draft_below_the_least_score_never_pays(slope: float) -> None:
    costs = toy_costs(ToyEngine(), slope=slope)
    unlikely = [0.99 * costs.least_score] * 31
    assert costs.best_count(unlikely, 0.0, limit=31)[0] == 0
    assert costs.least_score == pytest.approx(0.5 * slope)


def test_measured_widths_cost_what_was_measured_and_others_lie_between() -> None:
    curve = CostCurve(
        widths=(1, 4, 8),
        segments=((1.0, 2.0, 4.0), (3.0, 3.0, 9.0)),
        draft_head=(0.5, 0.6, 0.8),
        threads=1,
        machine="m",
    )
    costs = CostModel(curve, (2, 12))
    assert [costs.run(0, 2, n) for n in (1, 4, 8)] == [1.0, 2.0, 4.0]
    assert costs.run(0, 12, 6) == pytest.approx(3.0 + 6.0)
    assert costs.run(2, 12, 8) == 9.0
    assert costs.run(2, 2, 5) == 0.0
    assert costs.run(0, 2, 16) == pytest.approx(8.0)
    assert costs.draft(0, 2, 4) == pytest.approx(2.6)
    assert costs.draft(0, 12, 4) == costs.run(0, 12, 4), "the last exit needs no draft head"
    assert costs.plain == 4.0


def test_sure_drafts_are_all_verified_where_width_is_free_and_none_where_it_costs_full_price() -> None:
    engine = ToyEngine()
    assert toy_costs(engine, slope=0.0).best_count([0.9] * 10, 0.0, limit=31)[0] == 10
    assert toy_costs(engine, slope=1.0).best_count([0.9] * 10, 0.0, limit=31)[0] == 0
