"""A chi-square test of counts against probabilities."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
from scipy.stats import chisquare

_LEAST_EXPECTED = 5.0


def goodness_of_fit(found: Mapping[Hashable, int], expected: Mapping[Hashable, float]) -> float:
    """Probability of counts at least this far from the expected ones; 0 if something impossible was counted.

    Outcomes expected fewer than five times share one bin, as the test wants it.
    """
    draws = sum(found.values())
    if any(count and expected.get(outcome, 0.0) <= 0.0 for outcome, count in found.items()):
        return 0.0
    bins = [(found.get(outcome, 0), p * draws) for outcome, p in expected.items() if p > 0]
    large = [pair for pair in bins if pair[1] >= _LEAST_EXPECTED]
    small = [pair for pair in bins if pair[1] < _LEAST_EXPECTED]
    if small:
        large.append((sum(n for n, _ in small), sum(e for _, e in small)))
    if len(large) == 1:
        return 1.0
    counts, means = np.array(large, np.float64).T
    return float(chisquare(counts, means * counts.sum() / means.sum()).pvalue)
