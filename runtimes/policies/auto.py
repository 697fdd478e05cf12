"""`auto`: draft where the measured costs and the running acceptance say it pays, decode plainly elsewhere.

Every way to draft is an arm with a running speed-up: measured tokens per round, over what the round took in tokens of
plain decoding. That is measured all along, so a machine that slows down changes nothing. A round takes the best arm,
those seldom tried with a bonus, or decodes plainly where none is hoped to be faster. Three things keep the promise
never to be slower than plain:

- within a round every draft is sized by expected gain (`CostModel.best_count`), and may come out empty;
- an arm that falls behind plain sleeps, twice as long each time; while all sleep nothing is computed but the model;
- every generation keeps an account in plain tokens: what drafting gained and lost. It opens with a small credit, a
  small share of every token is paid in, and once it is overdrawn only plain decoding goes on. An arm that has gained in
  generations of late is trusted: it gets more credit, and a few bad rounds do not send it to sleep.

The controller is of the kind ONNX Runtime GenAI uses for draft lengths (throughput averaged exponentially, probes with
a cooldown), over arms instead of lengths; DEL (arXiv 2504.05598) chooses exits by the same tokens-per-cost figure.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import Drafter
from skipstone.runtimes.drafters.early_exit import EarlyExitDrafter
from skipstone.runtimes.drafters.gated import GatedDrafter
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.generate import Choice, Outcome
from skipstone.runtimes.session import Session

_MEMORY = 0.12  # weight of the newest round
_WARM_UP = 3  # plain rounds that show what a token really costs here
_FIRST_NAP = 16  # tokens
_LONGEST_NAP = 1024
_RECORDS = 8  # generations whose gain is remembered
_RECORD_ROUNDS = 6  # rounds that make a gain worth remembering; shorter generations are counted together
_GAIN = 1.1  # speed-up over them that earns trust
_CREDIT = 0.5  # plain tokens that drafting may lose at once
_SHARE = 0.01  # of all tokens, that it may lose in the long run
_TRUST = 1.0  # more of them, for an arm that is trusted, times its gain
_STAKE = 1.5  # plain tokens that a round may lose beyond the credit
_OUTLIER = 1.5  # a round this much slower than foreseen was interrupted from outside
_HOPE = 1.05  # speed-up that an untried arm of text, and one that wakes, is taken to have; stages come before text
_CURIOSITY = 0.3  # share of its speed-up that an untried arm is given as a bonus
_KNOWN = 8  # rounds after which an arm is known; until then lesser ones, if trusted, pay for one in every generation


@dataclass(slots=True, eq=False)
class Arm:
    """One way to draft, and how it has been doing.

    Attributes:
        drafter: its drafter.
        tokens, price: exponential means per round; the price is in tokens of plain decoding.
        promise: the speed-up it was hoped to have before anything was known.
        rounds: how often it was taken.
        nap: tokens it will sleep next time.
        asleep_until: count of generated tokens at which it may be tried again.
        gains: its speed-up in the last generations that used it, short ones taken together.
        generation: rounds, tokens and price of the present one, and of short ones before.
        tried: whether the present generation has taken it.
    """

    drafter: Drafter
    promise: float = _HOPE
    tokens: float = field(init=False)
    price: float = 1.0
    rounds: int = 0
    nap: int = _FIRST_NAP
    asleep_until: int = 0
    gains: deque[float] = field(default_factory=lambda: deque(maxlen=_RECORDS))
    generation: tuple[int, float, float] = (0, 0.0, 0.0)
    tried: bool = False

    def __post_init__(self) -> None:
        self.tokens = self.promise

    @property
    def gain(self) -> float:
        """Its speed-up over all those generations, 0 where there were none."""
        return len(self.gains) / sum(1.0 / gain for gain in self.gains) if self.gains else 0.0

    @property
    def trusted(self) -> bool:
        """Whether drafting so has paid of late."""
        return self.gain >= _GAIN

    @property
    def speedup(self) -> float:
        """Over plain decoding."""
        return self.tokens / self.price

    @property
    def hoped(self) -> float:
        """The speed-up (of a trusted arm that of late generations, if it is better), and more the less it was tried."""
        seen = max(self.speedup, self.gain) if self.trusted else self.speedup
        return seen * (1.0 + _CURIOSITY / math.sqrt(1.0 + self.rounds))

    def update(self, tokens: int, price: float) -> None:
        """Take in one round; the first few weigh more."""
        self.rounds, self.tried = self.rounds + 1, True
        weight = max(_MEMORY, 1.0 / (1.0 + self.rounds))
        self.tokens += weight * (tokens - self.tokens)
        self.price += weight * (price - self.price)
        so_far = self.generation
        self.generation = so_far[0] + 1, so_far[1] + tokens, so_far[2] + price

    def sleep(self, now: int) -> None:
        """Sleep for a while, longer each time in a row."""
        self.asleep_until = now + self.nap
        self.nap = min(2 * self.nap, _LONGEST_NAP)
        self.tokens = _HOPE * self.price  # wakes with the benefit of the doubt

    def wake(self) -> None:
        """A new text: what was bad for the last one may be good for this."""
        rounds, tokens, price = self.generation
        if rounds >= _RECORD_ROUNDS:
            self.gains.append(tokens / price)
            self.generation = 0, 0.0, 0.0
        self.asleep_until, self.nap, self.tried = 0, _FIRST_NAP, False


class AutoPolicy:
    """See `skipstone.runtimes.generate.Policy`. What it learned stays for the next generation.

    Args:
        engine: the target.
        costs: its cost model.
        text: drafts from text alone; the arms build on it.
        guided: copies what the output may resemble, and is tried before all others; None where there is nothing.
    """

    def __init__(
        self, engine: Engine, costs: CostModel, text: Drafter, guided: Drafter | None = None
    ) -> None:
        self._texts, self._costs = [part for part in (guided, text) if part is not None], costs
        self._seconds, self._plain_rounds = costs.plain, 0  # of a plain token, and how many were measured
        self._arms = [Arm(GatedDrafter(text))]
        if engine.draft_vocabulary is not None:
            self._arms += [Arm(EarlyExitDrafter(e, text), _HOPE**2) for e in engine.exits[:-1]]
        if guided is not None:
            self._arms.append(Arm(GatedDrafter(guided), _HOPE**3))
        self._chosen: Arm | None = None
        self._generated, self._credit, self._stake = 0, _CREDIT, 0.0

    def begin(self, prompt: Sequence[int], session: Session) -> None:
        for text in self._texts:
            text.reset(prompt, session.source)
        self._generated, self._credit = 0, _CREDIT
        for arm in self._arms:
            arm.wake()

    def next(self) -> Choice:
        self._chosen, self._stake = None, 0.0
        if self._plain_rounds >= _WARM_UP:
            best = max(filter(self._may_take, self._arms), key=lambda arm: arm.hoped, default=None)
            if best is not None and best.trusted:
                best = self._unlucky(best) or best
            if best is not None and best.hoped > 1.0:
                self._chosen, self._stake = best, self._account(best) + _STAKE
        drafter = None if self._chosen is None else self._chosen.drafter
        return Choice(drafter, self._stake * self._seconds)

    def learn(self, outcome: Outcome) -> None:
        arm, fresh = self._chosen, outcome.observation.fresh
        self._generated += fresh
        if arm is None:
            self._learn_plain(min(outcome.seconds, _OUTLIER * self._seconds))
            self._credit += _SHARE * fresh
            return
        foreseen = max(arm.price, 1.0 + min(self._stake, _STAKE)) * self._seconds
        seconds = min(outcome.seconds, _OUTLIER * foreseen)
        if isinstance(arm.drafter, GatedDrafter) and outcome.drafted:
            predicted = self._costs.run(0, self._costs.last_exit, outcome.drafted + 1)
            arm.drafter.verified(outcome.accepted, predicted, seconds)
        began = time.perf_counter()
        arm.drafter.observe(outcome.observation)
        price = (seconds + time.perf_counter() - began) / self._seconds
        arm.update(fresh, price)
        self._credit += (1.0 + _SHARE) * fresh - price
        if arm.speedup < 1.0:
            arm.sleep(self._generated)
        elif arm.speedup > 1.1:
            arm.nap = _FIRST_NAP

    def _learn_plain(self, seconds: float) -> None:
        """A round of plain decoding took so long."""
        self._plain_rounds += 1
        self._seconds += max(_MEMORY, 1.0 / (1.0 + self._plain_rounds)) * (seconds - self._seconds)

    def _unlucky(self, best: Arm) -> Arm | None:
        """An arm that promised more than the best one, was hardly seen, and not in this generation: a few bad rounds
        do not tell its worth.
        """
        hardly = (arm for arm in self._arms if arm.rounds < _KNOWN and not arm.tried)
        return next((arm for arm in hardly if arm.promise > best.promise), None)

    def _account(self, arm: Arm) -> float:
        """Plain tokens that the arm may still lose in this generation."""
        return self._credit + (_TRUST * arm.gain if arm.trusted else 0.0)

    def _may_take(self, arm: Arm) -> bool:
        return self._account(arm) > 0.0 and (arm.trusted or arm.asleep_until <= self._generated)
