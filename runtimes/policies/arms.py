"""Ways to draft as the arms of a bandit: what is known of each, and what it is hoped to be worth in the present text.

An arm's speed-up is estimated from its record over earlier texts, which fades, and from what the present text shows;
the record weighs as much as `_CERTAIN` plain tokens of drafting, about what separates chance from a text of another
kind. A stage (an exit, a draft model) is shown a draft from text in every one of its rounds, so what text alone would
have brought in the very same rounds is known. Such pairs tell the two apart sooner than the speed-up of each does,
which differs more from text to text than from the other's. So a stage is expected to be as much better or worse than
text alone is in the present text, as it has been elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from skipstone.runtimes.drafters.base import Drafter

FIRST_NAP = 16  # tokens
_LONGEST_NAP = 1024
_FADING, _IDLE = 0.9, 0.97  # of a record, with every generation that used the arm, and that did not
_DOUBT, _CERTAIN = 2.0, 30.0  # plain tokens that a promise weighs, and a record at most
_EVIDENCE = 12.0  # plain tokens of drafting that a record is worth trust with
GAIN = 1.1  # speed-up that earns it
HOPE = 1.05  # speed-up that an untried arm of text is taken to have; stages come before text
_CURIOSITY = 1.2  # what is hoped for beyond the estimate, by the root of the rounds that were seen


@dataclass(frozen=True, slots=True)
class Record:
    """What drafting in one way has brought: sums over rounds, older ones faded.

    Attributes:
        rounds: their number.
        tokens: that they yielded.
        price: what they took, in tokens of plain decoding.
        text_tokens, text_price: what text alone would have yielded and taken in those of these rounds that began with
            a draft from text; 0 where there were none.
    """

    rounds: float = 0.0
    tokens: float = 0.0
    price: float = 0.0
    text_tokens: float = 0.0
    text_price: float = 0.0

    def scaled(self, share: float) -> Record:
        """This share of it."""
        return Record(
            share * self.rounds,
            share * self.tokens,
            share * self.price,
            share * self.text_tokens,
            share * self.text_price,
        )

    def and_newer(self, newer: Record) -> Record:
        """Both together."""
        return Record(
            self.rounds + newer.rounds,
            self.tokens + newer.tokens,
            self.price + newer.price,
            self.text_tokens + newer.text_tokens,
            self.text_price + newer.text_price,
        )

    def speedup(self, expected: float, weight: float) -> float:
        """Over plain decoding; as was expected, with the weight of so many plain tokens, where there is little."""
        return (weight * expected + self.tokens) / (weight + self.price)

    def over_text(self, expected: float, weight: float) -> float:
        """Its speed-up over text alone, in the same rounds; likewise."""
        return self.speedup(expected, weight) * (weight + self.text_price) / (weight + self.text_tokens)


@dataclass(slots=True, eq=False)
class Arm:
    """One way to draft, and how it has been doing.

    Attributes:
        drafter: its drafter.
        promise: the speed-up it is hoped to have before anything is known.
        below: the arm of the text drafter that it builds on; None: it builds on none.
        record: of earlier generations.
        text: of the present one since the arm last slept, as much of it as a record weighs.
        generation: of the present one.
        nap: tokens it will sleep next time.
        asleep_until: count of generated tokens at which it may be tried again.
    """

    drafter: Drafter
    promise: float = HOPE
    below: Arm | None = None
    record: Record = Record()
    text: Record = Record()
    generation: Record = Record()
    nap: int = FIRST_NAP
    asleep_until: int = 0

    @property
    def gain(self) -> float:
        """Its speed-up over earlier generations."""
        return self.record.speedup(self.promise, _DOUBT)

    @property
    def trusted(self) -> bool:
        """Whether drafting so has paid."""
        return self.record.price >= _EVIDENCE and self.gain >= GAIN

    @property
    def speedup(self) -> float:
        """Over plain decoding, in this text."""
        if self.below is not None and self.record.text_price + self.text.text_price > 0:
            known = self.record.scaled(_CERTAIN / max(_CERTAIN, self.record.price)).and_newer(self.text)
            return self.below.speedup * known.over_text(self.promise / self.below.promise, _DOUBT)
        return self.text.speedup(self.gain, min(_CERTAIN, _DOUBT + self.record.price))

    @property
    def hoped(self) -> float:
        """The speed-up, and more the less it was tried."""
        return self.speedup + _CURIOSITY / math.sqrt(1.0 + self.record.rounds + self.text.rounds)

    def update(self, tokens: int, price: float, text: Record = Record()) -> None:
        """Take in one round, and what text alone would have brought in it."""
        seen = replace(Record(1, tokens, price), text_tokens=text.tokens, text_price=text.price)
        lately = min(1.0, _CERTAIN / self.text.price) if self.text.price else 1.0
        self.text = self.text.scaled(lately).and_newer(seen)
        self.generation = self.generation.and_newer(seen)

    def sleep(self, now: int) -> None:
        """Sleep for a while, longer each time in a row, and wake with the benefit of the doubt."""
        self.asleep_until = now + self.nap
        self.nap = min(2 * self.nap, _LONGEST_NAP)
        self.text = Record()

    def up_to_date(self) -> Record:
        """The record with the present generation in it."""
        fading = _FADING if self.generation.rounds else _IDLE
        return self.record.scaled(fading).and_newer(self.generation)

    def wake(self) -> None:
        """A new text: what was bad for the last one may be good for this."""
        self.record = self.up_to_date()
        self.text = self.generation = Record()
        self.asleep_until, self.nap = 0, FIRST_NAP
