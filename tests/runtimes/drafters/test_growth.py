"""Trees grown with a model's logits: never past a limit, sampled candidates all kept, draws from q itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipstone.errors import UsageError, VocabularyMismatchError
from skipstone.runtimes.drafters.base import DraftRequest
from skipstone.runtimes.drafters.draft_model import check_vocabularies
from skipstone.runtimes.drafters.early_exit import EarlyExitDrafter
from skipstone.runtimes.drafters.growth import GrowthOptions
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from tests.runtimes.chi_square import goodness_of_fit
from tests.runtimes.drafters_zoo import DRAFTERS, RandomDrafter
from tests.runtimes.toy_engine import ToyEngine, toy_costs

PROMPT = [3, 1, 4, 1, 5]
GROWN = [
    "exit 2",
    "text → exit 2",
    "random → exit 4",
    "text → exit 2 → exit 4",
    "draft model",
    "exit 2 → twin",
]
ENGINE = ToyEngine(depth_scale=0.05, sharpness=4.0, max_branches=40)


def request(
    engine: ToyEngine, context_length: int, limit: int, temperature: float, seed: int = 0, slope: float = 0.0
) -> DraftRequest:
    session = Session(engine, context_length)
    context = [*PROMPT, int(session.prefill(PROMPT).argmax())]
    sampler = Sampler(SamplingConfig(temperature=temperature, seed=seed))
    return DraftRequest(context, session, sampler, limit, toy_costs(engine, slope=slope))


@pytest.mark.parametrize("name", GROWN)
@given(
    room=st.integers(3, 90),
    wish=st.integers(1, 31),
    branching=st.integers(1, 30),
    guesses=st.integers(0, 31),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 50),
)
@settings(max_examples=20, deadline=None)
def test_trees_stay_within_limit_room_and_branches(
    name: str, room: int, wish: int, branching: int, guesses: int, temperature: float, seed: int
) -> None:
    limit = max(1, min(wish, (room - 1) // 2))
    asked = request(ENGINE, len(PROMPT) + room, limit, temperature, seed)
    drafter = DRAFTERS[name](ENGINE, GrowthOptions(branching=branching, guesses=guesses))
    tree = drafter.propose(asked)
    assert len(tree) <= limit
    keys = list(zip(tree.parents, tree.tokens, strict=True))
    assert len(set(keys)) == len(keys)
    for node, parent in enumerate(tree.parents):
        assert ROOT <= parent < node
        assert 0 <= tree.scores[node] <= (1.0 if parent == ROOT else tree.scores[parent]) + 1e-12
    session = asked.session
    rows = session.push(asked.context[-1:])
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        rows += session.push([token], [rows[parent + 1]])
    assert session.room >= 0
    session.advance(rows, session.exits[-1])  # fits, leaves included
    drafter.close()


@pytest.mark.parametrize("name", GROWN)
@given(limit=st.integers(1, 31), branching=st.integers(1, 4), seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_sampled_candidates_come_from_their_distribution_and_all_stay(
    name: str, limit: int, branching: int, seed: int
) -> None:
    asked = request(ENGINE, 96, limit, 1.0, seed)
    tree = DRAFTERS[name](ENGINE, GrowthOptions(branching=branching, guesses=5)).propose(asked)
    children = tree.children()
    assert tree.distributions.keys() == children.keys(), "each draw is on record, each record was drawn from"
    for parent, nodes in children.items():
        q = tree.distributions[parent]
        assert q.probs.sum() == pytest.approx(1.0)
        assert (np.diff(q.ids) > 0).all()
        support = set(q.ids[q.probs > 0].tolist())
        assert {tree.tokens[node] for node in nodes} <= support
        assert len(nodes) <= branching


@pytest.mark.parametrize(
    "name", ["text → exit 2", "random → exit 4", "exit 2 → twin", "text → exit 2 → exit 4"]
)
def test_the_first_candidate_is_a_draw_from_q_however_the_guesses_fell(name: str) -> None:
    engine = ToyEngine(seed=2, vocab_size=8, draft_tokens=8, sharpness=1.5, remember=True)
    session = Session(engine, 40)
    session.prefill(PROMPT)
    drafter = DRAFTERS[name](engine, GrowthOptions(branching=2, guesses=3, passes=1))
    sampler, costs = Sampler(SamplingConfig(temperature=1.0, seed=1)), toy_costs(engine, slope=0.0)
    drafter.reset(PROMPT)
    first: Counter[object] = Counter()
    for _ in range(3_000):
        tree = drafter.propose(DraftRequest([*PROMPT, 2], session, sampler, 8, costs))
        first[tree.tokens[0]] += 1
        session.discard()
    q = tree.distributions[ROOT]
    assert goodness_of_fit(first, dict(zip(q.ids.tolist(), q.probs.tolist(), strict=True))) > 1e-3


@given(depth=st.integers(1, 4), seed=st.integers(0, 20))
@settings(deadline=None)
def test_a_length_bounds_the_levels_of_a_tree(depth: int, seed: int) -> None:
    for temperature in (0.0, 1.0):
        asked = request(ENGINE, 96, 31, temperature, seed)
        tree = EarlyExitDrafter(2, None, GrowthOptions(length=depth)).propose(asked)
        assert max((len(tree.path_tokens(node)) for node in range(len(tree))), default=0) <= depth


def test_a_chain_follows_the_exits_best_tokens() -> None:
    engine = ToyEngine(sharpness=20.0)
    asked = request(engine, 96, 10, 0.0)
    tree = EarlyExitDrafter(2, None, GrowthOptions(branching=1)).propose(asked)
    assert len(tree) > 1
    assert tree.parents == list(range(-1, len(tree) - 1))
    text = list(asked.context)
    for token in tree.tokens:
        assert engine.draft_vocabulary is not None
        assert token == engine.draft_vocabulary[engine.reference(text, 2)[-1].argmax()]
        text.append(token)


def test_drafts_hang_from_text_that_runs_ahead_of_the_session() -> None:
    """A later stage may ask what follows its own drafts: the exit must read them too."""
    engine = ToyEngine(seed=1)  # one that minds what stands before the last token
    asked = request(engine, 96, 6, 0.0)
    assert engine.draft_vocabulary is not None
    drafted = 0
    for token in range(24):
        ahead = DraftRequest([*asked.context, token, 8], asked.session, asked.sampler, 6, asked.costs)
        tree = EarlyExitDrafter(2, None, GrowthOptions(branching=1)).propose(ahead)
        best = engine.reference(ahead.context, 2)[-1].argmax()
        assert tree.tokens == [] or tree.tokens[0] == engine.draft_vocabulary[best]
        drafted += len(tree)
        asked.session.discard()
    assert drafted > 12


def test_nothing_is_drafted_where_every_row_costs_full_price() -> None:
    asked = request(ToyEngine(seed=5, sharpness=0.2), 96, 20, 0.0, slope=1.0)
    assert len(EarlyExitDrafter(4, None).propose(asked)) <= 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["exit 2", "text → exit 2"])
@pytest.mark.parametrize("allowed", [0.2, 1.0, 3.0])
def test_a_round_keeps_to_its_allowance(name: str, allowed: float, temperature: float) -> None:
    asked = request(ENGINE, 60, 20, temperature, slope=0.3)
    costs, free = asked.costs, request(ENGINE, 60, 20, temperature, slope=0.3)
    drafter = DRAFTERS[name](ENGINE, GrowthOptions())
    drafter.reset(asked.context)
    tree = drafter.propose(replace(asked, allowance=allowed * costs.plain))
    unbound = DRAFTERS[name](ENGINE, GrowthOptions())
    unbound.reset(free.context)
    assert len(tree) <= len(unbound.propose(free))
    least = costs.draft(0, 2, 1) + costs.run(2, costs.last_exit, len(tree) + 1)
    assert len(tree) == 0 or least <= (1.0 + allowed) * costs.plain


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["exit 2", "text → exit 2"])
@pytest.mark.parametrize("slope", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("allowed", [0.2, 0.5, 1.0, 1.5, 3.0])
def test_what_a_round_really_runs_stays_within_its_allowance(
    name: str, allowed: float, slope: float, temperature: float
) -> None:
    """Every pass counted as it was made, and the verification of the tree; only the first pass is always made."""
    asked = request(ENGINE, 80, 20, temperature, slope=slope)
    costs, session = asked.costs, asked.session
    asked = replace(asked, allowance=allowed * costs.plain)
    advance, passes, ran = session.advance, [], set[int]()

    def counted(rows: Sequence[int], exit: int) -> list[np.ndarray]:
        assert exit == 2
        passes.append(costs.draft(0, 2, len(rows)))
        ran.update(rows)
        return advance(rows, exit)

    session.advance = counted  # type: ignore[method-assign]
    drafter = DRAFTERS[name](ENGINE, GrowthOptions(branching=2))
    drafter.reset(asked.context)
    tree = drafter.propose(asked)
    rows = session.push(asked.context[-1:])
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        rows += session.push([token], [rows[parent + 1]])
    waiting = sum(row not in ran for row in rows)
    verification = costs.run(2, costs.last_exit, len(rows)) + costs.run(0, 2, waiting)
    if len(tree) or len(passes) > 1:
        assert sum(passes) + verification <= asked.ceiling + 1e-12


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_that_could_not_all_be_verified_in_time_are_not_examined(temperature: float) -> None:
    examined = []
    for allowed in (0.0, 0.2, 0.5, 1.0, 2.0, 9.0):
        asked = request(ENGINE, 80, 20, temperature, slope=0.2)
        asked = replace(asked, allowance=allowed * asked.costs.plain)
        with Widths(asked.session) as widths:
            DRAFTERS["random → exit 4"](ENGINE, GrowthOptions()).propose(asked)
        assert widths[0] == 1 or asked.costs.run(0, asked.costs.last_exit, widths[0]) <= asked.ceiling
        examined.append(widths[0])
    assert examined[0] == 1
    assert examined[-1] > 4, "with time enough they are"


class Widths(list[int]):
    """Rows of every batch that a session is asked for meanwhile."""

    def __init__(self, session: Session) -> None:
        self._session, self._advance = session, session.advance

    def __enter__(self) -> Widths:
        def counted(rows: Sequence[int], exit: int) -> list[np.ndarray]:
            self.append(len(rows))
            return self._advance(rows, exit)

        self._session.advance = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_error: object) -> None:
        self._session.advance = self._advance  # type: ignore[method-assign]


def test_an_exit_the_bundle_does_not_have_is_refused() -> None:
    asked = request(ENGINE, 96, 5, 0.0)
    for exit_layer in (3, 6):
        with pytest.raises(UsageError, match=r"--assistant-early-exit.*2, 4"):
            EarlyExitDrafter(exit_layer).propose(asked)
    headless = request(ToyEngine(draft_tokens=None), 96, 5, 0.0)
    with pytest.raises(UsageError, match="--assistant-early-exit"):
        EarlyExitDrafter(2).propose(headless)


def test_closing_a_stage_closes_what_stands_before_it() -> None:
    closed: list[str] = []

    class Closing(RandomDrafter):
        def close(self) -> None:
            closed.append(self.name)

    EarlyExitDrafter(4, EarlyExitDrafter(2, Closing(24))).close()
    assert closed == ["random"]
    twin = DRAFTERS["text → twin"](ENGINE, GrowthOptions())
    twin.close()
    assert twin._session._cache.closed  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("draft", "said"),
    [(["a", "b"], "2 tokens.*target has 3"), (["a", "x", "c"], "token 1 is 'x', in target it is 'b'")],
)
def test_a_draft_model_with_another_vocabulary_is_refused_and_the_difference_named(
    draft: Sequence[str], said: str
) -> None:
    with pytest.raises(VocabularyMismatchError, match=said):
        check_vocabularies(["a", "b", "c"], draft, "target", "draft")
    check_vocabularies(["a", "b"], ["a", "b"], "target", "draft")


@pytest.mark.parametrize("name", ["exit 2", "text → exit 2", "text → exit 2 → exit 4"])
@pytest.mark.parametrize("branches", [16, 32, 64])
def test_a_stage_has_rows_of_its_own_however_many_may_be_verified(name: str, branches: int) -> None:
    engine = ToyEngine(depth_scale=0.05, sharpness=4.0, max_branches=branches)
    asked = request(engine, 96, branches - 1, 0.0)
    tree = DRAFTERS[name](engine, GrowthOptions()).propose(asked)
    depths = [len(tree.path_tokens(node)) for node in range(len(tree))]
    assert max(depths) > 2, "it drafted below what it had judged"
