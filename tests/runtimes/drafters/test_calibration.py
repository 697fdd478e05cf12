"""What a stage's stated probabilities turn out to be worth."""

from __future__ import annotations

import numpy as np
import pytest

from skipstone.runtimes.drafters.greedy import Calibration, Opinion, Trust


def sigmoid(x: float) -> float:
    return float(1.0 / (1.0 + np.exp(-x)))


@pytest.mark.parametrize(("bias", "weight"), [(0.0, 1.0), (0.8, 1.6), (-0.9, 0.8)])
def test_estimates_come_to_the_true_frequencies(bias: float, weight: float) -> None:
    rng = np.random.default_rng(0)
    calibration = Calibration(0.4, 1.4)
    for _ in range(6_000):
        p = float(rng.uniform(0.02, 0.98))
        true = sigmoid(bias + weight * np.log(p / (1 - p)))
        calibration.learn(p, bool(rng.random() < true))
    for p in (0.1, 0.3, 0.5, 0.7, 0.9):
        true = sigmoid(bias + weight * np.log(p / (1 - p)))
        assert calibration.estimate(p) == pytest.approx(true, abs=0.1)


def test_the_first_choice_and_the_further_ones_are_learned_apart() -> None:
    trust = Trust()
    for _ in range(500):
        trust.learn(Opinion(token=1, before=0.0, model=0.5, left=1.0, rank=0), hit=True)
        trust.learn(Opinion(token=2, before=0.0, model=0.3, left=1.0, rank=1), hit=False)
    assert trust.alone(0.5, 0) > 0.85
    assert trust.alone(0.3, 1) < 0.1
    assert trust.alone(0.3, 2) == trust.alone(0.3, 1)


def test_a_child_of_the_stage_before_teaches_only_the_pooling() -> None:
    trust = Trust()
    alone, pooled = trust.alone(0.5, 0), trust.pooled(0.5, 0.5)
    for _ in range(200):
        trust.learn(Opinion(token=1, before=0.5, model=0.5), hit=True)
    assert trust.alone(0.5, 0) == alone
    assert trust.pooled(0.5, 0.5) > pooled + 0.1
