"""On the toy engine, whatever drafts: greedy tokens are plain decoding's and sampled ones the target's."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipstone.errors import ContextFullError, UsageError
from skipstone.runtimes import verify
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters import text_drafter
from skipstone.runtimes.drafters.base import DraftRequest
from skipstone.runtimes.drafters.early_exit import EarlyExitDrafter
from skipstone.runtimes.drafters.growth import GrowthOptions
from skipstone.runtimes.generate import Choice, FixedPolicy, GenerationLimits, Policy, Step, generate
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.tree import TokenTree
from tests.runtimes.chi_square import goodness_of_fit
from tests.runtimes.drafters_zoo import DRAFTERS, RandomDrafter, auto_policy
from tests.runtimes.test_verify import choose_from_p_after_refusal
from tests.runtimes.toy_engine import ToyEngine, plain_tokens, toy_costs

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4]
ENGINE = ToyEngine(depth_scale=0.3, sharpness=2.5)
EXITS_AGREE = ToyEngine(seed=4, depth_scale=0.05, sharpness=4.0)


@dataclass
class Setting:
    """One generation's circumstances."""

    engine: ToyEngine
    prompt: list[int]
    max_new_tokens: int
    eos: tuple[int, ...]
    context_length: int
    penalty: float
    costs: CostModel
    options: GrowthOptions


@st.composite
def circumstances(draw: st.DrawFn) -> Setting:
    engine = draw(st.sampled_from([ENGINE, EXITS_AGREE]))
    prompt = draw(st.lists(st.integers(0, 23), min_size=1, max_size=12))
    options = GrowthOptions(
        branching=draw(st.integers(1, 5)),
        guesses=draw(st.integers(0, 8)),
        passes=draw(st.integers(1, 6)),
        length=draw(st.none() | st.integers(1, 4)),
        confidence=draw(st.sampled_from([0.0, 0.4])),
    )
    return Setting(
        engine,
        prompt,
        max_new_tokens=draw(st.integers(1, 24)),
        eos=tuple(draw(st.lists(st.integers(0, 23), max_size=3))),
        context_length=len(prompt) + draw(st.integers(0, 30)),
        penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.8])),
        costs=toy_costs(engine, slope=draw(st.sampled_from([0.0, 0.02, 0.2, 1.0]))),
        options=options,
    )


def run(
    setting: Setting, policy: Policy, session: Session, seed: int = 0, temperature: float = 0.0
) -> Iterator[Step]:
    sampler = Sampler(SamplingConfig(temperature=temperature, repetition_penalty=setting.penalty, seed=seed))
    limits = GenerationLimits(setting.max_new_tokens, setting.eos)
    return generate(session, setting.prompt, policy, sampler, limits, setting.costs)


def tokens_of(steps: Sequence[Step]) -> list[int]:
    return [token for step in steps for token in step.tokens]


def next_logits(session: Session) -> object:
    (row,) = session.push([1])
    return session.advance([row], session.exits[-1])[0]


def assert_as_plain(setting: Setting, policy: Policy, stop_after: int | None = None) -> list[Step]:
    """Tokens, stop reason and the state left behind are those of plain decoding."""
    session, plain_session = (Session(setting.engine, setting.context_length) for _ in range(2))
    plain = list(run(setting, FixedPolicy(None), plain_session))
    steps = run(setting, policy, session)
    taken = list(itertools.islice(steps, stop_after))
    steps.close()  # type: ignore[attr-defined]
    expected = tokens_of(plain)[: len(tokens_of(taken))]
    assert tokens_of(taken) == expected
    if stop_after is None:
        assert expected == tokens_of(plain)
        assert taken[-1].stop == plain[-1].stop
    assert list(session.tokens) == [*setting.prompt, *expected[:-1]]
    assert session.pending == 0
    plain_session.rewind(session.length)
    if session.room:
        np.testing.assert_allclose(next_logits(session), next_logits(plain_session), atol=1e-5)
    return taken


@given(setting=circumstances())
@settings(max_examples=15, deadline=None)
def test_plain_generation_is_greedy_decoding_by_definition(setting: Setting) -> None:
    setting.penalty = 1.0
    session = Session(setting.engine, setting.context_length)
    steps = list(run(setting, FixedPolicy(None), session))
    count = setting.max_new_tokens
    expected = plain_tokens(setting.engine, setting.prompt, count, setting.eos, setting.context_length)
    assert tokens_of(steps) == expected
    if expected[-1] in setting.eos:
        assert steps[-1].stop == "eos"
    else:
        assert steps[-1].stop == ("length" if len(expected) == count else "context")


@pytest.mark.parametrize("name", DRAFTERS)
@given(setting=circumstances())
@settings(max_examples=15, deadline=None)
def test_greedy_tokens_are_plain_decodings_whatever_drafts(name: str, setting: Setting) -> None:
    drafter = DRAFTERS[name](setting.engine, setting.options)
    for step in assert_as_plain(setting, FixedPolicy(drafter)):
        assert step.accepted <= len(step.tokens)
        assert step.drafted <= 31
    drafter.close()


@given(setting=circumstances())
@settings(max_examples=15, deadline=None)
def test_greedy_tokens_are_plain_decodings_under_auto(setting: Setting) -> None:
    assert_as_plain(setting, auto_policy(setting.engine, setting.costs))


@pytest.mark.parametrize("name", ["random", "text → exit 2 → exit 4", "text → twin"])
@given(setting=circumstances(), stop_after=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_an_abandoned_generation_leaves_the_session_as_plain_decoding_would(
    name: str, setting: Setting, stop_after: int
) -> None:
    drafter = DRAFTERS[name](setting.engine, setting.options)
    assert_as_plain(setting, FixedPolicy(drafter), stop_after)
    drafter.close()


@pytest.mark.parametrize("name", DRAFTERS)
@given(setting=circumstances(), seed=st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_sampling_keeps_every_limit(name: str, setting: Setting, seed: int) -> None:
    drafter = DRAFTERS[name](setting.engine, setting.options)
    session = Session(setting.engine, setting.context_length)
    steps = list(run(setting, FixedPolicy(drafter), session, seed, temperature=1.2))
    tokens = tokens_of(steps)
    assert len(tokens) <= setting.max_new_tokens
    assert not set(tokens[:-1]) & set(setting.eos)
    assert list(session.tokens) == [*setting.prompt, *tokens[:-1]]
    room = setting.context_length - len(setting.prompt) + 1
    ends = {"eos": tokens[-1] in setting.eos, "length": len(tokens) == setting.max_new_tokens}
    assert ends.get(str(steps[-1].stop), len(tokens) == room)
    drafter.close()


@pytest.mark.parametrize("name", ["text → exit 2 → exit 4", "random → exit 4", "draft model → exit 4"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_narrow_engines_are_drafted_for_within_their_limits(name: str, temperature: float) -> None:
    engine = ToyEngine(max_width=5, max_branches=6, depth_scale=0.1)
    costs = toy_costs(engine, slope=0.0)
    setting = Setting(engine, PROMPT, 40, (), 60, 1.0, costs, GrowthOptions(branching=3))
    drafter = DRAFTERS[name](engine, setting.options)
    steps = list(run(setting, FixedPolicy(drafter), Session(engine, 60), temperature=temperature))
    assert len(tokens_of(steps)) == 40


def test_exits_that_agree_make_rounds_of_several_tokens() -> None:
    """The drafts are really used: were they never accepted, all tests above would pass too."""
    costs = toy_costs(EXITS_AGREE, slope=0.0)
    setting = Setting(EXITS_AGREE, PROMPT, 40, (), 96, 1.0, costs, GrowthOptions())
    for name in ("exit 2", "exit 4", "text → exit 2", "text → exit 2 → exit 4", "text → twin"):
        drafter = DRAFTERS[name](EXITS_AGREE, setting.options)
        steps = assert_as_plain(setting, FixedPolicy(drafter))
        assert len(steps) < 32, name
        assert sum(step.accepted for step in steps) > 8, name


def test_a_draft_model_equal_to_the_target_has_every_draft_accepted_and_computes_each_row_once() -> None:
    costs = toy_costs(ENGINE, slope=0.0)
    setting = Setting(ENGINE, PROMPT, 30, (), 96, 1.0, costs, GrowthOptions(branching=1, guesses=0))
    drafter = DRAFTERS["text → twin"](ENGINE, setting.options)
    steps = assert_as_plain(setting, FixedPolicy(drafter))
    for step in steps[1:]:
        assert step.accepted == step.drafted
    session = drafter._session  # type: ignore[attr-defined]
    assert max(session._cache.rows_run) <= len(PROMPT) + 30


def test_a_draft_model_follows_to_another_text() -> None:
    """The drafter's session still holds the first text when the second begins."""
    drafter = DRAFTERS["text → twin"](ENGINE, GrowthOptions(branching=1, guesses=0))
    for prompt in (PROMPT, [*PROMPT[:4], 7, 7], PROMPT[:2]):
        setting = Setting(ENGINE, prompt, 20, (), 96, 1.0, toy_costs(ENGINE, slope=0.0), GrowthOptions())
        for step in assert_as_plain(setting, FixedPolicy(drafter))[1:]:
            assert step.accepted == step.drafted


@pytest.mark.parametrize("penalty", [0.6, 1.3, 2.0])
def test_drafts_count_as_history_for_the_penalty_of_what_follows_them(penalty: float) -> None:
    engine = ToyEngine(seed=2, vocab_size=6, sharpness=1.0, draft_tokens=4)
    for seed in range(8):
        setting = Setting(engine, [seed % 6], 60, (), 96, penalty, toy_costs(engine), GrowthOptions())
        steps = assert_as_plain(setting, FixedPolicy(RandomDrafter(6, seed)))
        assert any(step.accepted > 1 for step in steps)


def test_generation_goes_on_from_the_sessions_own_context() -> None:
    costs = toy_costs(ENGINE)
    whole = Setting(ENGINE, PROMPT, 20, (), 96, 1.0, costs, GrowthOptions())
    session = Session(ENGINE, 96)
    first = tokens_of(list(run(whole, FixedPolicy(text_drafter("katz", 24)), session)))
    rest = Setting(ENGINE, first[-1:], 10, (), 96, 1.0, costs, GrowthOptions())
    second = tokens_of(list(run(rest, FixedPolicy(EarlyExitDrafter(2)), session)))
    assert [*first, *second] == plain_tokens(ENGINE, PROMPT, 30)


@pytest.mark.parametrize("prompt", [[], [1, 99], [-1]])
def test_a_prompt_that_cannot_be_is_refused_and_the_session_kept(prompt: list[int]) -> None:
    session = Session(ENGINE, 96)
    session.prefill(PROMPT)
    for policy in (
        FixedPolicy(text_drafter("prompt-lookup+recycling+katz", 24)),
        auto_policy(ENGINE, toy_costs(ENGINE)),
    ):
        setting = Setting(ENGINE, prompt, 5, (), 96, 1.0, toy_costs(ENGINE), GrowthOptions())
        with pytest.raises(UsageError):
            next(run(setting, policy, session))
        assert list(session.tokens) == PROMPT


def test_a_prompt_that_does_not_fit_is_refused_and_the_session_kept() -> None:
    session = Session(ENGINE, 16)
    session.prefill(PROMPT)
    setting = Setting(ENGINE, PROMPT, 5, (), 16, 1.0, toy_costs(ENGINE), GrowthOptions())
    with pytest.raises(ContextFullError):
        next(run(setting, FixedPolicy(None), session))
    assert list(session.tokens) == PROMPT


def test_what_a_policy_allows_a_round_is_what_its_drafter_is_told() -> None:
    asked: list[float] = []

    class Listening(RandomDrafter):
        def propose(self, request: DraftRequest) -> TokenTree:
            asked.append(request.allowance)
            return super().propose(request)

    class Allowing(FixedPolicy):
        def next(self, remaining: int) -> Choice:
            return Choice(self.drafter, 0.25 * (len(asked) + 1))

    policy, costs = Allowing(Listening(24)), toy_costs(ENGINE)
    limits = GenerationLimits(12)
    list(generate(Session(ENGINE), PROMPT, policy, Sampler(SamplingConfig()), limits, costs))
    assert len(asked) > 3
    assert asked == [0.25 * (index + 1) for index in range(len(asked))]


def test_zero_new_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="max-new-tokens 0"):
        GenerationLimits(0)


@pytest.mark.parametrize("name", ["n-gram", "text → exit 2 → exit 4", "draft model"])
def test_a_seed_reproduces_a_sampled_generation(name: str) -> None:
    def once(seed: int) -> list[int]:
        setting = Setting(ENGINE, PROMPT, 30, (), 96, 1.0, toy_costs(ENGINE), GrowthOptions())
        policy = FixedPolicy(DRAFTERS[name](ENGINE, setting.options))
        return tokens_of(list(run(setting, policy, Session(ENGINE, 96), seed, temperature=1.0)))

    assert once(3) == once(3)
    assert once(3) != once(4)


# --- the distribution, end to end ---

DRAWS = 10_000
SAMPLINGS = {
    "temperature": SamplingConfig(temperature=1.1, seed=5),
    "top-k": SamplingConfig(temperature=0.9, top_k=4, seed=5),
    "top-p": SamplingConfig(temperature=1.0, top_p=0.7, seed=5),
    "penalty and min-p": SamplingConfig(temperature=1.3, min_p=0.1, repetition_penalty=1.4, seed=5),
}


def small_engine() -> ToyEngine:
    return ToyEngine(seed=2, vocab_size=8, draft_tokens=6, depth_scale=0.4, sharpness=1.5, remember=True)


def exact_joint(
    engine: ToyEngine, prompt: Sequence[int], config: SamplingConfig, count: int
) -> dict[object, float]:
    """Probability of the first `count` tokens, by multiplying out straight computation."""
    sampler, joint = Sampler(config), {(): 1.0}
    for _ in range(count):
        longer: dict[tuple[int, ...], float] = {}
        for text, p in joint.items():
            whole = [*prompt, *text]
            following = sampler.distribution(engine.reference(whole)[-1], whole)
            longer |= {(*text, t): p * float(q) for t, q in enumerate(following) if q > 0}
        joint = longer
    return dict(joint)


def draw_texts(
    engine: ToyEngine, prompt: Sequence[int], config: SamplingConfig, policy: Policy, count: int
) -> Counter[object]:
    """First `count` tokens of many generations; accepted drafts must have had a part in them."""
    sampler, costs = Sampler(config), toy_costs(engine, slope=0.0)
    limits = GenerationLimits(count + 3)
    found: Counter[object] = Counter()
    accepted = 0
    session = Session(engine, 40)
    session.prefill(prompt[:-1])
    for _ in range(DRAWS):
        tokens: list[int] = []
        for step in generate(session, prompt[-1:], policy, sampler, limits, costs):
            tokens += step.tokens
            accepted += step.accepted
            if len(tokens) >= count:
                break
        session.rewind(len(prompt) - 1)
        found[tuple(tokens[:count])] += 1
    assert accepted > DRAWS / 10
    return found


def staged(engine: ToyEngine) -> Policy:
    """n-gram and recycling guesses → trees at exit 2 → trees at exit 4 → last exit."""
    text = text_drafter("prompt-lookup+recycling", engine.vocab_size)
    inner = EarlyExitDrafter(2, text, GrowthOptions(branching=2, guesses=3, passes=2))
    return FixedPolicy(EarlyExitDrafter(4, inner, GrowthOptions(branching=2, guesses=4, passes=2)))


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_staged_sampling_has_the_targets_joint_distribution(sampling: str) -> None:
    engine, prompt = small_engine(), [1, 2, 3, 1, 2]
    found = draw_texts(engine, prompt, SAMPLINGS[sampling], staged(engine), 3)
    assert goodness_of_fit(found, exact_joint(engine, prompt, SAMPLINGS[sampling], 3)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exit 2", "mixed", "random → exit 4", "draft model", "text → twin"])
def test_sampling_has_the_targets_joint_distribution_whatever_drafts(name: str) -> None:
    engine, prompt, config = small_engine(), [1, 2, 3, 1, 2], SAMPLINGS["temperature"]
    drafter = DRAFTERS[name](engine, GrowthOptions(branching=3, guesses=3, passes=2))
    found = draw_texts(engine, prompt, config, FixedPolicy(drafter), 3)
    assert goodness_of_fit(found, exact_joint(engine, prompt, config, 3)) > 1e-3


@pytest.mark.slow
def test_the_end_to_end_test_fails_where_the_residual_step_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prompt, config = small_engine(), [1, 2, 3, 1, 2], SAMPLINGS["temperature"]
    monkeypatch.setattr(verify, "choose", choose_from_p_after_refusal)
    found = draw_texts(engine, prompt, config, staged(engine), 3)
    assert goodness_of_fit(found, exact_joint(engine, prompt, config, 3)) < 1e-9
