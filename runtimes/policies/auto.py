"""`auto`: draft where measured speed says it pays, decode plainly elsewhere.

Every way to draft is an arm. What a round with it yields and takes, in tokens of plain decoding, is measured all along,
so a machine that slows down changes nothing. An arm's speed-up is estimated from its record over earlier texts, which
fades, and from what the present text shows; the record weighs as much as `_CERTAIN` plain tokens of drafting, about
what separates chance from a text of another kind. A round takes the best arm, those seldom tried with a bonus, or
decodes plainly where none is hoped to be faster. Four things keep the promise never to be slower than plain:

- within a round every draft is sized by expected gain (`CostModel.best_count`), and may come out empty;
- an arm that falls behind plain in this text sleeps, twice as long each time; while all sleep nothing is computed but
  the model;
- every generation keeps an account in plain tokens: what drafting gained and lost. It opens with a small credit, a
  small share of every token is paid in, and once it is overdrawn only plain decoding goes on;
- an arm whose record is good is trusted to make up for a bad start and may lose more before it is stopped: to stop it
  then would only make sure of the loss. Nothing is lent where a generation is too short to make up for it.

What a stage is shown by the text drafter below it is held against the accepted tokens too: so drafting from text alone
is known for what it is worth while a stage is chosen.

The record can be kept, and given to the next process (`AutoPolicy.record`).

The controller is of the kind ONNX Runtime GenAI uses for draft lengths (throughput averaged exponentially, probes with
a cooldown), over arms instead of lengths, with the bonus of upper confidence bounds (UCB1, Auer et al. 2002, section 2)
for what is little known; DEL (arXiv 2504.05598) chooses exits by the same tokens-per-cost figure.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import Drafter
from skipstone.runtimes.drafters.early_exit import EarlyExitDrafter
from skipstone.runtimes.drafters.gated import GatedDrafter
from skipstone.runtimes.drafters.overheard import OverheardDrafter
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.generate import Choice, Outcome
from skipstone.runtimes.session import Session
from skipstone.runtimes.verify import accept_greedy

_MEMORY = 0.12  # weight of the newest plain round
_WARM_UP = 3  # plain rounds that show what a token really costs here
_NO_TOKEN = -1
_FIRST_NAP = 16  # tokens
_LONGEST_NAP = 1024
_FADING, _IDLE = 0.9, 0.97  # of a record, with every generation that used the arm, and that did not
_DOUBT, _CERTAIN = 2.0, 30.0  # plain tokens that a promise weighs, and a record at most
_EVIDENCE = 12.0  # plain tokens of drafting that a record is worth trust with
_GAIN = 1.1  # speed-up that earns it
_CREDIT = 1.0  # plain tokens that drafting may lose at once
_SHARE = 0.01  # of all tokens, that it may lose in the long run
_TRUST = 20.0  # more of them, for an arm that is trusted
_SHORT, _LONG = (
    8.0,
    32.0,
)  # plain tokens that drafting may save in a generation where nothing is lent, and all of this
_TYPICAL = 1.5  # speed-up by which this is foreseen, of arms that are not trusted to have more
_STAKE = 1.5  # plain tokens that a round may lose beyond the account
_COMPARED = 4  # of so many rounds that try a way one is plain
_OUTLIER = 1.5  # a round this much slower than foreseen was interrupted from outside
_HOPE = 1.05  # speed-up that an untried arm of text is taken to have; stages come before text
_CURIOSITY = 1.2  # what is hoped for beyond the estimate, by the root of the rounds that were seen


@dataclass(frozen=True, slots=True)
class Record:
    """What drafting in one way has brought: sums over rounds, older ones faded.

    Attributes:
        rounds: their number.
        tokens: that they yielded.
        price: what they took, in tokens of plain decoding.
    """

    rounds: float = 0.0
    tokens: float = 0.0
    price: float = 0.0

    def scaled(self, share: float) -> Record:
        """This share of it."""
        return Record(share * self.rounds, share * self.tokens, share * self.price)

    def and_newer(self, newer: Record) -> Record:
        """Both together."""
        return Record(self.rounds + newer.rounds, self.tokens + newer.tokens, self.price + newer.price)

    def speedup(self, expected: float, weight: float) -> float:
        """Over plain decoding; as was expected, with the weight of so many plain tokens, where there is little."""
        return (weight * expected + self.tokens) / (weight + self.price)


@dataclass(slots=True, eq=False)
class Arm:
    """One way to draft, and how it has been doing.

    Attributes:
        drafter: its drafter.
        promise: the speed-up it is hoped to have before anything is known.
        record: of earlier generations.
        text: of the present one since the arm last slept, as much of it as a record weighs.
        generation: of the present one.
        nap: tokens it will sleep next time.
        asleep_until: count of generated tokens at which it may be tried again.
    """

    drafter: Drafter
    promise: float = _HOPE
    record: Record = Record()
    text: Record = Record()
    generation: Record = Record()
    nap: int = _FIRST_NAP
    asleep_until: int = 0

    @property
    def gain(self) -> float:
        """Its speed-up over earlier generations."""
        return self.record.speedup(self.promise, _DOUBT)

    @property
    def trusted(self) -> bool:
        """Whether drafting so has paid."""
        return self.record.price >= _EVIDENCE and self.gain >= _GAIN

    @property
    def speedup(self) -> float:
        """Over plain decoding, in this text."""
        return self.text.speedup(self.gain, min(_CERTAIN, _DOUBT + self.record.price))

    @property
    def hoped(self) -> float:
        """The speed-up, and more the less it was tried."""
        return self.speedup + _CURIOSITY / math.sqrt(1.0 + self.record.rounds + self.text.rounds)

    def update(self, tokens: int, price: float) -> None:
        """Take in one round."""
        seen = Record(1, tokens, price)
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
        self.asleep_until, self.nap = 0, _FIRST_NAP


class AutoPolicy:
    """See `skipstone.runtimes.generate.Policy`. What it learned stays for the next generation.

    Args:
        engine: the target.
        costs: its cost model.
        text: drafts from text alone; the arms build on it.
        guided: copies what the output may resemble, and is tried before all others; None where there is nothing.
        record: what arms brought before, by their drafters' names; those it does not name begin anew.
        draft: a draft model's drafter, whose source is `text`; None where there is none.
    """

    def __init__(
        self,
        engine: Engine,
        costs: CostModel,
        text: Drafter,
        guided: Drafter | None = None,
        record: Mapping[str, Record] | None = None,
        draft: Drafter | None = None,
    ) -> None:
        # a draft model resets its source along with itself
        self._texts, self._costs = [part for part in (guided, draft or text) if part is not None], costs
        self._seconds, self._plain_rounds = costs.plain, 0  # of a plain token, and how many were measured
        self._text, self._overheard = GatedDrafter(text), OverheardDrafter(text)
        self._text_arm = Arm(self._text)
        self._arms = [self._text_arm]
        if engine.draft_vocabulary is not None:
            self._arms += [Arm(EarlyExitDrafter(e, self._overheard), _HOPE**2) for e in engine.exits[:-1]]
        if draft is not None:
            self._arms.append(Arm(draft, _HOPE**2))
        if guided is not None:
            self._arms.append(Arm(GatedDrafter(guided), _HOPE**3))
        for arm in self._arms:
            arm.record = (record or {}).get(arm.drafter.name, Record())
        self._chosen: Arm | None = None
        self._trying: Arm | None = None
        self._tried = 0
        self._generated, self._gained, self._stake = 0, 0.0, 0.0
        self._length: int | None = None  # that this generation may have, once it is known

    @property
    def record(self) -> dict[str, Record]:
        """What the arms have brought so far, by their drafters' names; to be given to a policy of the same kind."""
        return {arm.drafter.name: arm.up_to_date() for arm in self._arms}

    @property
    def ways(self) -> tuple[str, ...]:
        """The arms' drafters by name, those of text first."""
        return tuple(arm.drafter.name for arm in self._arms)

    def try_only(self, way: str | None) -> None:
        """Draft in this way from now on, whatever it costs, to see what it is worth; now and then decode plainly, to
        compare. None: as it pays again.
        """
        self._trying = next((arm for arm in self._arms if arm.drafter.name == way), None)

    def begin(self, prompt: Sequence[int], session: Session) -> None:
        for text in self._texts:
            text.reset(prompt, session.source)
        self._overheard.take()  # of a generation that was abandoned
        self._generated, self._gained, self._length = 0, 0.0, None
        for arm in self._arms:
            arm.wake()

    def next(self, remaining: int) -> Choice:
        self._chosen, self._stake = None, 0.0
        if self._length is None:
            self._length = remaining
        if self._plain_rounds < _WARM_UP:
            return Choice()
        if self._trying is not None:
            self._tried += 1
            if self._tried % _COMPARED:
                self._chosen, self._stake = self._trying, math.inf
        else:
            best = max(filter(self._may_take, self._arms), key=lambda arm: arm.hoped, default=None)
            if best is not None and best.hoped > 1.0:
                self._chosen, self._stake = best, self._account(best) + self._lent(best) * _STAKE
        drafter = None if self._chosen is None else self._chosen.drafter
        return Choice(drafter, self._stake * self._seconds)

    def learn(self, outcome: Outcome) -> None:
        arm, fresh = self._chosen, outcome.observation.fresh
        self._generated += fresh
        if arm is None:
            self._learn_plain(min(outcome.seconds, _OUTLIER * self._seconds))
            self._gained += _SHARE * fresh
            return
        usual = arm.generation.price / max(1.0, arm.generation.rounds)
        foreseen = max(usual, 1.0 + min(self._stake, _STAKE)) * self._seconds
        seconds = min(outcome.seconds, _OUTLIER * foreseen)
        if isinstance(arm.drafter, GatedDrafter) and outcome.drafted:
            predicted = self._costs.run(0, self._costs.last_exit, outcome.drafted + 1)
            arm.drafter.verified(outcome.accepted, predicted, seconds)
        began = time.perf_counter()
        arm.drafter.observe(outcome.observation)
        price = (seconds + time.perf_counter() - began) / self._seconds
        arm.update(fresh, price)
        self._overhear(outcome)
        self._gained += (1.0 + _SHARE) * fresh - price
        if arm.speedup < 1.0:
            arm.sleep(self._generated)
        elif arm.speedup > _GAIN:
            arm.nap = _FIRST_NAP

    def _learn_plain(self, seconds: float) -> None:
        """A round of plain decoding took so long."""
        self._plain_rounds += 1
        self._seconds += max(_MEMORY, 1.0 / (1.0 + self._plain_rounds)) * (seconds - self._seconds)

    def _overhear(self, outcome: Outcome) -> None:
        """A stage was shown a draft from text: what that alone would have yielded and taken is known by now."""
        heard, observation = self._overheard.take(), outcome.observation
        if heard is None:
            return
        cut = self._text.cut(heard.tree, heard.request)
        text = iter((*observation.context[-observation.fresh :], _NO_TOKEN))
        tokens = 1 + len(accept_greedy(cut, lambda _node: next(text)).accepted)
        seconds = self._costs.run(0, self._costs.last_exit, len(cut) + 1) + self._text.overhead
        beside = max(0.0, self._seconds - self._costs.plain)  # of a round, whatever is run in it
        self._text_arm.update(tokens, (seconds + beside) / self._seconds)

    def _account(self, arm: Arm) -> float:
        """Plain tokens that the arm may still lose in this generation."""
        return self._gained + self._lent(arm) * (_CREDIT + (_TRUST if arm.trusted else 0.0))

    def _lent(self, arm: Arm) -> float:
        """The share of what an arm may lose that this generation is long enough to win back with it."""
        gain = max(_TYPICAL, arm.gain if arm.trusted else 0.0)
        saved = (self._length or 0) * (1.0 - 1.0 / gain)
        return min(1.0, max(0.0, saved - _SHORT) / (_LONG - _SHORT))

    def _may_take(self, arm: Arm) -> bool:
        return arm.asleep_until <= self._generated and self._lent(arm) > 0.0 < self._account(arm)
