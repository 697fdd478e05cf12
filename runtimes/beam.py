"""Beam search on a session: beams are rows, children of different parents advance in one batch.

    >>> session.encode(source)
    >>> best, second = beam_search(session, [start], BeamOptions(num_beams=4, num_return_sequences=2), limits)

The search is transformers' (scores are sums of log probabilities over length ** length_penalty). Two variants:

- patience (arXiv 2204.05424, section 3): stop once patience · num_beams hypotheses have ended; at 1 it is what
  transformers calls `early_stopping=True`. Without it the search goes on until no beam can better the worst that ended.
- diverse beam search (1610.02424, algorithm 1): groups of beams take turns within a step; a token that earlier groups
  took is worth `diversity_penalty` less, for each time it was taken (Hamming diversity).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import UsageError
from skipstone.runtimes.generate import GenerationLimits
from skipstone.runtimes.prefix import common_prefix_length
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import log_softmax
from skipstone.runtimes.session import Session

Tokens = tuple[int, ...]
LogProbs = NDArray[np.float64]


@dataclass(frozen=True)
class BeamOptions:
    """How beams are searched; the names are transformers'.

    Attributes:
        num_beams: hypotheses kept at every step, over all groups.
        num_return_sequences: best ones returned.
        length_penalty: over 0 favours long texts, below 0 short ones.
        patience: stop once so many times num_beams hypotheses have ended; None: once none can be bettered.
        num_beam_groups: groups of diverse beam search; a divisor of num_beams.
        diversity_penalty: for each time that earlier groups took the same token in the same step.
    """

    num_beams: int = 4
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    patience: float | None = None
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        groups = self.num_beam_groups
        _expect(self.num_beams >= 1, "num-beams", self.num_beams, "at least 1")
        returned = self.num_return_sequences
        _expect(1 <= returned <= self.num_beams, "num-return-sequences", returned, f"1 to {self.num_beams}")
        _expect(math.isfinite(self.length_penalty), "length-penalty", self.length_penalty, "a finite number")
        _expect(self.patience is None or 0 < self.patience < math.inf, "patience", self.patience, "over 0")
        fits = groups >= 1 and self.num_beams % groups == 0
        _expect(fits, "num-beam-groups", groups, f"a divisor of --num-beams {self.num_beams}")
        penalty = self.diversity_penalty
        _expect(0 <= penalty < math.inf, "diversity-penalty", penalty, "at least 0")


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """Tokens after the prompt; `score` is the sum of their log probabilities, in the end over length ** penalty."""

    tokens: Tokens
    score: float


def beam_search(
    session: Session, prompt: Sequence[int], options: BeamOptions, limits: GenerationLimits
) -> list[Hypothesis]:
    """The best texts after a prompt, best first; one that ends with an end token has it as its last token.

    Args:
        session: holds the context before the prompt, and afterwards the prompt too. Of an encoder-decoder it has read
            its source.
        prompt: token ids, at least one.
        options: how to search.
        limits: when a text ends.

    Raises:
        UsageError, ContextFullError: as `Session.prefill`; also when the beams do not fit the context side by side.
    """
    start = session.length
    first = session.prefill(prompt)
    rows = _Rows(session)
    size = options.num_beams // options.num_beam_groups
    groups = [_Group(size, options, limits) for _ in range(options.num_beam_groups)]
    try:
        logits: dict[Tokens, NDArray[np.float32]] = {(): first}
        while True:
            _step(groups, {tokens: log_softmax(row) for tokens, row in logits.items()}, options)
            open_ = [hypothesis.tokens for group in groups for hypothesis in group.live]
            if not open_ or not rows.fit(open_):
                break
            logits = rows.advance(open_)
    finally:
        session.rewind(min(session.length, start + len(prompt)))
    found = sorted((h for group in groups for h in group.ended()), key=lambda h: -h.score)
    return found[: options.num_return_sequences]


def _step(groups: Sequence[_Group], log_probs: dict[Tokens, LogProbs], options: BeamOptions) -> None:
    """One token more for every live hypothesis, group after group."""
    taken: Counter[int] = Counter()
    for group in groups:
        if group.live:
            penalties = {token: options.diversity_penalty * count for token, count in taken.items()}
            taken.update(group.step([log_probs[h.tokens] for h in group.live], penalties))


class _Group:
    """One beam search.

    Args:
        size: beams.
        options: of the whole search.
        limits: when a text ends.
    """

    def __init__(self, size: int, options: BeamOptions, limits: GenerationLimits) -> None:
        self.live = [Hypothesis((), 0.0)]
        self._size, self._penalty = size, options.length_penalty
        self._eager = options.patience is not None
        self._capacity = math.ceil(size * options.patience) if options.patience is not None else size
        self._most, self._eos = limits.max_new_tokens, limits.eos_token_ids
        self._ended: list[Hypothesis] = []

    def ended(self) -> list[Hypothesis]:
        """The texts that have ended, or if none has, those that were cut off."""
        return self._ended or [self._scored(h) for h in self.live]

    def step(self, log_probs: Sequence[LogProbs], penalties: dict[int, float]) -> list[int]:
        """Extend the live hypotheses; none is left live when the search is over.

        Args:
            log_probs: of the next token after each live hypothesis.
            penalties: what tokens are worth less.

        Returns:
            The tokens it took: those of the hypotheses that go on, or where none does of those that ended.
        """
        totals = np.stack([h.score + p for h, p in zip(self.live, log_probs, strict=True)])
        for token, penalty in penalties.items():
            totals[:, token] -= penalty
        length = len(self.live[0].tokens) + 1
        going_on: list[Hypothesis] = []
        ended: list[Hypothesis] = []
        for rank, candidate in enumerate(self._candidates(totals)):
            if candidate.tokens[-1] not in self._eos and length < self._most:
                going_on.append(candidate)
            elif rank < self._size:
                ended.append(self._scored(candidate))
        self._ended = sorted([*self._ended, *ended], key=lambda h: -h.score)[: self._capacity]
        going_on = going_on[: self._size]
        self.live = [] if self._over(going_on) else going_on
        return [h.tokens[-1] for h in going_on or ended]

    def _candidates(self, totals: LogProbs) -> list[Hypothesis]:
        """The best extensions, so many that enough of them go on even if every end token is among them."""
        count = min(max(2, 1 + len(self._eos)) * self._size, totals.size)
        flat = totals.ravel()
        best = np.argpartition(-flat, count - 1)[:count]
        vocabulary = totals.shape[1]
        return [
            Hypothesis((*self.live[at // vocabulary].tokens, at % vocabulary), float(flat[at]))
            for at in sorted(best.tolist(), key=lambda at: (-flat[at], at))
        ]

    def _over(self, going_on: Sequence[Hypothesis]) -> bool:
        """Whether patience is at its end, or nothing that goes on can better the worst of the ended texts."""
        if not going_on or len(self._ended) < self._capacity:
            return not going_on
        return self._eager or self._scored(going_on[0]).score <= self._ended[-1].score

    def _scored(self, hypothesis: Hypothesis) -> Hypothesis:
        length = max(1, len(hypothesis.tokens))
        return Hypothesis(hypothesis.tokens, hypothesis.score / length**self._penalty)


class _Rows:
    """The hypotheses' rows in the session, by their tokens.

    Rows of hypotheses that were dropped stay until room or branches run short; then what all live ones begin with is
    committed, and the little that they do not share is computed anew.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rows: dict[Tokens, int] = {(): ROOT}
        self._parents: set[int] = set()

    def fit(self, texts: Sequence[Tokens]) -> bool:
        """Make room for one row more of each text; False: there is none."""
        if self._fits(texts):
            return True
        self._compact(texts)
        return self._fits(texts)

    def advance(self, texts: Sequence[Tokens]) -> dict[Tokens, NDArray[np.float32]]:
        """Logits after each text; only its last token is new."""
        rows = [self._push(tokens) for tokens in texts]
        return dict(zip(texts, self._session.advance(rows, self._session.exits[-1]), strict=True))

    def _fits(self, texts: Sequence[Tokens]) -> bool:
        leaves = self._session.pending - len(self._parents) + len(texts)
        missing = {tokens[:n] for tokens in texts for n in range(self._known(tokens) + 1, len(tokens) + 1)}
        return len(missing) <= self._session.room and leaves <= self._session.max_branches

    def _known(self, tokens: Tokens) -> int:
        """Length of the longest beginning that has a row or is committed."""
        length = len(tokens)
        while tokens[:length] not in self._rows:
            length -= 1
        return length

    def _push(self, tokens: Tokens) -> int:
        known = self._known(tokens)
        row = self._rows[tokens[:known]]
        for length in range(known + 1, len(tokens) + 1):
            if row != ROOT:
                self._parents.add(row)
            (row,) = self._session.push([tokens[length - 1]], [row])
            self._rows[tokens[:length]] = row
        return row

    def _compact(self, texts: Sequence[Tokens]) -> None:
        """Commit what all texts but for their last tokens begin with; drop every other row."""
        shared = texts[0][:-1]
        for tokens in texts[1:]:
            shared = shared[: common_prefix_length(shared, tokens[:-1])]
        row = self._rows.get(shared, ROOT)
        if row == ROOT:
            self._session.discard()
        else:
            self._session.commit(row)
        self._rows, self._parents = {shared[:n]: ROOT for n in range(len(shared) + 1)}, set()


def _expect(holds: bool, flag: str, value: object, range_: str) -> None:
    if not holds:
        raise UsageError(f"--{flag} {value}: expected {range_}")
