"""Strategies by name: each makes a policy that generates, and says what it cannot do."""

from __future__ import annotations

import pytest

from skipstone.errors import UsageError
from skipstone.runtimes.drafters.draft_model import DraftModelDrafter
from skipstone.runtimes.generate import GenerationLimits, generate
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.shapes import TreeShape
from skipstone.runtimes.strategies import STRATEGIES, Materials, StrategyOptions, chosen_exit, make_policy
from tests.runtimes.toy_engine import ToyEngine, plain_tokens, toy_costs

ENGINE = ToyEngine(depth_scale=0.1, sharpness=6.0)
PROMPT = [1, 2, 3, 1, 2]


def materials(engine: ToyEngine = ENGINE, **options: object) -> Materials:
    costs = toy_costs(engine, slope=0.0)
    return Materials(
        engine,
        costs,
        StrategyOptions(**options),  # type: ignore[arg-type]
        guide=lambda: (7, 1, 2, 3, 1),
        draft_model=lambda source, shape: DraftModelDrafter(Session(engine), costs, "draft", source, shape),
    )


def steps_of(strategy: str, given: Materials) -> list[object]:
    policy = make_policy(strategy, given)
    limits, sampler = GenerationLimits(30), Sampler(SamplingConfig())
    return list(generate(Session(ENGINE, 96), PROMPT, policy, sampler, limits, given.costs))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_generates_what_plain_decoding_does(strategy: str) -> None:
    steps = steps_of(strategy, materials())
    assert [t for step in steps for t in step.tokens] == plain_tokens(ENGINE, PROMPT, 30)  # type: ignore[attr-defined]


@pytest.mark.parametrize("strategy", ["layerskip", "staged", "draft-model"])
def test_the_asked_draft_length_bounds_every_draft(strategy: str) -> None:
    for step in steps_of(strategy, materials(num_assistant_tokens=1)):
        assert len(step.tokens) <= 2  # type: ignore[attr-defined]


def test_the_asked_lookup_length_bounds_every_draft() -> None:
    for step in steps_of("prompt-lookup", materials(prompt_lookup_num_tokens=2)):
        assert len(step.tokens) <= 3  # type: ignore[attr-defined]


def test_the_asked_exit_drafts() -> None:
    names = {step.drafter for step in steps_of("layerskip", materials(assistant_early_exit=4))}  # type: ignore[attr-defined]
    assert names == {"", "exit 4"}
    assert chosen_exit(materials()) == 2


@pytest.mark.parametrize("wish", [0, 3, 6, 99])
def test_an_exit_that_is_not_an_inner_one_is_refused(wish: int) -> None:
    with pytest.raises(UsageError, match=f"--assistant-early-exit {wish}.*2, 4"):
        make_policy("layerskip", materials(assistant_early_exit=wish))


def test_a_bundle_without_exits_cannot_skip_layers_and_the_error_says_what_can_be_done() -> None:
    for engine in (ToyEngine(num_segments=1), ToyEngine(draft_tokens=None)):
        with pytest.raises(UsageError, match=r"no early exits.*prompt-lookup"):
            make_policy("staged", materials(engine))


def test_an_unknown_strategy_is_refused_and_the_known_ones_listed() -> None:
    with pytest.raises(UsageError, match=r"--strategy fast.*auto.*draft-model"):
        make_policy("fast", materials())


def test_a_draft_model_strategy_without_a_draft_model_is_refused() -> None:
    with pytest.raises(UsageError, match="--assistant-model"):
        make_policy("draft-model", Materials(ENGINE, toy_costs(ENGINE), StrategyOptions()))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("num_assistant_tokens", 0),
        ("prompt_lookup_num_tokens", -1),
        ("assistant_confidence_threshold", 1.0),
        ("assistant_confidence_threshold", -0.1),
    ],
)
def test_options_that_mean_nothing_are_refused(flag: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')}"):
        StrategyOptions(**{flag: value})  # type: ignore[arg-type]


def test_the_asked_tree_is_drafted_round_after_round() -> None:
    shape = TreeShape.parse("0,1,0,2")
    steps = steps_of("layerskip", materials(draft_tree=shape, assistant_early_exit=4))
    drafted = [step.drafted for step in steps]  # type: ignore[attr-defined]
    assert set(drafted[1:-4]) == {4}, "the last rounds have no room for it"
    with pytest.raises(UsageError, match="--draft-tree: does not go with strategy staged"):
        make_policy("staged", materials(draft_tree=shape))
    with pytest.raises(UsageError, match="--draft-tree, --num-assistant-tokens"):
        materials(draft_tree=shape, num_assistant_tokens=3)


@pytest.mark.parametrize("strategy", ["layerskip", "staged"])
def test_a_later_exit_judges_the_first_ones_drafts(strategy: str) -> None:
    given = materials(assistant_later_exit=4)
    steps = steps_of(strategy, given)
    assert [t for step in steps for t in step.tokens] == plain_tokens(ENGINE, PROMPT, 30)  # type: ignore[attr-defined]
    names = {step.drafter for step in steps} - {""}  # type: ignore[attr-defined]
    assert len(names) == 1
    assert names.pop().endswith("exit 2 → exit 4")


@pytest.mark.parametrize(("first", "later"), [(2, 2), (4, 2), (2, 6), (2, 3)])
def test_a_later_exit_that_is_none_is_refused(first: int, later: int) -> None:
    with pytest.raises(UsageError, match=f"--assistant-later-exit {later}: .* exits behind {first} are"):
        make_policy("layerskip", materials(assistant_early_exit=first, assistant_later_exit=later))
