"""Sums over windows, worked out by hand and by scipy."""

import numpy as np
import pytest
from scipy.stats import entropy

from skipstone.exporters.evaluation.readers import Reading
from skipstone.exporters.evaluation.sums import Prediction, Sums


def _reading(probabilities: list[list[float]], shift: float = 0.0, **best: list[int]) -> Reading:
    logits = np.log(np.array(probabilities)).astype(np.float32) + np.float32(shift)
    return Reading(logits, {int(name[1:]): np.array(tokens) for name, tokens in best.items()})


def test_divergence_is_the_sum_over_the_dense_model() -> None:
    sums = Sums()
    dense, found = [[0.5, 0.25, 0.25], [1, 1, 1]], [[0.25, 0.5, 0.25], [1, 2, 3]]
    sums.add((0, 1), _reading(found, 3), _reading(dense, -1))
    prediction = sums.prediction()
    assert prediction.kl_divergence == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert prediction.loss == pytest.approx(np.log(2))
    assert prediction.perplexity == pytest.approx(2)
    assert prediction.dense_perplexity == pytest.approx(4)
    assert prediction.agreement == 0.0
    assert prediction.accuracy == 1.0  # the token after 0 is 1
    assert prediction.kl_error is None  # of one window


def test_exits_are_held_against_the_own_last_layer_and_the_dense_models_exit() -> None:
    even = [0.2, 0.5, 0.3]
    found = _reading([even, even, even, even], e1=[1, 1, 0, 1], e3=[1, 1, 1, 1])
    dense = _reading([even, even, even, even], e2=[0, 1, 0, 0])
    sums = Sums((1, 3), (2, None))
    sums.add((0, 1, 2, 1), found, dense)
    first, second = sums.prediction().exits
    # the last position foretells nothing, so three count
    assert (first.exit, first.own_last, first.dense_exit, first.dense) == (1, 2 / 3, 2, 2 / 3)
    assert (second.exit, second.own_last, second.dense_exit, second.dense) == (3, 1.0, None, None)


def test_without_a_dense_model_nothing_is_compared() -> None:
    sums = Sums((1,), (1,))
    sums.add((0, 1), _reading([[0.5, 0.5], [0.5, 0.5]], e1=[0, 0]), None)
    prediction = sums.prediction()
    assert (prediction.kl_divergence, prediction.agreement, prediction.dense_perplexity) == (None, None, None)
    assert prediction.exits[0].dense is None
    assert prediction.exits[0].own_last == 1.0


def test_the_divergences_error_is_that_of_means_over_equal_windows_and_survives_json() -> None:
    random, sums, means = np.random.default_rng(0), Sums(), []
    for _ in range(12):
        found, dense = random.dirichlet(np.ones(5), (2, 9))
        sums.add(tuple(random.integers(0, 5, 9)), _reading(found.tolist()), _reading(dense.tolist()))
        means.append(float(np.mean(entropy(dense[:-1], found[:-1], axis=-1))))
    prediction = sums.prediction()
    assert prediction.kl_divergence == pytest.approx(np.mean(means), rel=1e-5)
    assert prediction.kl_error == pytest.approx(np.std(means, ddof=1) / np.sqrt(12), rel=1e-5)
    assert Prediction.of_json(prediction.as_json()) == prediction
