"""The Pareto front, against every pair of points."""

from hypothesis import given
from hypothesis import strategies as st

from skipstone.evaluation.pareto import pareto_front

# few values, so that equal figures are common
_FIGURES = st.one_of(st.integers(0, 4).map(float), st.floats(0, 4, allow_nan=False))


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@given(st.lists(st.tuples(_FIGURES, _FIGURES), max_size=12))
def test_the_front_is_what_no_other_point_dominates(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    assert sorted(front) == [
        index for index, point in enumerate(points) if not any(_dominates(other, point) for other in points)
    ]
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)
