"""From samples to the table's rows. docs/benchmarks/README.md defines every figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from skipstone.benchmark.lossless import Agreement
from skipstone.benchmark.measure import Sample, Series


@dataclass(frozen=True)
class Row:
    """One strategy's figures; None where a figure does not apply.

    Attributes:
        strategy: its name, or a baseline's.
        tokens_per_second: after the first token, over all prompts and repeats.
        speedup: plain decoding's seconds over this strategy's, on the same number of tokens of every prompt.
        min_speedup: the least of `prompt_speedups`.
        prompt_speedups: the same ratio prompt by prompt (medians over repeats).
        tokens_per_round: accepted drafts and the target's own token, per verification.
        acceptance_rate: accepted share of the verified drafts.
        identical, near_tie_divergences, other_divergences: prompts by how the output compares with plain
            decoding's; None when sampling.
        ttft_ms: time to the first token, milliseconds, median.
        peak_rss_mb: peak resident memory of a fresh process that runs one prompt, MB (10^6 bytes).
        gigabytes_per_second: weights read while decoding, GB (10^9 bytes) per second.
        bound: speed-up that the cost curve allows at this number of tokens per round.
        bound_share: speedup / bound.
        rounds, drafted, accepted, new_tokens: sums over all prompts and repeats.
    """

    strategy: str
    tokens_per_second: float
    speedup: float | None
    min_speedup: float | None
    prompt_speedups: tuple[float | None, ...]
    tokens_per_round: float
    acceptance_rate: float
    identical: int | None
    near_tie_divergences: int | None
    other_divergences: int | None
    ttft_ms: float
    peak_rss_mb: float | None
    gigabytes_per_second: float | None
    bound: float | None
    bound_share: float | None
    rounds: int
    drafted: int
    accepted: int
    new_tokens: int


def make_row(
    series: Series,
    plain: Series,
    matches: Agreement | None,
    plain_cost: float | None,
    peak_rss_mb: float | None,
) -> Row:
    """The row of one strategy.

    Args:
        series: its samples.
        plain: plain decoding's samples on the same prompts.
        matches: how the outputs compare; None when sampling.
        plain_cost: seconds of a plain token by the cost curve; None: there is no curve, and no bound.
        peak_rss_mb: measured apart.
    """
    samples = [sample for passed in series.samples for sample in passed]
    seconds = sum(sample.decode_seconds for sample in samples)
    fresh = sum(len(sample.tokens) - 1 for sample in samples)
    rounds, drafted = sum(s.rounds for s in samples), sum(s.drafted for s in samples)
    accepted = sum(s.accepted for s in samples)
    ratios = _prompt_speedups(series, plain)
    speedup = _speedup(series, plain)
    bound = None if plain_cost is None else _bound(samples, fresh, plain_cost)
    read = _total([s.bytes_read for s in samples])
    known = [ratio for ratio in ratios if ratio is not None]
    return Row(
        strategy=series.strategy,
        tokens_per_second=fresh / seconds if seconds > 0 else 0.0,
        speedup=speedup,
        min_speedup=min(known, default=None),
        prompt_speedups=tuple(ratios),
        tokens_per_round=fresh / rounds if rounds else 1.0,
        acceptance_rate=accepted / drafted if drafted else 0.0,
        identical=None if matches is None else matches.identical,
        near_tie_divergences=None if matches is None else matches.near_tie_divergences,
        other_divergences=None if matches is None else matches.other_divergences,
        ttft_ms=1e3 * median(sample.first_seconds for sample in samples),
        peak_rss_mb=peak_rss_mb,
        gigabytes_per_second=None if read is None or seconds <= 0 else read / seconds / 1e9,
        bound=bound,
        bound_share=None if bound is None or speedup is None else speedup / bound,
        rounds=rounds,
        drafted=drafted,
        accepted=accepted,
        new_tokens=fresh,
    )


def seconds_per_token(series: Series) -> list[float | None]:
    """By prompt: the median over repeats of the seconds per token after the first; None: there were none."""
    found: list[float | None] = []
    for repeats in zip(*series.samples, strict=True):
        known = [s for s in (sample.seconds_per_token for sample in repeats) if s is not None]
        found.append(median(known) if known else None)
    return found


def _prompt_speedups(series: Series, plain: Series) -> list[float | None]:
    pairs = zip(seconds_per_token(plain), seconds_per_token(series), strict=True)
    return [None if a is None or b is None else a / b for a, b in pairs]


def _speedup(series: Series, plain: Series) -> float | None:
    """Both times for plain decoding's number of tokens of every prompt, summed, then divided."""
    counts = [len(sample.tokens) - 1 for sample in plain.samples[0]]
    theirs = ours = 0.0
    for count, a, b in zip(counts, seconds_per_token(plain), seconds_per_token(series), strict=True):
        if a is not None and b is not None:
            theirs += count * a
            ours += count * b
    return theirs / ours if ours > 0 else None


def _bound(samples: Sequence[Sample], fresh: int, plain_cost: float) -> float | None:
    """Plain decoding's predicted seconds for these tokens over those of what was run."""
    predicted = _total([sample.predicted_seconds for sample in samples])
    return None if not predicted else fresh * plain_cost / predicted


def _total(values: Sequence[float | None]) -> float | None:
    """Sum; None when one of them is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
