"""Calibration's tests: p-values against scipy, and the guarantee over many draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, entropy

from skipstone.errors import UsageError
from skipstone.runtimes.risk import Guarantee, RiskBound, Verdict, boldest, hoeffding_bentkus, walk

BOUND = RiskBound(max_loss=0.1, confidence=0.9)
DRAWS, SAMPLES = 1500, 150


def straight_p_value(losses: Sequence[float], bound: float) -> float:
    n, mean = len(losses), float(np.mean(losses))
    r = min(mean, bound)
    hoeffding = math.exp(-n * float(entropy([r, 1 - r], [bound, 1 - bound])))
    return min(1.0, hoeffding, math.e * float(binom.cdf(math.ceil(math.fsum(losses)), n, bound)))


@given(
    losses=st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=400),
    bound=st.floats(0.001, 0.9),
)
@settings(max_examples=100)
def test_the_p_value_is_the_smaller_of_hoeffdings_and_bentkus(losses: list[float], bound: float) -> None:
    found = hoeffding_bentkus(losses, bound)
    assert found == pytest.approx(straight_p_value(losses, bound), rel=1e-9, abs=1e-300)


def test_both_terms_are_needed() -> None:
    few, none = [1.0] * 2 + [0.0] * 198, [0.0] * 200
    bentkus = math.e * float(binom.cdf(2, 200, 0.1))
    assert hoeffding_bentkus(few, 0.1) == pytest.approx(bentkus)
    assert hoeffding_bentkus(none, 0.1) == pytest.approx(0.9**200)  # Hoeffding's, e times smaller


def test_a_loss_at_the_bound_or_over_it_is_never_significant() -> None:
    assert hoeffding_bentkus([0.1] * 1000, 0.1) > 0.9
    assert hoeffding_bentkus([1.0] * 10, 0.1) == 1.0


@pytest.mark.parametrize("losses", [[], [0.5, 1.1], [-0.1], [float("nan")]])
def test_what_are_no_losses_is_refused(losses: list[float]) -> None:
    with pytest.raises(UsageError, match=r"in \[0, 1\]"):
        hoeffding_bentkus(losses, 0.1)


# --- the guarantee ---

Rule = Callable[[NDArray[np.float64]], int]


def fixed_sequence(losses: NDArray[np.float64]) -> int:
    """Index of the setting that the walk chooses, -1 for none; losses [settings, samples]."""
    verdicts = walk(range(len(losses)), lambda value: losses[int(value)].tolist(), BOUND)
    chosen = boldest(verdicts)
    return -1 if chosen is None else int(chosen)


def best_on_the_samples(losses: NDArray[np.float64]) -> int:
    return int(max(np.flatnonzero(losses.mean(axis=1) <= BOUND.max_loss), default=-1))


def each_for_itself(losses: NDArray[np.float64]) -> int:
    """Every setting is tested at the whole level, and those that fail are stepped over."""
    p_values = np.array([hoeffding_bentkus(row.tolist(), BOUND.max_loss) for row in losses])
    return int(max(np.flatnonzero(p_values <= BOUND.level), default=-1))


def violations(rule: Rule, risks: Sequence[float], *, coupled: bool, draws: int = DRAWS) -> float:
    """Share of draws of the samples in which a rule's choice has an expected loss over the bound.

    Losses are 0 or 1, the hardest case; coupled: a text that suffers from one setting does from all bolder ones.
    """
    random, limits = np.random.default_rng(0), np.array(risks)[:, None]
    failed = 0
    for _ in range(draws):
        uniform = random.random((1 if coupled else len(risks), SAMPLES))
        chosen = rule((uniform < limits).astype(np.float64))
        failed += chosen >= 0 and risks[chosen] > BOUND.max_loss
    return failed / draws


RISING = (0.01, 0.03, 0.06, 0.101, 0.11, 0.12, 0.14, 0.2, 0.5)
JUST_OVER = (0.02, *[0.101] * 30)
DIPPING = (0.02, 0.101, 0.03, 0.101, 0.03, 0.101, 0.3)  # the loss need not rise along the walk


@pytest.mark.parametrize("risks", [RISING, JUST_OVER, DIPPING])
@pytest.mark.parametrize("coupled", [True, False])
def test_the_chosen_setting_breaks_the_bound_no_oftener_than_stated(
    risks: tuple[float, ...], coupled: bool
) -> None:
    assert violations(fixed_sequence, risks, coupled=coupled) <= BOUND.level


def test_the_guarantee_is_not_bought_by_choosing_nothing() -> None:
    random = np.random.default_rng(1)
    limits = np.array(RISING)[:, None]
    chosen = [fixed_sequence((random.random((1, SAMPLES)) < limits).astype(float)) for _ in range(200)]
    assert np.mean([index >= 1 for index in chosen]) > 0.9
    assert np.mean([index >= 2 for index in chosen]) > 0.2


def test_the_boldest_setting_that_looked_good_breaks_the_bound_far_oftener() -> None:
    assert violations(best_on_the_samples, RISING, coupled=True, draws=300) > 3 * BOUND.level


def test_tests_without_a_sequence_break_the_bound_oftener_than_stated() -> None:
    assert violations(each_for_itself, JUST_OVER, coupled=False, draws=300) > 2 * BOUND.level


def test_the_walk_ends_where_the_bound_cannot_be_shown() -> None:
    tried: list[float] = []

    def losses_at(value: float) -> list[float]:
        tried.append(value)
        return [1.0 - value] * 500

    verdicts = list(walk((0.99, 0.97, 0.8, 0.98), losses_at, BOUND))
    assert tried == [0.99, 0.97, 0.8]
    assert [verdict.holds for verdict in verdicts] == [True, True, False]
    assert [verdict.mean_loss for verdict in verdicts] == pytest.approx([0.01, 0.03, 0.2])
    assert boldest(verdicts) == 0.97
    assert boldest([Verdict(0.5, 0.3, 1.0, holds=False)]) is None


@given(max_loss=st.floats(0.005, 0.9), confidence=st.floats(0.05, 0.999))
@settings(max_examples=50)
def test_the_least_samples_are_those_that_suffice_without_a_loss(max_loss: float, confidence: float) -> None:
    bound = RiskBound(max_loss, confidence)
    n = bound.least_samples
    assert hoeffding_bentkus([0.0] * n, max_loss) <= bound.level
    assert n == 1 or hoeffding_bentkus([0.0] * (n - 1), max_loss) > bound.level


def test_two_percent_at_95_take_149_samples() -> None:
    assert RiskBound(0.02, 0.95).least_samples == 149


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 2.0, float("nan")])
@pytest.mark.parametrize("flag", ["max_loss", "confidence"])
def test_bounds_that_mean_nothing_are_refused(flag: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} {value}"):
        RiskBound(**{flag: value})


def test_a_guarantee_reads_as_a_sentence() -> None:
    assert str(Guarantee("text", 0.02, 0.95, 256, 64)) == "text loss ≤ 0.02 with confidence 0.95"
