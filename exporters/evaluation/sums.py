"""Perplexity, divergence and agreement, summed over the windows of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from skipstone.bundle import ExitAgreement
from skipstone.exporters.evaluation.readers import Reading
from skipstone.runtimes.sampling import log_softmax


@dataclass(frozen=True)
class Prediction:
    """How a model predicts a text; None where there is no dense model to compare with.

    Attributes:
        tokens: predicted ones, the first of every window left out.
        loss: mean cross-entropy per token, nats.
        perplexity: exp of it.
        accuracy: share of positions where the best token is the text's next one.
        dense_perplexity: the dense model's.
        kl_divergence: mean Kullback–Leibler divergence from the dense model's distribution, nats.
        kl_error: standard error of this mean, from windows taken as independent; None of a single window too.
        agreement: share of positions with the dense model's best token.
        exits: how every inner exit predicts, see `ExitAgreement`.
    """

    tokens: int
    loss: float
    perplexity: float
    accuracy: float
    dense_perplexity: float | None
    kl_divergence: float | None
    kl_error: float | None
    agreement: float | None
    exits: tuple[ExitAgreement, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"exits": [exit_.model_dump(mode="json") for exit_ in self.exits]}

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> Prediction:
        """What `as_json` gave."""
        exits = tuple(ExitAgreement.model_validate(exit_) for exit_ in values["exits"])
        return cls(**values | {"exits": exits})


class Sums:
    """Sums over predicted tokens.

    Args:
        exits: inner exits of the model that is measured.
        dense_exits: for each of them the dense model's exit at the same place; None: it has none.
    """

    def __init__(self, exits: Sequence[int] = (), dense_exits: Sequence[int | None] = ()) -> None:
        self._places = tuple(zip(exits, dense_exits, strict=True))
        self._tokens = self._right = self._agreed = 0
        self._loss = self._dense_loss = 0.0
        self._own, self._same = [0] * len(exits), [0] * len(exits)
        self._divergences: list[tuple[float, int]] = []  # sum and number of tokens, by window

    def add(self, tokens: Sequence[int], found: Reading, dense: Reading | None) -> None:
        """Take in a window of n tokens and what the models say after each of them; the last foretells nothing known."""
        following = np.array(tokens[1:], np.int64)
        places, log_p = np.arange(len(following)), log_softmax(found.last[:-1])
        best = found.last[:-1].argmax(-1)
        self._tokens += len(following)
        self._loss -= float(log_p[places, following].sum())
        self._right += int((best == following).sum())
        if dense is not None:
            expected = log_softmax(dense.last[:-1])
            self._dense_loss -= float(expected[places, following].sum())
            self._agreed += int((best == dense.last[:-1].argmax(-1)).sum())
            # KL(dense ‖ model) = Σ p (log p − log q)
            divergence = float((np.exp(expected) * (expected - log_p)).sum())
            self._divergences.append((divergence, len(following)))
        for index, (exit_layer, dense_exit) in enumerate(self._places):
            early = found.best[exit_layer][:-1]
            self._own[index] += int((early == best).sum())
            if dense is not None and dense_exit is not None:
                self._same[index] += int((early == dense.best[dense_exit][:-1]).sum())

    def prediction(self) -> Prediction:
        """The means; at least one token must have been predicted."""
        count, compared = self._tokens, bool(self._divergences)
        return Prediction(
            tokens=count,
            loss=self._loss / count,
            perplexity=float(np.exp(self._loss / count)),
            accuracy=self._right / count,
            dense_perplexity=float(np.exp(self._dense_loss / count)) if compared else None,
            kl_divergence=sum(part for part, _ in self._divergences) / count if compared else None,
            kl_error=_error_of_ratio(self._divergences),
            agreement=self._agreed / count if compared else None,
            exits=tuple(
                ExitAgreement(
                    exit=exit_layer,
                    own_last=own / count,
                    dense_exit=dense_exit if compared else None,
                    dense=same / count if compared and dense_exit is not None else None,
                )
                for (exit_layer, dense_exit), own, same in zip(
                    self._places, self._own, self._same, strict=True
                )
            ),
        )


def _error_of_ratio(windows: Sequence[tuple[float, int]]) -> float | None:
    """Standard error of Σ sums ⁄ Σ counts over independent windows (Cochran, Sampling Techniques, section 6.4)."""
    number = len(windows)
    if number < 2:
        return None
    sums, counts = (np.array(column, np.float64) for column in zip(*windows, strict=True))
    residuals = sums - counts * (sums.sum() / counts.sum())
    return float(np.sqrt((residuals**2).sum() * number / (number - 1)) / counts.sum())
