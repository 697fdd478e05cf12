"""Rows from samples, against figures worked out by hand."""

import pytest

from skipstone.benchmark.lossless import Agreement
from skipstone.benchmark.measure import Progress, Sample, Series, measure_interleaved
from skipstone.benchmark.rows import make_row
from skipstone.inputs import ModelInput


def sample(count: int, seconds: float, **more: object) -> Sample:
    return Sample(tuple(range(count)), 0.25, seconds, **({"rounds": count - 1} | more))  # type: ignore[arg-type]


# Two prompts, three repeats. Medians per token: plain 1.0 and 2.0, fast 0.5 and 2.5.
PLAIN = Series(
    "plain",
    (
        (sample(11, 10.0), sample(5, 8.0)),
        (sample(11, 90.0), sample(5, 8.0)),
        (sample(11, 8.0), sample(5, 4.0)),
    ),
)
DRAFTS = {"rounds": 4, "drafted": 10, "accepted": 6, "predicted_seconds": 4.0, "bytes_read": 2 * 10**9}
FAST = Series(
    "fast",
    (
        (sample(11, 5.0, **DRAFTS), sample(5, 10.0, **DRAFTS)),
        (sample(11, 5.0, **DRAFTS), sample(5, 10.0, **DRAFTS)),
        (sample(11, 50.0, **DRAFTS), sample(5, 10.0, **DRAFTS)),
    ),
)


def test_a_strategys_row_is_what_the_definitions_say() -> None:
    row = make_row(FAST, PLAIN, Agreement(1, 1, 0), 0.5, 12.5)
    assert row.tokens_per_second == pytest.approx(42 / 90)
    # 10 tokens at 1.0 and 4 at 2.0, over 10 at 0.5 and 4 at 2.5
    assert row.speedup == pytest.approx(18 / 15)
    assert row.prompt_speedups == pytest.approx((2.0, 0.8))
    assert row.min_speedup == pytest.approx(0.8)
    assert row.tokens_per_round == pytest.approx(42 / 24)
    assert row.acceptance_rate == pytest.approx(0.6)
    assert row.ttft_ms == pytest.approx(250)
    assert row.gigabytes_per_second == pytest.approx(12 / 90)
    assert row.bound == pytest.approx(42 * 0.5 / 24)
    assert row.bound_share == pytest.approx((18 / 15) / (42 * 0.5 / 24))
    assert (row.identical, row.near_tie_divergences, row.other_divergences) == (1, 1, 0)
    assert row.peak_rss_mb == 12.5


def test_the_bound_is_tokens_per_round_times_plains_cost_over_the_mean_rounds_cost() -> None:
    row = make_row(FAST, PLAIN, None, 0.5, None)
    mean_round = 6 * 4.0 / 24
    assert row.bound == pytest.approx(row.tokens_per_round * 0.5 / mean_round)


def test_plain_against_itself_is_one() -> None:
    row = make_row(PLAIN, PLAIN, None, 1.0, None)
    assert (row.speedup, row.min_speedup, row.tokens_per_round) == (1.0, 1.0, 1.0)
    assert row.acceptance_rate == 0.0


def test_what_is_not_known_is_none() -> None:
    row = make_row(PLAIN, PLAIN, None, 1.0, None)
    for name in ("identical", "near_tie_divergences", "other_divergences", "peak_rss_mb", "bound"):
        assert getattr(row, name) is None, name
    assert row.bound_share is None
    assert row.gigabytes_per_second is None


def test_a_prompt_that_ends_at_its_first_token_is_left_out_of_the_speedup() -> None:
    short = Series("fast", ((sample(11, 5.0), sample(1, 0.0)),))
    row = make_row(short, Series("plain", ((sample(11, 10.0), sample(1, 0.0)),)), None, 1.0, None)
    assert row.speedup == pytest.approx(2.0)
    assert row.prompt_speedups == (2.0, None)


def test_strategies_take_turns_and_every_repeat_starts_afresh() -> None:
    log: list[tuple[str, int, int]] = []
    made: list[str] = []

    def make_runner(strategy: str):  # type: ignore[no-untyped-def]
        made.append(strategy)
        number = made.count(strategy)

        def run(given: ModelInput) -> Sample:
            log.append((strategy, number, given.prompt[0]))
            return sample(given.prompt[0] + 1, 1.0)

        return run

    told: list[Progress] = []
    inputs = [ModelInput((1,)), ModelInput((2,))]
    found = measure_interleaved(make_runner, ["a", "b", "c"], inputs, 2, told.append)
    assert made == ["a", "b", "c"] * 2
    assert log[:6] == [("a", 1, 1), ("b", 1, 1), ("c", 1, 1), ("b", 1, 2), ("c", 1, 2), ("a", 1, 2)]
    assert sorted(log) == sorted((s, n, p) for s in "abc" for n in (1, 2) for p in (1, 2))
    assert [series.strategy for series in found] == ["a", "b", "c"]
    assert all(
        [[len(s.tokens) for s in passed] for passed in series.samples] == [[2, 3]] * 2 for series in found
    )
    assert [(p.done, p.total) for p in told] == [(n, 12) for n in range(12)]
