"""Trees of a given shape: the tokens at their places are the model's choices in their order, or draws from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipstone.runtimes.drafters.base import DraftRequest
from skipstone.runtimes.drafters.early_exit import EarlyExitDrafter
from skipstone.runtimes.drafters.growth import GrowthOptions
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.shapes import TreeShape
from skipstone.runtimes.tree import TokenTree
from tests.runtimes.toy_engine import ToyEngine, toy_costs

PROMPT = [3, 1, 4, 1, 5]
ENGINE = ToyEngine(depth_scale=0.3, sharpness=4.0, remember=True)
SHAPE = TreeShape.parse("0,1,0,2,2,1,3,4,0")


def request(limit: int = 20, temperature: float = 0.0, seed: int = 0) -> DraftRequest:
    session = Session(ENGINE, 96)
    context = [*PROMPT, int(session.prefill(PROMPT).argmax())]
    sampler = Sampler(SamplingConfig(temperature=temperature, seed=seed))
    return DraftRequest(context, session, sampler, limit, toy_costs(ENGINE))


def proposed(asked: DraftRequest, shape: TreeShape = SHAPE) -> TokenTree:
    return EarlyExitDrafter(2, None, GrowthOptions(shape=shape)).propose(asked)


def choices(context: list[int]) -> list[int]:
    """The first exit's tokens after a context, likeliest first, of a session of its own."""
    session = Session(ENGINE, 96)
    rows = session.push(context)
    logits = session.advance(rows[-1:], 2)[0]
    assert ENGINE.draft_vocabulary is not None
    return [int(ENGINE.draft_vocabulary[at]) for at in np.argsort(-logits, kind="stable")]


def shape_of(tree: TokenTree) -> set[tuple[int, ...]]:
    """Every node's path of places among siblings."""
    places: dict[int, tuple[int, ...]] = {ROOT: ()}
    for parent, nodes in sorted(tree.children().items()):
        for rank, node in enumerate(nodes):
            places[node] = (*places[parent], rank)
    return set(places.values()) - {()}


def wanted(shape: TreeShape) -> set[tuple[int, ...]]:
    tree = TokenTree()
    for node, parent in enumerate(shape.parents):
        tree.add(node, parent)
    return shape_of(tree)


@given(limit=st.integers(1, 12))
@settings(deadline=None, max_examples=12)
def test_every_place_holds_the_exits_choice_of_that_rank(limit: int) -> None:
    asked = request(limit)
    tree = proposed(asked)
    assert shape_of(tree) == wanted(SHAPE.first(limit)), "its first nodes where there is less room"
    for parent, nodes in tree.children().items():
        path = [] if parent == ROOT else tree.path_tokens(parent)
        assert [tree.tokens[node] for node in nodes] == choices([*asked.context, *path])[: len(nodes)]


@given(seed=st.integers(0, 50))
@settings(deadline=None, max_examples=20)
def test_drawn_trees_have_the_shape_and_tell_what_they_were_drawn_from(seed: int) -> None:
    tree = proposed(request(temperature=1.0, seed=seed))
    assert shape_of(tree) == wanted(SHAPE)
    children = tree.children()
    assert tree.distributions.keys() == children.keys()
    for parent, nodes in children.items():
        tokens = [tree.tokens[node] for node in nodes]
        assert len(set(tokens)) == len(tokens)
        assert set(tokens) <= set(tree.distributions[parent].ids.tolist())


def test_a_level_is_one_pass_and_leaves_are_none() -> None:
    asked = request()
    widths: list[int] = []
    advance = asked.session.advance

    def counted(rows, exit):  # type: ignore[no-untyped-def]
        widths.append(len(rows))
        return advance(rows, exit)

    asked.session.advance = counted  # type: ignore[method-assign]
    proposed(asked)
    assert widths == [len(wave) for wave in SHAPE.waves] == [1, 2, 1, 1]


def test_a_head_of_fewer_tokens_than_children_gives_what_it_has() -> None:
    wide = TreeShape((ROOT,) * 30)
    assert ENGINE.draft_vocabulary is not None
    assert len(proposed(request(30), wide)) == len(ENGINE.draft_vocabulary) == 18


@pytest.mark.parametrize("passes", [0, 1, 2, 3, 4])
def test_a_round_with_little_time_drafts_the_levels_it_affords(passes: int) -> None:
    """What a level costs is the pass of those above, and the verification of what there is then."""
    asked = request()
    costs, waves, sizes = asked.costs, SHAPE.waves, (3, 6, 8, 9)
    spent = sum(costs.draft(0, 2, len(wave)) for wave in waves[:passes])
    rows = sizes[passes - 1] if passes else 0
    verifying = costs.run(2, 6, rows + 1) + costs.run(0, 2, rows)
    tree = proposed(replace(asked, allowance=spent + verifying - costs.plain + 1e-9))
    assert len(tree) == (0, *sizes)[passes]
