"""`auto` on a simulated clock: plain where drafting loses, drafts where it gains, bad arms sleep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest

import skipstone.runtimes.generate as generate_module
import skipstone.runtimes.policies.auto as auto_module
from skipstone.bundle import CostCurve
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters import text_drafter
from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.drafters.draft_model import DraftModelDrafter
from skipstone.runtimes.drafters.gated import GatedDrafter
from skipstone.runtimes.generate import Choice, FixedPolicy, GenerationLimits, Outcome, Policy, Step, generate
from skipstone.runtimes.policies.arms import Record
from skipstone.runtimes.policies.auto import AutoPolicy
from skipstone.runtimes.rows import RowTree
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.tree import TokenTree
from tests.runtimes.drafters_zoo import auto_policy
from tests.runtimes.toy_engine import FloatArray, ToyCache, ToyEngine, toy_costs

TOKENS = 300
LONG = 300  # tokens still to come


class Clock:
    """Stands where `time` stands in the generation loop."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class TimedCache(ToyCache):
    """Moves the clock by what a batch costs."""

    clock: Clock
    costs: CostModel

    def run(self, segment, rows, hidden, wanted) -> FloatArray:  # type: ignore[no-untyped-def]
        exits = (0, *self.engine.exits)
        self.clock.now += self.costs.run(exits[segment], exits[segment + 1], len(rows))
        return super().run(segment, rows, hidden, wanted)

    def draft_logits(self, hidden) -> FloatArray:  # type: ignore[no-untyped-def]
        self.clock.now += self.costs.draft(2, 2, len(hidden))
        return super().draft_logits(hidden)


class TimedEngine(ToyEngine):
    """A toy engine whose time passes as a cost model says."""

    wild = False

    def run_on(self, clock: Clock, costs: CostModel) -> TimedEngine:
        self.clock, self.costs = clock, costs
        return self

    def open_cache(self, context_length: int, tree: RowTree) -> TimedCache:
        cache = TimedCache(self, tree, context_length)
        cache.clock, cache.costs = self.clock, self.costs
        return cache


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (generate_module, auto_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


def seconds_per_token(
    policy: Policy, engine: TimedEngine, believed: CostModel, clock: Clock
) -> tuple[float, list[Step]]:
    """Time per token of a long generation, and its rounds."""
    session = Session(engine, engine.max_context_length)
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=0)) if engine.wild else Sampler(SamplingConfig())
    steps = generate(session, [1, 2, 3, 4], policy, sampler, GenerationLimits(TOKENS + 1), believed)
    first = [next(steps)]
    began = clock.now
    rest = list(steps)
    return (clock.now - began) / sum(len(step.tokens) for step in rest), first + rest


def engine_like(kind: str) -> TimedEngine:
    """`copying` repeats itself and its exits agree; `wild` text is drawn at random and repeats nothing."""
    wild = kind == "wild"
    engine = TimedEngine(
        seed=4,
        vocab_size=200 if wild else 24,
        depth_scale=3.0 if wild else 0.05,
        sharpness=0.5 if wild else 6.0,
        context_length=TOKENS + 8,
    )
    engine.wild = wild
    return engine


def speed_up(
    kind: str, clock: Clock, true: dict[str, float], believed: dict[str, float] | None = None
) -> tuple[float, list[Step]]:
    """Speed-up of `auto` over plain decoding where batches cost `true` and the curve says `believed`."""
    engine = engine_like(kind)
    engine.run_on(clock, toy_costs(engine, **true))
    costs = toy_costs(engine, **(believed or true))
    plain, _ = seconds_per_token(FixedPolicy(None), engine, costs, clock)
    auto, steps = seconds_per_token(auto_policy(engine, costs), engine, costs, clock)
    return plain / auto, steps


@pytest.mark.parametrize("kind", ["wild", "copying"])
def test_where_every_row_costs_full_price_auto_is_as_fast_as_plain(kind: str, clock: Clock) -> None:
    found, steps = speed_up(kind, clock, {"slope": 1.0, "head": 0.3})
    assert found >= 0.97
    assert sum(1 for step in steps if not step.drafted) >= 0.9 * len(steps)


def test_on_text_that_cannot_be_guessed_auto_is_as_fast_as_plain(clock: Clock) -> None:
    found, _ = speed_up("wild", clock, {"slope": 0.15})
    assert found >= 0.97


def test_where_further_rows_are_free_auto_drafts_and_gains(clock: Clock) -> None:
    found, steps = speed_up("copying", clock, {"slope": 0.0})
    assert found >= 1.4
    assert sum(step.accepted for step in steps) > TOKENS / 3


@pytest.mark.parametrize("kind", ["wild", "copying"])
def test_a_curve_that_promises_too_much_is_found_out(kind: str, clock: Clock) -> None:
    true, believed = {"slope": 0.5, "head": 0.3}, {"slope": 0.1, "head": 0.1}
    found, steps = speed_up(kind, clock, true, believed)
    assert found >= 0.93
    assert sum(1 for step in steps if not step.drafted) >= 0.9 * len(steps)


def request_for(engine: ToyEngine, costs: CostModel) -> DraftRequest:
    session = Session(engine, 40)
    return DraftRequest([1, 2, 3], session, Sampler(SamplingConfig()), 10, costs)


def test_an_arm_that_turns_bad_sleeps_and_is_tried_again_ever_more_seldom() -> None:
    engine = ToyEngine()
    costs = toy_costs(engine)
    policy, asked = auto_policy(engine, costs), request_for(ToyEngine(), costs)
    policy.begin([1, 2, 3], asked.session)
    context = [1, 2, 3]

    def play(rounds: int, tokens_when_drafting: int) -> list[bool]:
        drafted = []
        for _ in range(rounds):
            drafter = policy.next(LONG).drafter
            fresh = 1 if drafter is None else tokens_when_drafting
            seconds = costs.plain * (1.0 if drafter is None else 1.6)
            context.extend([5] * fresh)
            logits = [np.zeros(engine.vocab_size, np.float32)]
            seen = Observation(list(context), fresh, TokenTree(), (), [5], logits)
            policy.learn(Outcome(drafter, 4, fresh - 1, seconds, seen))
            drafted.append(drafter is not None)
        return drafted

    assert sum(play(60, tokens_when_drafting=4)) > 55, "an arm that pays is kept"
    play(40, tokens_when_drafting=1)  # finding out
    bad = play(1_000, tokens_when_drafting=1)
    assert sum(bad) < 30
    first, second = sum(bad[:500]), sum(bad[500:])
    assert second <= first
    assert sum(play(3_000, tokens_when_drafting=4)) > 1_500, "an arm that pays again comes back"


def with_draft_model(clock: Clock, price: float) -> tuple[float, list[Step]]:
    """Speed-up of `auto` on drawn text with a twin of the model to draft for it, at a part of its price."""
    engine, twin = (
        TimedEngine(seed=4, depth_scale=3.0, sharpness=2.0, context_length=TOKENS + 8) for _ in range(2)
    )
    engine.wild = twin.wild = True
    engine.run_on(clock, toy_costs(engine, slope=0.05))
    widths = (1, 32)
    seconds = tuple(1e-3 * price * (1.0 + 0.05 * (width - 1)) for width in widths)
    curve = CostCurve(widths=widths, segments=(seconds,) * 3, threads=1, machine="toy")
    twin.run_on(clock, CostModel(curve, twin.exits))
    text = text_drafter("prompt-lookup", engine.vocab_size)
    session = Session(twin)
    plain, _ = seconds_per_token(FixedPolicy(None), engine, engine.costs, clock)
    policy = AutoPolicy(
        engine,
        engine.costs,
        text,
        draft=lambda source: DraftModelDrafter(session, twin.costs, "twin", source),
    )
    auto, steps = seconds_per_token(policy, engine, engine.costs, clock)
    session.close()
    found = policy.record["n-gram → twin"]
    assert price == 1.0 or found.text_price > 0, "it is known what text alone would have brought"
    return plain / auto, steps


def test_a_draft_model_that_is_cheap_and_right_is_used_instead_of_exits_and_text(clock: Clock) -> None:
    speedup, steps = with_draft_model(clock, price=0.1)
    assert speedup > 1.2
    used = Counter(step.drafter for step in steps if step.drafter)
    assert used.most_common(1)[0][0] == "n-gram → twin"


def test_a_draft_model_as_dear_as_the_model_costs_next_to_nothing(clock: Clock) -> None:
    speedup, _ = with_draft_model(clock, price=1.0)
    assert speedup > 0.97


def test_what_was_learned_stays_for_the_next_generation(clock: Clock) -> None:
    engine = engine_like("copying")
    costs = toy_costs(engine, slope=0.0)
    engine.run_on(clock, costs)
    policy = auto_policy(engine, costs)
    first, opening = seconds_per_token(policy, engine, costs, clock)
    second, reopening = seconds_per_token(policy, engine, costs, clock)
    assert [step.drafter for step in opening[1:4]] == ["", "", ""], "the first rounds show what plain costs"
    assert all(step.drafter for step in reopening[1:4])
    assert second <= 1.05 * first


@pytest.mark.parametrize("kind", ["wild", "copying"])
def test_text_alone_is_known_for_what_it_is_worth_while_a_stage_drafts(kind: str, clock: Clock) -> None:
    """What it says to the stage, against the speed of a generation that it drafted for alone."""
    engine = engine_like(kind)
    costs = toy_costs(engine, slope=0.15)
    engine.run_on(clock, costs)
    plain, _ = seconds_per_token(FixedPolicy(None), engine, costs, clock)
    text = GatedDrafter(text_drafter("prompt-lookup+recycling", engine.vocab_size))
    alone, _ = seconds_per_token(FixedPolicy(text), engine, costs, clock)
    policy = auto_policy(engine, costs)
    policy.try_only("n-gram+recycling → exit 2")
    _, steps = seconds_per_token(policy, engine, costs, clock)
    assert not any(step.drafter == "n-gram+recycling" for step in steps)
    found = policy.record["n-gram+recycling"]
    assert found.rounds > 20
    assert found.tokens / found.price == pytest.approx(plain / alone, rel=0.15)


def test_a_generation_that_was_abandoned_says_nothing_of_the_next(clock: Clock) -> None:
    engine = engine_like("copying")
    costs = toy_costs(engine, slope=0.15)
    engine.run_on(clock, costs)
    policy = auto_policy(engine, costs)
    policy.try_only("n-gram+recycling → exit 2")
    session = Session(engine, engine.max_context_length)
    text = [1, 2, 3, 4, 1, 2, 3]
    seen = Observation([*text, 4], 1, TokenTree(), (), [3], [np.zeros(engine.vocab_size, np.float32)])

    def next_drafter() -> Drafter:
        while (drafter := policy.next(LONG).drafter) is None:
            policy.learn(Outcome(None, 0, 0, costs.plain, seen))
        return drafter

    policy.begin(text, session)
    session.prefill(text)
    next_drafter().propose(DraftRequest([*text, 4], session, Sampler(SamplingConfig()), 8, costs))
    session.discard()
    policy.begin(text, session)
    policy.learn(Outcome(next_drafter(), 0, 0, costs.plain, seen))
    assert policy.record["n-gram+recycling"].rounds == 0


def test_without_a_draft_head_auto_drafts_from_text_alone(clock: Clock) -> None:
    engine = TimedEngine(
        seed=4, depth_scale=0.05, sharpness=6.0, draft_tokens=None, context_length=TOKENS + 8
    )
    engine.wild = False
    costs = toy_costs(engine, slope=0.0)
    engine.run_on(clock, costs)
    _, steps = seconds_per_token(auto_policy(engine, costs), engine, costs, clock)
    assert sum(step.accepted for step in steps) > TOKENS / 4


def test_what_arms_have_brought_can_be_given_to_another_policy() -> None:
    engine = ToyEngine()
    first = auto_policy(engine, toy_costs(engine))
    arm = first._arms[-1]
    for _ in range(12):
        arm.update(3, 1.5)
    found = first.record
    assert found[arm.drafter.name] == Record(12, 36, 18)
    assert list(found) == [one.drafter.name for one in first._arms]
    second = auto_policy(engine, toy_costs(engine), found)
    assert [one.trusted for one in second._arms] == [False] * (len(second._arms) - 1) + [True]


@pytest.mark.parametrize(("slower", "extra"), [(1.0, 0.0), (3.0, 0.0), (1.0, 0.5), (2.0, 0.5)])
def test_a_draft_is_dear_by_what_its_round_takes_beyond_the_curve_on_a_machine_as_slow_as_plain_shows(
    slower: float, extra: float
) -> None:
    engine = ToyEngine()
    costs = toy_costs(engine)
    policy, session = auto_policy(engine, costs), request_for(engine, costs).session
    policy.begin([1, 2, 3], session)
    drafted, context = 4, [1, 2, 3]
    policy.try_only("n-gram+recycling")
    for _ in range(200):
        drafter = policy.next(LONG).drafter
        count = 0 if drafter is None else drafted
        seconds = costs.run(0, costs.last_exit, count + 1) + (extra * costs.plain if count else 0.0)
        context.append(5)
        seen = Observation(list(context), 1, TokenTree(), (), [5], [np.zeros(engine.vocab_size, np.float32)])
        policy.learn(Outcome(drafter, count, 0, slower * seconds, seen))
    assert policy._text.overhead == pytest.approx(extra * costs.plain, abs=0.03 * costs.plain)


@pytest.mark.usefixtures("clock")
def test_a_machine_that_slows_down_changes_no_arms_speed_up() -> None:
    """An arm that was bad while plain decoding was slow is tried again in the next text, on a machine twice as fast."""
    rounds = Rounds()
    for _ in range(3):
        rounds.play(2, 6.0, plain_seconds=2.0)
    assert rounds.play(2, 6.0, plain_seconds=2.0).drafter is not None  # 3 plain tokens for 2
    for _ in range(30):
        rounds.play(2, 3.0, plain_seconds=1.0)
    rounds.begin()
    assert rounds.play(2, 1.0).drafter is not None


class Rounds:
    """Plays rounds with a policy: `draft(tokens, seconds)` where it drafts, plain ones of a second where it does not."""

    def __init__(self, record: Mapping[str, Record] | None = None) -> None:
        engine = ToyEngine()
        costs = toy_costs(engine)
        self.policy, self.session = auto_policy(engine, costs, record), request_for(engine, costs).session
        self.second = costs.plain
        self._logits = [np.zeros(engine.vocab_size, np.float32)]
        self.begin()

    def begin(self) -> None:
        self.context = [1, 2, 3]
        self.policy.begin(self.context, self.session)

    def play(self, tokens: int, seconds: float, plain_seconds: float = 1.0) -> Choice:
        """One round: what it yields if it drafts, and how long it takes; times in plain tokens."""
        choice = self.policy.next(LONG)
        fresh, took = (1, plain_seconds) if choice.drafter is None else (tokens, seconds)
        self.context += [5] * fresh
        seen = Observation(list(self.context), fresh, TokenTree(), (), [5], self._logits)
        self.policy.learn(Outcome(choice.drafter, 0, fresh - 1, took * self.second, seen))
        return choice

    def next_name(self) -> str:
        """Of the drafter that the next round takes, "" for plain decoding; asking changes nothing."""
        drafter = self.policy.next(LONG).drafter
        return "" if drafter is None else drafter.name

    def plain_rounds_until_a_draft(self, most: int) -> int:
        return next((count for count in range(most) if self.play(2, 1.0).drafter is not None), most)


@pytest.mark.usefixtures("clock")
def test_a_round_may_lose_the_credit_and_the_stake_and_more_once_the_arm_is_trusted() -> None:
    rounds = Rounds()
    assert rounds.plain_rounds_until_a_draft(10) == 3
    rounds.begin()
    earned = rounds.policy.next(LONG).allowance / rounds.second
    assert earned == pytest.approx(1.0 + 1.5)
    for _ in range(20):
        rounds.begin()
        assert all(rounds.play(2, 1.4).drafter is not None for _ in range(8))
    rounds.begin()
    assert rounds.policy.next(LONG).allowance / rounds.second == pytest.approx(1.0 + 20 + 1.5)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("tokens", "length", "lent"),
    [(2, 12, 0.0), (2, 24, 0.0), (2, 48, 1 / 3), (2, 96, 1.0), (6, 8, 0.0), (6, 24, 0.43)],
    ids=str,
)
def test_a_generation_too_short_to_make_up_for_a_loss_risks_less(
    tokens: int, length: int, lent: float
) -> None:
    rounds = Rounds()
    for _ in range(20):
        rounds.begin()
        for _ in range(8):
            rounds.play(tokens, 1.4)
    rounds.begin()
    choice = rounds.policy.next(length)
    assert (choice.drafter is not None) == (lent > 0)
    if lent:
        assert choice.allowance / rounds.second == pytest.approx(lent * (1.0 + 20 + 1.5), rel=0.02)
        assert rounds.policy.next(2).allowance == choice.allowance  # towards its end as at its start


@pytest.mark.usefixtures("clock")
def test_a_trusted_arm_is_taken_up_at_once_and_outlasts_a_bad_start() -> None:
    rounds = Rounds()
    for _ in range(20):
        rounds.begin()
        for _ in range(8):
            rounds.play(3, 1.5)
    rounds.begin()
    assert [rounds.play(1, 2.0).drafter is None for _ in range(12)] == [False] * 12


@pytest.mark.usefixtures("clock")
def test_an_arm_that_began_badly_is_tried_again_at_the_cost_of_one_that_is_trusted() -> None:
    rounds, seen, taken = Rounds(), 0, []
    for _ in range(60):
        rounds.begin()
        for _ in range(8):
            name = rounds.next_name()
            seen += "exit" in name
            good = 8 if seen > 2 else 1
            rounds.play(good if "exit" in name else 3, 1.5)
            taken.append(name)
    assert sum("exit" in name for name in taken[-80:]) > 70


@pytest.mark.usefixtures("clock")
def test_an_arm_that_stays_bad_is_not_tried_for_ever() -> None:
    rounds, taken = Rounds(), []
    for _ in range(60):
        rounds.begin()
        for _ in range(8):
            taken.append(rounds.next_name())
            rounds.play(1 if "exit" in taken[-1] else 3, 1.5)
    assert 4 <= sum("exit" in name for name in taken) <= 40  # of two exits
    assert not any("exit" in name for name in taken[-80:])


@pytest.mark.usefixtures("clock")
def test_a_stage_is_tried_before_the_text_that_it_builds_on() -> None:
    rounds = Rounds()
    for _ in range(3):
        assert rounds.play(2, 1.5).drafter is None
    drafter = rounds.play(2, 1.5).drafter
    assert drafter is not None
    assert "exit" in drafter.name


@pytest.mark.usefixtures("clock")
def test_after_an_overdraft_only_plain_goes_on_until_it_is_paid_back() -> None:
    """A hundredth of every token is paid in, so a loss of 0.86 beyond the credit takes 86 tokens."""
    rounds = Rounds()
    for _ in range(3):
        assert rounds.play(1, 2.9).drafter is None
    assert rounds.play(1, 2.9).drafter is not None  # 1.0 + 0.03 + 1.01 - 2.9 = -0.86
    assert rounds.plain_rounds_until_a_draft(200) == pytest.approx(86, abs=2)


@pytest.mark.usefixtures("clock")
def test_every_generation_opens_with_its_own_credit() -> None:
    rounds = Rounds()
    for _ in range(4):
        rounds.play(1, 2.9)
    rounds.begin()
    assert rounds.play(2, 1.0).drafter is not None


@pytest.mark.usefixtures("clock")
def test_a_round_interrupted_from_outside_is_not_the_drafters_fault() -> None:
    rounds = Rounds()
    for _ in range(4):
        rounds.play(3, 1_000.0)
    assert rounds.plain_rounds_until_a_draft(400) < 300
    rounds = Rounds()
    for _ in range(3):
        rounds.play(3, 1.0, plain_seconds=1_000.0)
    assert rounds.policy.next(LONG).allowance < 10 * rounds.second


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("adds", "sleeps"), [(0.9, True), (1.8, False)])
def test_stages_that_add_too_little_sleep_with_the_text_that_they_build_on(adds: float, sleeps: bool) -> None:
    """Text alone has gained 1.5 and gains nothing here; so a stage that took a tenth away gains nothing either."""
    text, stage = Record(60, 120, 80), Record(60, 120 * adds, 80, 120, 80)
    ways = auto_policy(ToyEngine(), toy_costs(ToyEngine())).ways
    rounds = Rounds({way: stage if "exit" in way else text for way in ways})
    for _ in range(3):
        rounds.play(1, 1.0)
    (arm,) = (arm for arm in rounds.policy._arms if "exit" not in arm.drafter.name)
    rounds.policy._chosen = arm
    while arm.speedup >= 1.0:
        arm.update(1, 2.0)
    rounds.policy._put_to_sleep()
    assert (rounds.next_name() == "") is sleeps
