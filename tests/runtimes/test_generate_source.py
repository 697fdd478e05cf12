"""Encoder-decoders, whatever drafts: greedy tokens are plain decoding's and sampled ones the target's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import skipstone.runtimes.generate as generate_module
import skipstone.runtimes.policies.auto as auto_module
from skipstone.errors import UsageError
from skipstone.runtimes.drafters.aggressive import AggressiveDrafter, Guide
from skipstone.runtimes.drafters.base import Drafter
from skipstone.runtimes.drafters.draft_model import DraftModelDrafter
from skipstone.runtimes.drafters.early_exit import EarlyExitDrafter
from skipstone.runtimes.drafters.growth import GrowthOptions
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.engines.eager_t5 import EagerT5Engine
from skipstone.runtimes.generate import FixedPolicy, GenerationLimits, Policy, Step, generate
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.strategies import STRATEGIES, Materials, StrategyOptions, make_policy
from tests.runtimes.chi_square import goodness_of_fit
from tests.runtimes.even_time import EvenTime
from tests.runtimes.tiny_t5 import EOS, START, VOCAB, tiny_t5
from tests.runtimes.toy_engine import ToyEngine, ToyTranslator, plain_tokens, toy_costs

WILD = ToyTranslator(sharpness=2.5)
COPYING = ToyTranslator(3, copying=6.0, depth_scale=0.15, context_length=120)
SOURCES = st.lists(st.integers(0, 23), min_size=1, max_size=30)
ALONE = tuple(name for name in STRATEGIES if name != "draft-model")


def policy_of(strategy: str, engine: Engine, slope: float = 0.0, **options: object) -> Policy:
    guide: Guide | None = options.pop("guide", None)  # type: ignore[assignment]
    costs = toy_costs(engine, slope=slope)  # type: ignore[arg-type]
    chosen = StrategyOptions(**options)  # type: ignore[arg-type]
    return make_policy(strategy, Materials(engine, costs, chosen, guide=guide))


def run(
    engine: Engine,
    source: Sequence[int],
    policy: Policy,
    *,
    count: int = 30,
    prompt: Sequence[int] = (0,),
    eos: Sequence[int] = (),
    slope: float = 0.0,
    sampling: SamplingConfig | None = None,
) -> list[Step]:
    with Session(engine, 96) as session:
        session.encode(source)
        costs = toy_costs(engine, slope=slope)  # type: ignore[arg-type]
        sampler, limits = Sampler(sampling or SamplingConfig()), GenerationLimits(count, tuple(eos))
        steps = list(generate(session, prompt, policy, sampler, limits, costs))
        assert list(session.tokens) == [*prompt, *tokens_of(steps)[:-1]]
        assert session.source == tuple(source)
    return steps


def tokens_of(steps: Sequence[Step]) -> list[int]:
    return [token for step in steps for token in step.tokens]


@pytest.mark.parametrize("strategy", ALONE)
@given(
    engine=st.sampled_from([WILD, COPYING]),
    texts=st.lists(SOURCES, min_size=1, max_size=3),
    begins=st.lists(st.integers(0, 23), max_size=3),
    eos=st.lists(st.integers(0, 23), max_size=2),
    slope=st.sampled_from([0.0, 0.1, 1.0]),
)
@settings(max_examples=8)
def test_greedy_tokens_are_plain_decodings_whatever_drafts(
    strategy: str,
    engine: ToyTranslator,
    texts: list[list[int]],
    begins: list[int],
    eos: list[int],
    slope: float,
) -> None:
    """One policy over several sources: what it learned of one must not spoil the next."""
    policy, prompt = policy_of(strategy, engine, slope), [0, *begins]
    for source in texts:
        steps = run(engine, source, policy, count=24, prompt=prompt, eos=eos, slope=slope)
        assert tokens_of(steps) == plain_tokens(engine, prompt, 24, eos, source=source)


@pytest.mark.parametrize("strategy", ["aggressive", "auto"])
def test_a_source_that_is_nearly_copied_takes_few_rounds(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafts are really used: were they never accepted, the test above would pass too."""
    for module in (generate_module, auto_module):
        monkeypatch.setattr(module, "time", EvenTime(1e-3))
    rng, rounds, tokens, differing = np.random.default_rng(0), 0, 0, 0
    policy = policy_of(strategy, COPYING)
    for _ in range(12):
        source = [int(token) for token in rng.integers(0, 24, 30)]
        steps = run(COPYING, source, policy)
        rounds, tokens = rounds + len(steps) - 1, tokens + len(tokens_of(steps)) - 1
        differing += sum(a != b for a, b in zip(tokens_of(steps), source, strict=True))
    assert 12 < differing < tokens / 3, "the model must copy, but not everything"
    assert tokens / rounds > 2.5


def test_an_end_token_among_accepted_drafts_ends_the_text_and_is_learned_from() -> None:
    source = [5, 9, 13, 2, 7, 7, 20, 11, 3, 8]
    plain = plain_tokens(COPYING, [0], 10, source=source)
    end = next(t for t in plain[3:] if plain.index(t) >= 3)
    drafter = AggressiveDrafter()
    steps = run(COPYING, plain, FixedPolicy(drafter), eos=[end])
    expected = plain_tokens(COPYING, [0], 30, [end], source=plain)
    assert tokens_of(steps) == expected
    assert steps[-1].stop == "eos"
    assert drafter._read == 1 + len(expected)


def test_a_users_guide_is_drafted_from_by_decoders_and_encoder_decoders() -> None:
    decoder = ToyEngine(seed=4, depth_scale=0.05, sharpness=4.0)
    text = plain_tokens(decoder, [3, 1], 30)
    with Session(decoder, 96) as session:
        costs, limits = toy_costs(decoder, slope=0.0), GenerationLimits(30)
        policy = policy_of("aggressive", decoder, guide=lambda: text)
        steps = list(generate(session, [3, 1], policy, Sampler(SamplingConfig()), limits, costs))
    assert (tokens_of(steps), len(steps)) == (text, 2)
    source = [4, 4, 4]
    expected = plain_tokens(WILD, [0], 30, source=source)
    steps = run(WILD, source, policy_of("aggressive", WILD, guide=lambda: expected))
    assert (tokens_of(steps), len(steps)) == (expected, 2)


def test_aggressive_decoding_needs_a_text_to_copy_from() -> None:
    with pytest.raises(UsageError, match=r"aggressive.*--guide"):
        policy_of("aggressive", ToyEngine())


def test_a_draft_model_reads_the_source_with_an_encoder_of_its_own() -> None:
    drafter = DraftModelDrafter(
        Session(COPYING, 96), toy_costs(COPYING, slope=0.0), "twin", None, GrowthOptions(branching=1)
    )
    for source in ([5, 9, 13, 2, 7], [1, 2, 3, 4, 5, 6, 7]):
        steps = run(COPYING, source, FixedPolicy(drafter))
        assert tokens_of(steps) == plain_tokens(COPYING, [0], 30, source=source)
        assert all(step.accepted == step.drafted for step in steps[1:])


def test_a_source_too_long_for_the_draft_model_is_decoded_without_it() -> None:
    small = ToyTranslator(max_source_length=4)
    drafter = DraftModelDrafter(Session(small, 96), toy_costs(small), "small")
    source = [5, 9, 13, 2, 7]
    steps = run(WILD, source, FixedPolicy(drafter))
    assert tokens_of(steps) == plain_tokens(WILD, [0], 30, source=source)
    assert not any(step.drafted for step in steps)


# --- the distribution ---

DRAWS = 8_000
SAMPLING = SamplingConfig(temperature=1.2, seed=5)


def exact_joint(engine: ToyTranslator, source: Sequence[int], count: int) -> dict[object, float]:
    sampler, memory = Sampler(SAMPLING), engine.encoded(source)[0]
    joint: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(count):
        longer: dict[tuple[int, ...], float] = {}
        for text, p in joint.items():
            following = sampler.distribution(engine.reference([0, *text], memory=memory)[-1])
            longer |= {(*text, t): p * float(q) for t, q in enumerate(following) if q > 0}
        joint = longer
    return dict(joint)


def drafters(engine: ToyTranslator) -> dict[str, Drafter]:
    options = GrowthOptions(branching=2, guesses=3, passes=2)
    return {
        "aggressive": AggressiveDrafter(),
        "aggressive → exit 2": EarlyExitDrafter(2, AggressiveDrafter(), options),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aggressive", "aggressive → exit 2"])
def test_sampling_with_aggressive_drafts_has_the_targets_joint_distribution(name: str) -> None:
    engine = ToyTranslator(
        2, vocab_size=8, draft_tokens=6, depth_scale=0.3, copying=3.0, sharpness=1.0, remember=True
    )
    source, count = [3, 1, 6, 2, 5], 3
    policy, sampler = FixedPolicy(drafters(engine)[name]), Sampler(SAMPLING)
    costs, limits = toy_costs(engine, slope=0.0), GenerationLimits(count + 3)
    found: Counter[object] = Counter()
    accepted = 0
    with Session(engine, 40) as session:
        session.encode(source)
        for _ in range(DRAWS):
            tokens: list[int] = []
            for step in generate(session, [0], policy, sampler, limits, costs):
                tokens += step.tokens
                accepted += step.accepted
                if len(tokens) >= count:
                    break
            session.rewind(0)
            found[tuple(tokens[:count])] += 1
    assert accepted > DRAWS / 10
    assert goodness_of_fit(found, exact_joint(engine, source, count)) > 1e-3


# --- a real T5 ---


@pytest.fixture(scope="module")
def eager() -> EagerT5Engine:
    return EagerT5Engine(tiny_t5(), exits=(1, 2))


@pytest.mark.parametrize("strategy", ALONE)
def test_a_tiny_t5_says_what_transformers_says_whatever_drafts(eager: EagerT5Engine, strategy: str) -> None:
    import torch

    rng, policy = np.random.default_rng(4), policy_of(strategy, eager)
    for length in (3, 12, 25):
        source = [*map(int, rng.integers(2, VOCAB, length)), EOS]
        expected = eager.model.generate(torch.tensor([source]), max_new_tokens=20, do_sample=False)
        steps = run(eager, source, policy, count=20, prompt=[START], eos=[EOS])
        assert tokens_of(steps) == expected[0, 1:].tolist()


def test_auto_tries_copies_of_the_source_before_anything_else() -> None:
    engine = ToyTranslator(3, copying=6.0, depth_scale=0.15, context_length=120)
    steps = run(engine, list(range(2, 22)), policy_of("auto", engine))
    assert next(step.drafter for step in steps if step.drafter) == "aggressive"
