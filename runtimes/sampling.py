"""From logits to the next token's distribution.

    >>> sampler = Sampler(SamplingConfig(temperature=0.8, top_p=0.95, seed=7))
    >>> p = sampler.distribution(logits, history=[5, 7])     # float64 [vocab_size], sums to 1

Greedy decoding (temperature 0) is the limit: all mass on the largest logit after the penalties.
The order is that of Hugging Face: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import UsageError
from skipstone.runtimes.tree import Sparse

FloatArray = NDArray[np.float32]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this mass (nucleus, arXiv 1904.09751).
        min_p: drop tokens under this fraction of the likeliest token's probability.
        repetition_penalty: divide positive (multiply negative) logits of tokens seen before (CTRL, 1909.05858).
        seed: of the random draws; None draws one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            UsageError: naming the flag, the value and the range.
        """
        _expect(
            self.temperature >= 0 and math.isfinite(self.temperature), "temperature", self.temperature, "≥ 0"
        )
        _expect(self.top_k >= 0, "top-k", self.top_k, "≥ 0 (0 keeps all)")
        _expect(0 < self.top_p <= 1, "top-p", self.top_p, "in (0, 1]")
        _expect(0 <= self.min_p < 1, "min-p", self.min_p, "in [0, 1)")
        finite = math.isfinite(self.repetition_penalty)
        _expect(self.repetition_penalty > 0 and finite, "repetition-penalty", self.repetition_penalty, "> 0")
        _expect(self.seed is None or self.seed >= 0, "seed", self.seed, "≥ 0")

    @property
    def greedy(self) -> bool:
        """True at temperature 0."""
        return self.temperature == 0


class Sampler:
    """Distributions and draws for one generation; owns the random state."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self.rng = np.random.default_rng(config.seed)

    @property
    def greedy(self) -> bool:
        """True at temperature 0."""
        return self.config.greedy

    @property
    def uses_history(self) -> bool:
        """True when the distribution depends on tokens further back than the model's own context."""
        return self.config.repetition_penalty != 1.0

    def best(self, logits: FloatArray, history: Sequence[int] = ()) -> int:
        """The greedy token."""
        return int(self._penalised(logits, history, None).argmax())

    def distribution(self, logits: FloatArray, history: Sequence[int] = ()) -> Probabilities:
        """Distribution over the vocabulary, float64 [vocab_size].

        Args:
            logits: [vocab_size].
            history: tokens the repetition penalty looks at.
        """
        return self._filtered(self._penalised(logits, history, None))

    def sparse(self, logits: FloatArray, ids: NDArray[np.int32], history: Sequence[int] = ()) -> Sparse:
        """Distribution over a part of the vocabulary, from a draft head's logits (logits[i] is token ids[i])."""
        return Sparse(ids, self._filtered(self._penalised(logits, history, ids)))

    def draw(self, probabilities: Probabilities) -> int:
        """Index drawn from a distribution."""
        return draw(probabilities, self.rng)

    def _penalised(
        self, logits: FloatArray, history: Sequence[int], ids: NDArray[np.int32] | None
    ) -> FloatArray:
        if not self.uses_history or not history:
            return logits
        seen = np.unique(np.asarray(history, np.int64))
        if ids is not None:
            seen = np.flatnonzero(np.isin(ids, seen))
        out = logits.copy()
        penalty = np.float32(self.config.repetition_penalty)
        out[seen] = np.where(out[seen] > 0, out[seen] / penalty, out[seen] * penalty)
        return out

    def _filtered(self, logits: FloatArray) -> Probabilities:
        config = self.config
        if config.greedy:
            p = np.zeros(logits.shape[0])
            p[int(logits.argmax())] = 1.0
            return p
        p = softmax(logits, config.temperature)
        if 0 < config.top_k < p.shape[0]:
            p[p < np.partition(p, -config.top_k)[-config.top_k]] = 0.0
        if config.top_p < 1.0:
            p = _nucleus(p, config.top_p)
        if config.min_p > 0.0:
            p[p < config.min_p * p.max()] = 0.0
        total: Probabilities = p / p.sum()
        return total


def log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    """Logarithms of the distributions that logits [..., vocab_size] stand for, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def softmax(logits: FloatArray, temperature: float = 1.0) -> Probabilities:
    """Softmax in float64, over the last axis of [..., vocab_size]."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    if temperature != 1.0:
        x /= temperature
    np.exp(x, out=x)
    x /= x.sum(-1, keepdims=True)
    return x


def likeliest(logits: FloatArray, count: int) -> NDArray[np.int64]:
    """Indices [n, count] of the largest logits of each row [n, vocab_size], best first.

    For a few of them repeated argmax beats any partial sort.
    """
    best = [logits.argmax(1)]
    further = min(count, logits.shape[1]) - 1
    if further > 0:
        rest, rows = logits.copy(), np.arange(len(logits))
        for _ in range(further):
            rest[rows, best[-1]] = -np.inf
            best.append(rest.argmax(1))
    return np.stack(best, 1)


def draw(probabilities: Probabilities, rng: np.random.Generator) -> int:
    """Index drawn from a distribution; never one of probability 0."""
    cumulative = np.cumsum(probabilities)
    index = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return min(index, int(np.flatnonzero(probabilities)[-1]))


def _nucleus(p: Probabilities, mass: float) -> Probabilities:
    total = p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= mass * total]] = 0.0
    return p


def _expect(holds: bool, flag: str, value: object, range_: str) -> None:
    if not holds:
        raise UsageError(f"--{flag} {value}: expected a value {range_}")
