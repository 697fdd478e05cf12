"""`auto` on a simulated clock: plain where drafting loses, drafts where it gains, bad arms sleep."""

from __future__ import annotations

import numpy as np
import pytest

import skipstone.runtimes.generate as generate_module
import skipstone.runtimes.policies.auto as auto_module
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import DraftRequest, Observation
from skipstone.runtimes.generate import FixedPolicy, GenerationLimits, Outcome, Policy, Step, generate
from skipstone.runtimes.rows import RowTree
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.tree import TokenTree
from tests.runtimes.drafters_zoo import auto_policy
from tests.runtimes.toy_engine import FloatArray, ToyCache, ToyEngine, toy_costs

TOKENS = 300


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
    assert found >= 1.5
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
            drafter = policy.next().drafter
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


def test_without_a_draft_head_auto_drafts_from_text_alone(clock: Clock) -> None:
    engine = TimedEngine(
        seed=4, depth_scale=0.05, sharpness=6.0, draft_tokens=None, context_length=TOKENS + 8
    )
    engine.wild = False
    costs = toy_costs(engine, slope=0.0)
    engine.run_on(clock, costs)
    _, steps = seconds_per_token(auto_policy(engine, costs), engine, costs, clock)
    assert sum(step.accepted for step in steps) > TOKENS / 4
