"""Choosing the boldest setting whose loss can be shown to stay small.

CALM (arXiv 2207.07061, section 4) after "Learn then Test" (2110.01052): settings are tried in an order fixed in
advance, from the safe end on. Each is tested against the hypothesis that its expected loss exceeds δ; the first that is
not rejected at level ε ends the walk, and the last one before it is chosen (fixed-sequence testing, so the level need
not be divided among the settings). Whatever the losses' distribution, and whether or not they rise along the walk: the
expected loss of the chosen setting exceeds δ in at most a share ε of all draws of the samples.

    >>> bound = RiskBound(max_loss=0.02, confidence=0.95)
    >>> bound.least_samples                     # fewer cannot show it, even where none differs
    149
    >>> verdicts = list(walk((0.9, 0.6, 0.3), losses_at, bound))
    >>> boldest(verdicts)
    0.6
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from skipstone.errors import UsageError


@dataclass(frozen=True)
class RiskBound:
    """What is to be shown.

    Attributes:
        max_loss: δ, bound of the expected loss, in (0, 1).
        confidence: 1 - ε, share of the draws of samples in which the bound holds at least, in (0, 1).
    """

    max_loss: float = 0.02
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for flag, value in (("--max-loss", self.max_loss), ("--confidence", self.confidence)):
            if not 0 < value < 1:
                raise UsageError(f"{flag} {value}: expected a value between 0 and 1")

    @property
    def level(self) -> float:
        """ε."""
        return 1.0 - self.confidence

    @property
    def least_samples(self) -> int:
        """The fewest samples without any loss that show the bound."""
        few = max(1, math.ceil(math.log(self.level) / math.log1p(-self.max_loss)) - 1)  # rounded either way
        return next(
            n for n in range(few, few + 3) if hoeffding_bentkus([0.0] * n, self.max_loss) <= self.level
        )


@dataclass(frozen=True)
class Guarantee:
    """What a calibration has shown of the setting that is used.

    Attributes:
        risk: `text` or `quality`, see `skipstone.calibration`.
        max_loss, confidence: see `RiskBound`.
        samples: number of texts it was shown with.
        max_new_tokens: how far each of them was generated.
    """

    risk: str
    max_loss: float
    confidence: float
    samples: int
    max_new_tokens: int

    def __str__(self) -> str:
        return f"{self.risk} loss ≤ {self.max_loss:g} with confidence {self.confidence:g}"


@dataclass(frozen=True)
class Verdict:
    """Test of one setting: its `value`, the samples' mean loss, the p-value, and whether the bound `holds`."""

    value: float
    mean_loss: float
    p_value: float
    holds: bool


def walk(
    values: Iterable[float], losses_at: Callable[[float], Sequence[float]], bound: RiskBound
) -> Iterator[Verdict]:
    """Test settings in their order, up to the first of which the bound cannot be shown.

    Args:
        values: chosen without a look at the samples, the safest first.
        losses_at: losses in [0, 1] of a setting on the samples, which are independent draws; every setting's are of
            the same samples.
        bound: what is to be shown.
    """
    for value in values:
        losses = losses_at(value)
        p_value = hoeffding_bentkus(losses, bound.max_loss)
        holds = p_value <= bound.level
        yield Verdict(value, math.fsum(losses) / len(losses), p_value, holds)
        if not holds:
            return


def boldest(verdicts: Iterable[Verdict]) -> float | None:
    """The last setting of a walk that holds; None: not even the first."""
    found = [verdict.value for verdict in verdicts if verdict.holds]
    return found[-1] if found else None


def hoeffding_bentkus(losses: Sequence[float], max_loss: float) -> float:
    """p-value of "the expected loss exceeds δ" (Hoeffding–Bentkus, 2110.01052).

    With the mean r of n losses it is

        min(exp(-n·h(min(r, δ), δ)), e·P(Binomial(n, δ) ≤ ⌈n·r⌉)),  h(a, b) = a·log(a/b) + (1 - a)·log((1 - a)/(1 - b))

    the first term after Hoeffding (1963), the second after Bentkus (2004), which is the sharper one for rare losses.

    Args:
        losses: at least one, each in [0, 1].
        max_loss: δ, in (0, 1).

    Raises:
        UsageError: no losses, or one outside [0, 1].
    """
    wrong = [loss for loss in losses if not 0 <= loss <= 1]
    if not losses or wrong:
        raise UsageError(f"losses {wrong[:3]}: at least one was expected, and all in [0, 1]")
    n, total = len(losses), math.fsum(losses)
    r = min(total / n, max_loss)
    divergence = (r * math.log(r / max_loss) if r else 0.0) + (1 - r) * math.log((1 - r) / (1 - max_loss))
    return min(1.0, math.exp(-n * divergence), math.e * _binomial_cdf(math.ceil(total), n, max_loss))


def _binomial_cdf(most: int, n: int, p: float) -> float:
    """P(Binomial(n, p) ≤ most)."""
    return math.fsum(
        math.exp(
            math.lgamma(n + 1)
            - math.lgamma(k + 1)
            - math.lgamma(n - k + 1)
            + k * math.log(p)
            + (n - k) * math.log1p(-p)
        )
        for k in range(min(most, n) + 1)
    )
