"""`auto`: draft where the measured costs and the running acceptance say it pays, decode plainly elsewhere.

Every way to draft is an arm with a running rate (tokens per second, measured). A round takes the arm with the best
rate; plain decoding is an arm like the others. Three things keep the promise never to be slower than plain:

- within a round every draft is sized by expected gain (`CostModel.best_count`), and may come out empty;
- an arm that falls behind plain sleeps, twice as long each time;
- arms whose trial costs something may only be tried while the time lost on trials so far stays under a small share of
  all time spent.

The controller is of the kind ONNX Runtime GenAI uses for draft lengths (throughput averaged exponentially, probes with
a cooldown), over arms instead of lengths; DEL (arXiv 2504.05598) chooses exits by the same tokens-per-cost figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import Drafter, DraftRequest
from skipstone.runtimes.drafters.early_exit import EarlyExitDrafter
from skipstone.runtimes.drafters.gated import GatedDrafter
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.generate import Outcome
from skipstone.runtimes.session import Session

_MEMORY = 0.12  # weight of the newest round
_FIRST_NAP = 16  # tokens
_LONGEST_NAP = 1024
_LOSS_SHARE = 0.01  # of all time, that trials may cost
_OUTLIER = 3.0  # a round this much slower than its arm's mean was interrupted from outside
_HOPE = 1.05  # an untried arm is taken to be this much better than what it builds on


@dataclass(slots=True)
class Arm:
    """One way to draft, and how it has been doing.

    Attributes:
        drafter: None for plain decoding.
        tokens, seconds: exponential means per round.
        rounds: how often it was taken.
        nap: tokens it will sleep next time.
        asleep_until: count of generated tokens at which it may be tried again.
    """

    drafter: Drafter | None
    tokens: float
    seconds: float
    rounds: int = 0
    nap: int = _FIRST_NAP
    asleep_until: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def update(self, tokens: int, seconds: float) -> None:
        """Take in one round; the first few weigh more."""
        self.rounds += 1
        weight = max(_MEMORY, 1.0 / (1.0 + self.rounds))
        seconds = min(seconds, _OUTLIER * self.seconds)
        self.tokens += weight * (tokens - self.tokens)
        self.seconds += weight * (seconds - self.seconds)

    def sleep(self, now: int) -> None:
        """Sleep for a while, longer each time in a row."""
        self.asleep_until = now + self.nap
        self.nap = min(2 * self.nap, _LONGEST_NAP)


class AutoPolicy:
    """See `skipstone.runtimes.generate.Policy`. What it learned stays for the next generation.

    Args:
        engine: the target.
        costs: its cost model.
        text: drafts from text alone; the arms build on it.
    """

    def __init__(self, engine: Engine, costs: CostModel, text: Drafter) -> None:
        self._text = text
        self._plain = Arm(None, 1.0, costs.plain)
        self._gate = GatedDrafter(text)
        self._lookup = Arm(self._gate, _HOPE, costs.plain)
        self._costs = costs
        self._staged: list[Arm] = []
        if engine.draft_vocabulary is not None:
            self._staged = [Arm(EarlyExitDrafter(e, text), 1.0, costs.plain) for e in engine.exits[:-1]]
        self._generated = 0
        self._spent = self._lost = 0.0
        self._chosen = self._plain

    def begin(self, prompt: Sequence[int], session: Session) -> None:
        self._text.reset(prompt)

    def next(self, request: DraftRequest) -> Drafter | None:
        best = self._plain
        for arm in (self._lookup, *self._staged):
            if self._may_take(arm) and self._hoped_rate(arm) > best.rate:
                best = arm
        self._chosen = best
        return best.drafter

    def learn(self, outcome: Outcome) -> None:
        if outcome.observation is None:
            return
        arm, fresh = self._chosen, outcome.observation.fresh
        drafter = arm.drafter or self._text
        drafter.observe(outcome.observation)
        self._generated += fresh
        self._spent += outcome.seconds
        arm.update(fresh, outcome.seconds)
        if arm is self._plain:
            return
        if arm is self._lookup and outcome.drafted:
            self._gate.clocked(
                self._costs.run(0, self._costs.last_exit, outcome.drafted + 1), outcome.seconds
            )
        elif arm is not self._lookup:
            reference = max(self._plain.rate, self._lookup.rate if self._lookup.rounds else 0.0)
            self._lost = max(0.0, self._lost + outcome.seconds - fresh / reference)
        if arm.rate < self._plain.rate:
            arm.sleep(self._generated)
            arm.tokens = _HOPE * arm.seconds * self._plain.rate  # wakes with the benefit of the doubt
        elif arm.rate > 1.1 * self._plain.rate:
            arm.nap = _FIRST_NAP

    def _may_take(self, arm: Arm) -> bool:
        """Awake, and cheap to try or within the budget for trials."""
        if self._generated < arm.asleep_until:
            return False
        return arm is self._lookup or arm.rounds >= 3 or self._lost <= _LOSS_SHARE * self._spent

    def _hoped_rate(self, arm: Arm) -> float:
        """The arm's rate, or for an untried stage a little more than what it builds on."""
        if arm.rounds or arm is self._lookup:
            return arm.rate
        return _HOPE * self._lookup.rate if self._lookup.rounds >= 8 else 0.0
