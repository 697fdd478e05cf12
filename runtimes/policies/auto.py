"""`auto`: draft where the measured costs and the running acceptance say it pays, decode plainly elsewhere.

Every way to draft is an arm with a running rate (tokens per second, measured). A round takes the arm with the best
rate; plain decoding is an arm like the others. Three things keep the promise never to be slower than plain:

- within a round every draft is sized by expected gain (`CostModel.best_count`), and may come out empty;
- an arm that falls behind plain sleeps, twice as long each time; while all sleep nothing is computed but the model;
- every generation keeps an account in plain tokens: what drafting gained and lost. It opens with a small credit, a
  small share of every token is paid in, and once it is overdrawn only plain decoding goes on. An arm that has gained in
  generations of late is trusted: it gets more credit, and a few bad rounds do not send it to sleep.

The controller is of the kind ONNX Runtime GenAI uses for draft lengths (throughput averaged exponentially, probes with
a cooldown), over arms instead of lengths; DEL (arXiv 2504.05598) chooses exits by the same tokens-per-cost figure.
"""

from __future__ import annotations

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
_TRUST = 1.0  # more of them, for an arm that is trusted
_STAKE = 1.5  # plain tokens that a round may lose beyond the credit
_OUTLIER = 1.5  # a round this much slower than foreseen was interrupted from outside
_KNOWN = 8  # rounds after which an arm's rate says something
_HOPE = 1.05  # an untried arm is taken to be this much better than what it builds on


@dataclass(slots=True, eq=False)
class Arm:
    """One way to draft, and how it has been doing.

    Attributes:
        drafter: None for plain decoding.
        tokens, seconds: exponential means per round.
        rounds: how often it was taken.
        nap: tokens it will sleep next time.
        asleep_until: count of generated tokens at which it may be tried again.
        gains: its speed-up in the last generations that used it, short ones taken together.
        generation: rounds, tokens and seconds of the present one, and of short ones before.
    """

    drafter: Drafter | None
    tokens: float
    seconds: float
    rounds: int = 0
    nap: int = _FIRST_NAP
    asleep_until: int = 0
    gains: deque[float] = field(default_factory=lambda: deque(maxlen=_RECORDS))
    generation: tuple[int, float, float] = (0, 0.0, 0.0)

    @property
    def gain(self) -> float:
        """Its speed-up over all those generations, 0 where there were none."""
        return len(self.gains) / sum(1.0 / gain for gain in self.gains) if self.gains else 0.0

    @property
    def trusted(self) -> bool:
        """Whether drafting so has paid of late."""
        return self.gain >= _GAIN

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def update(self, tokens: int, seconds: float) -> None:
        """Take in one round; the first few weigh more."""
        self.rounds += 1
        weight = max(_MEMORY, 1.0 / (1.0 + self.rounds))
        self.tokens += weight * (tokens - self.tokens)
        self.seconds += weight * (seconds - self.seconds)
        so_far = self.generation
        self.generation = so_far[0] + 1, so_far[1] + tokens, so_far[2] + seconds

    def sleep(self, now: int) -> None:
        """Sleep for a while, longer each time in a row."""
        self.asleep_until = now + self.nap
        self.nap = min(2 * self.nap, _LONGEST_NAP)

    def wake(self, plain_rate: float) -> None:
        """A new text: what was bad for the last one may be good for this."""
        rounds, tokens, seconds = self.generation
        if rounds >= _RECORD_ROUNDS:
            self.gains.append(tokens / seconds / plain_rate)
            self.generation = 0, 0.0, 0.0
        self.asleep_until, self.nap = 0, _FIRST_NAP


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
        self._texts, self._costs = [text] if guided is None else [guided, text], costs
        self._plain = Arm(None, 1.0, costs.plain)
        self._lookups = [Arm(GatedDrafter(part), _HOPE, costs.plain) for part in self._texts]
        self._arms = [*self._lookups]
        if engine.draft_vocabulary is not None:
            self._arms += [Arm(EarlyExitDrafter(e, text), 1.0, costs.plain) for e in engine.exits[:-1]]
        self._chosen = self._plain
        self._generated, self._credit, self._stake = 0, _CREDIT, 0.0

    def begin(self, prompt: Sequence[int], session: Session) -> None:
        for text in self._texts:
            text.reset(prompt, session.source)
        self._generated, self._credit = 0, _CREDIT
        for arm in self._arms:
            arm.wake(self._plain.rate)

    def next(self) -> Choice:
        self._chosen, self._stake = self._plain, 0.0
        if self._plain.rounds >= _WARM_UP:
            best = max((arm for arm in self._arms if self._may_take(arm)), key=self._hoped_rate, default=None)
            if best is not None and self._hoped_rate(best) > self._plain.rate:
                self._chosen, self._stake = best, self._account(best) + _STAKE
        return Choice(self._chosen.drafter, self._stake * self._plain.seconds)

    def learn(self, outcome: Outcome) -> None:
        arm, fresh = self._chosen, outcome.observation.fresh
        self._generated += fresh
        if arm.drafter is None:
            arm.update(fresh, min(outcome.seconds, _OUTLIER * arm.seconds))
            self._credit += _SHARE * fresh
            return
        if not arm.rounds:
            arm.seconds = self._plain.seconds  # measured here, where the cost curve may have met a slow spell
        foreseen = max(arm.seconds, (1.0 + min(self._stake, _STAKE)) * self._plain.seconds)
        seconds = min(outcome.seconds, _OUTLIER * foreseen)
        if isinstance(arm.drafter, GatedDrafter) and outcome.drafted:
            predicted = self._costs.run(0, self._costs.last_exit, outcome.drafted + 1)
            arm.drafter.verified(outcome.accepted, predicted, seconds)
        began = time.perf_counter()
        arm.drafter.observe(outcome.observation)
        seconds += time.perf_counter() - began
        arm.update(fresh, seconds)
        self._credit += (1.0 + _SHARE) * fresh - seconds / self._plain.seconds
        if arm.rate < self._plain.rate:
            arm.sleep(self._generated)
            arm.tokens = _HOPE * arm.seconds * self._plain.rate  # wakes with the benefit of the doubt
        elif arm.rate > 1.1 * self._plain.rate:
            arm.nap = _FIRST_NAP

    def _account(self, arm: Arm) -> float:
        """Plain tokens that the arm may still lose in this generation."""
        return self._credit + (_TRUST if arm.trusted else 0.0)

    def _may_take(self, arm: Arm) -> bool:
        return self._account(arm) > 0.0 and (arm.trusted or arm.asleep_until <= self._generated)

    def _hoped_rate(self, arm: Arm) -> float:
        """The arm's rate; for a trusted one what it was in generations of late, if that is better.

        An untried lookup is taken to be a little better than plain decoding as it runs here (the cost curve may have
        been measured in a slower moment), an untried stage a little better than what it builds on.
        """
        if arm.rounds:
            return max(arm.rate, arm.gain * self._plain.rate) if arm.trusted else arm.rate
        if arm in self._lookups:
            return _HOPE * self._plain.rate
        known = max((lookup.rate for lookup in self._lookups if lookup.rounds >= _KNOWN), default=0.0)
        return _HOPE * max(_HOPE * self._plain.rate, known)
