"""What a stage's stated probabilities turn out to be worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from skipstone.runtimes.drafters.base import DraftRequest, Observation
from skipstone.runtimes.drafters.early_exit import EarlyExitDrafter
from skipstone.runtimes.drafters.greedy import Calibration, Opinion, Trust
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.tree import TokenTree
from tests.runtimes.toy_engine import ToyEngine, toy_costs


def sigmoid(x: float) -> float:
    return float(1.0 / (1.0 + np.exp(-x)))


@pytest.mark.parametrize(("bias", "weight"), [(0.0, 1.0), (0.8, 1.6), (-0.9, 0.8)])
def test_estimates_come_to_the_true_frequencies(bias: float, weight: float) -> None:
    rng = np.random.default_rng(0)
    calibration = Calibration(0.4, 1.4)
    for _ in range(6_000):
        p = float(rng.uniform(0.02, 0.98))
        true = sigmoid(bias + weight * np.log(p / (1 - p)))
        calibration.learn(p, bool(rng.random() < true))
    for p in (0.1, 0.3, 0.5, 0.7, 0.9):
        true = sigmoid(bias + weight * np.log(p / (1 - p)))
        assert calibration.estimate(p) == pytest.approx(true, abs=0.1)


def test_the_first_choice_and_the_further_ones_are_learned_apart() -> None:
    trust = Trust()
    for _ in range(500):
        trust.learn(Opinion(token=1, before=0.0, model=0.5, left=1.0, rank=0), hit=True)
        trust.learn(Opinion(token=2, before=0.0, model=0.3, left=1.0, rank=1), hit=False)
    assert trust.alone(0.5, 0) > 0.85
    assert trust.alone(0.3, 1) < 0.1
    assert trust.alone(0.3, 2) == trust.alone(0.3, 1)


def test_a_child_of_the_stage_before_teaches_only_the_pooling() -> None:
    trust = Trust()
    alone, pooled = trust.alone(0.5, 0), trust.pooled(0.5, 0.5)
    for _ in range(200):
        trust.learn(Opinion(token=1, before=0.5, model=0.5), hit=True)
    assert trust.alone(0.5, 0) == alone
    assert trust.pooled(0.5, 0.5) > pooled + 0.1


@pytest.mark.parametrize(("bias", "weight"), [(0.3, 1.0), (0.0, 0.0), (-0.5, 0.6)])
def test_two_opinions_are_pooled_as_far_as_the_second_one_tells_something(bias: float, weight: float) -> None:
    def logit(p: float) -> float:
        return float(np.log(p / (1 - p)))

    rng, trust = np.random.default_rng(1), Trust()
    for _ in range(8_000):
        before, model = (float(p) for p in rng.uniform(0.05, 0.95, 2))
        true = sigmoid(bias + logit(before) + weight * logit(model))
        trust.learn(Opinion(token=1, before=before, model=model), bool(rng.random() < true))
    for before in (0.3, 0.7):
        for model in (0.1, 0.9):
            true = sigmoid(bias + logit(before) + weight * logit(model))
            assert trust.pooled(before, model) == pytest.approx(true, abs=0.1)


@pytest.mark.parametrize("source", [False, True], ids=["an exit alone", "an exit after another"])
def test_drafts_that_come_true_are_scored_higher_and_such_that_do_not_lower(source: bool) -> None:
    engine = ToyEngine(depth_scale=0.05, sharpness=2.0)
    costs, start = toy_costs(engine, slope=0.0), [3, 1, 4, 1, 5]

    def first_score(come_true: bool, rounds: int) -> float:
        """Score of the root's first child after so many verifications of the same draft."""
        drafter = EarlyExitDrafter(4, EarlyExitDrafter(2)) if source else EarlyExitDrafter(2)
        with Session(engine, 60) as session:
            session.prefill(start)
            asked = DraftRequest([*start, 9], session, Sampler(SamplingConfig()), 6, costs)
            for _ in range(rounds):
                tree = drafter.propose(asked)
                session.discard()
                drafter.observe(verified(tree, come_true, asked.context))
            return drafter.propose(asked).scores[0]

    def verified(tree: TokenTree, come_true: bool, context: Sequence[int]) -> Observation:
        """The drafts along the first children were right, or not even one at the root was."""
        children, node, path = tree.children(), ROOT, []
        while come_true and node in children:
            node = children[node][0]
            path.append(node)
        guessed = {tree.tokens[node] for node in children[ROOT]}
        other = next(token for token in range(engine.vocab_size) if token not in guessed)
        fresh = [tree.tokens[node] for node in path] or [other]
        logits = [np.zeros(engine.vocab_size, np.float32)]
        return Observation([*context, *fresh], len(fresh), tree, path[:-1], [9], logits)

    untaught = first_score(come_true=True, rounds=0)
    assert first_score(come_true=True, rounds=40) > untaught + 0.02
    assert first_score(come_true=False, rounds=40) < untaught - 0.02
