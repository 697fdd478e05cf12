"""`auto`: draft where measured speed says it pays, decode plainly elsewhere.

Every way to draft is an arm (`skipstone.runtimes.policies.arms`). What a round with it yields and takes, in tokens of
plain decoding, is measured all along, so a machine that slows down changes nothing. A round takes the best arm, those
seldom tried with a bonus, or decodes plainly where none is hoped to be faster. Four things keep the promise never to be
slower than plain:

- within a round every draft is sized by expected gain (`CostModel.best_count`), and may come out empty;
- an arm that falls behind plain in this text sleeps, twice as long each time; while all sleep nothing is computed but
  the model;
- every generation keeps an account in plain tokens: what drafting gained and lost. It opens with a small credit, a
  small share of every token is paid in, and once it is overdrawn only plain decoding goes on;
- an arm whose record is good is trusted to make up for a bad start and may lose more before it is stopped: to stop it
  then would only make sure of the loss. Nothing is lent where a generation is too short to make up for it.

What a stage is shown by the text drafter below it is held against the accepted tokens too: so drafting from text alone
is known for what it is worth while a stage is chosen, and the stage for what it adds to that.

The record can be kept, and given to the next process (`AutoPolicy.record`).

The controller is of the kind ONNX Runtime GenAI uses for draft lengths (throughput averaged exponentially, probes with
a cooldown), over arms instead of lengths, with the bonus of upper confidence bounds (UCB1, Auer et al. 2002, section 2)
for what is little known; DEL (arXiv 2504.05598) chooses exits by the same tokens-per-cost figure.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import Drafter
from skipstone.runtimes.drafters.early_exit import EarlyExitDrafter
from skipstone.runtimes.drafters.gated import GatedDrafter
from skipstone.runtimes.drafters.overheard import OverheardDrafter
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.generate import Choice, Outcome
from skipstone.runtimes.policies.arms import FIRST_NAP, GAIN, HOPE, Arm, Record
from skipstone.runtimes.session import Session
from skipstone.runtimes.verify import accept_greedy

_MEMORY = 0.12  # weight of the newest plain round
_WARM_UP = 3  # plain rounds that show what a token really costs here
_NO_TOKEN = -1
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


class AutoPolicy:
    """See `skipstone.runtimes.generate.Policy`. What it learned stays for the next generation.

    Args:
        engine: the target.
        costs: its cost model.
        text: drafts from text alone; the arms build on it.
        guided: copies what the output may resemble, and is tried before all others; None where there is nothing.
        record: what arms brought before, by their drafters' names; those it does not name begin anew.
        draft: makes a draft model's drafter with a given source; None where there is none.
    """

    def __init__(
        self,
        engine: Engine,
        costs: CostModel,
        text: Drafter,
        guided: Drafter | None = None,
        record: Mapping[str, Record] | None = None,
        draft: Callable[[Drafter], Drafter] | None = None,
    ) -> None:
        self._costs = costs
        self._seconds, self._plain_rounds = costs.plain, 0  # of a plain token, and how many were measured
        self._text, self._overheard = GatedDrafter(text), OverheardDrafter(text)
        self._text_arm = Arm(self._text)
        stages: list[Drafter] = []
        if engine.draft_vocabulary is not None:
            stages += [EarlyExitDrafter(exit_layer, self._overheard) for exit_layer in engine.exits[:-1]]
        model = None if draft is None else draft(self._overheard)
        if model is not None:
            stages.append(model)
        self._arms = [self._text_arm, *(Arm(stage, HOPE**2, self._text_arm) for stage in stages)]
        if guided is not None:
            self._arms.append(Arm(GatedDrafter(guided), HOPE**3))
        # a draft model resets its source along with itself
        self._texts = [part for part in (guided, model or self._overheard) if part is not None]
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
            arm.drafter.verified(outcome.accepted, predicted, seconds * self._costs.plain / self._seconds)
        began = time.perf_counter()
        arm.drafter.observe(outcome.observation)
        price = (seconds + time.perf_counter() - began) / self._seconds
        arm.update(fresh, price, self._overhear(outcome))
        self._gained += (1.0 + _SHARE) * fresh - price
        self._put_to_sleep()

    def _put_to_sleep(self) -> None:
        """Those that have fallen behind plain; where text alone does, so do the stages that add too little to it."""
        behind = [arm for arm in self._arms if arm.speedup < 1.0 and arm.asleep_until <= self._generated]
        if self._chosen is not None and self._chosen.speedup > GAIN:
            self._chosen.nap = FIRST_NAP
        for arm in behind:
            arm.sleep(self._generated)

    def _learn_plain(self, seconds: float) -> None:
        """A round of plain decoding took so long."""
        self._plain_rounds += 1
        self._seconds += max(_MEMORY, 1.0 / (1.0 + self._plain_rounds)) * (seconds - self._seconds)

    def _overhear(self, outcome: Outcome) -> Record:
        """A stage was shown a draft from text: what that alone would have yielded and taken is known by now."""
        heard, observation = self._overheard.take(), outcome.observation
        if heard is None:
            return Record()
        cut = self._text.cut(heard.tree, heard.request)
        text = iter((*observation.context[-observation.fresh :], _NO_TOKEN))
        tokens = 1 + len(accept_greedy(cut, lambda _node: next(text)).accepted)
        seconds = self._costs.run(0, self._costs.last_exit, len(cut) + 1) + self._text.overhead
        found = Record(1, tokens, seconds / self._costs.plain)
        self._text_arm.update(tokens, found.price)
        return found

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
