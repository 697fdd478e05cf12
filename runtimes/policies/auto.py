"""`auto`: draft where the measured costs and the running acceptance say it pays, decode plainly elsewhere.

Every way to draft is an arm with a running rate (tokens per second, measured). A round takes the arm with the best
rate; plain decoding is an arm like the others. Three things keep the promise never to be slower than plain:

- an arm starts from what the cost curve predicts for it, so hopeless ones are never tried;
- within a round every draft is sized by expected gain (`CostModel.best_count`), and may come out empty;
- an arm that falls behind plain sleeps, twice as long each time, and may only be tried again while the time lost on
  trials so far stays under a small share of all time spent.

The controller is of the kind ONNX Runtime GenAI uses for draft lengths (throughput averaged exponentially, probes with
a cooldown), over arms instead of lengths; DEL (arXiv 2504.05598) chooses exits by the same tokens-per-cost figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters import text_drafter
from skipstone.runtimes.drafters.base import Drafter, DraftRequest
from skipstone.runtimes.drafters.early_exit import EarlyExitDrafter
from skipstone.runtimes.drafters.gated import GatedDrafter
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.generate import Outcome
from skipstone.runtimes.session import Session

_MEMORY = 0.15  # weight of the newest round
_FIRST_NAP = 24  # tokens
_LONGEST_NAP = 1024
_LOSS_SHARE = 0.01  # of all time, that trials may cost
_PRIOR_AGREEMENT = 0.6  # of an early exit with the last one, before anything is known
_PRIOR_DRAFTS = 4
_OUTLIER = 3.0  # a round this much slower than its arm's mean was interrupted from outside


@dataclass(slots=True)
class Arm:
    """One way to draft, and how it has been doing.

    Attributes:
        drafter: None for plain decoding.
        tokens, seconds: exponential means per round.
        nap: tokens it will sleep next time.
        asleep_until: count of generated tokens at which it may be tried again.
    """

    drafter: Drafter | None
    tokens: float
    seconds: float
    nap: int = _FIRST_NAP
    asleep_until: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def update(self, tokens: int, seconds: float) -> None:
        """Take in one round."""
        seconds = min(seconds, _OUTLIER * self.seconds)
        self.tokens += _MEMORY * (tokens - self.tokens)
        self.seconds += _MEMORY * (seconds - self.seconds)


class AutoPolicy:
    """See `skipstone.runtimes.generate.Policy`. What it learned stays for the next generation.

    Args:
        engine: the target.
        costs: its cost model.
    """

    def __init__(self, engine: Engine, costs: CostModel) -> None:
        text = text_drafter("prompt-lookup+recycling", engine.vocab_size)
        self._text = text
        self._plain = Arm(None, 1.0, costs.plain)
        self._arms = [self._plain, Arm(GatedDrafter(text), *_text_prior(costs))]
        if engine.draft_vocabulary is not None:
            self._arms += [Arm(EarlyExitDrafter(e, text), *_exit_prior(costs, e)) for e in engine.exits[:-1]]
        self._generated = 0
        self._spent = self._lost = 0.0
        self._chosen = self._plain

    def begin(self, prompt: Sequence[int], session: Session) -> None:
        self._text.reset(prompt)

    def next(self, request: DraftRequest) -> Drafter | None:
        may_try = self._lost <= _LOSS_SHARE * self._spent
        best = self._plain
        for arm in self._arms[1:]:
            awake = self._generated >= arm.asleep_until and (may_try or arm.nap == _FIRST_NAP)
            if awake and arm.rate > best.rate:
                best = arm
        self._chosen = best
        return best.drafter

    def learn(self, outcome: Outcome) -> None:
        if outcome.observation is None:
            return
        arm, fresh = self._chosen, outcome.observation.fresh
        self._text.observe(outcome.observation)
        self._generated += fresh
        self._spent += outcome.seconds
        if outcome.drafted == 0 and arm.drafter is not None and outcome.drafter is not None:
            pass  # an empty draft: nearly a plain round, counted for the arm below
        arm.update(fresh, outcome.seconds)
        if arm is self._plain:
            return
        self._lost = max(0.0, self._lost + outcome.seconds - fresh * self._plain.seconds)
        if arm.rate < self._plain.rate:
            arm.asleep_until = self._generated + arm.nap
            arm.nap = min(2 * arm.nap, _LONGEST_NAP)
            arm.tokens, arm.seconds = 1.02 * arm.seconds / self._plain.seconds, arm.seconds
        elif arm.rate > 1.1 * self._plain.rate:
            arm.nap = _FIRST_NAP


def _text_prior(costs: CostModel) -> tuple[float, float]:
    """Expected tokens and seconds of a round that drafts from the text alone: about a plain one."""
    return 1.05, costs.plain


def _exit_prior(costs: CostModel, exit_layer: int) -> tuple[float, float]:
    """Expected tokens and seconds of a round that drafts with an early exit."""
    tokens = sum(_PRIOR_AGREEMENT**n for n in range(_PRIOR_DRAFTS + 1))
    drafting = _PRIOR_DRAFTS * costs.draft(0, exit_layer, 1)
    return tokens, drafting + costs.run(exit_layer, costs.last_exit, _PRIOR_DRAFTS + 1)
