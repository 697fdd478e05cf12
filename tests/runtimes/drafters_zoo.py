"""Drafters by name for property tests, a wrong-headed one among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters import text_drafter
from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.drafters.draft_model import DraftModelDrafter
from skipstone.runtimes.drafters.early_exit import EarlyExitDrafter
from skipstone.runtimes.drafters.gated import GatedDrafter
from skipstone.runtimes.drafters.growth import GrowthOptions
from skipstone.runtimes.policies.arms import Record
from skipstone.runtimes.policies.auto import AutoPolicy
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.session import Session
from skipstone.runtimes.shapes import TreeShape
from skipstone.runtimes.tree import TokenTree
from tests.runtimes.toy_engine import ToyEngine, toy_costs


class RandomDrafter:
    """Proposes random trees as large as it may: nothing it says should matter."""

    name = "random"

    def __init__(self, vocab_size: int, seed: int = 0, alphabet: int | None = None) -> None:
        self._rng, self._tokens = np.random.default_rng(seed), alphabet or vocab_size

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        return None

    def propose(self, request: DraftRequest) -> TokenTree:
        tree = TokenTree()
        used: set[tuple[int, int]] = set()
        for _ in range(request.limit):
            key = (int(self._rng.integers(ROOT, len(tree))), int(self._rng.integers(self._tokens)))
            if key not in used:
                used.add(key)
                tree.add(key[1], key[0], 0.5 if key[0] == ROOT else 0.5 * tree.scores[key[0]])
        return tree

    def observe(self, observation: Observation) -> None:
        return None

    def close(self) -> None:
        return None


Make = Callable[[ToyEngine, GrowthOptions], Drafter]
_TEXT = "prompt-lookup+recycling"
SHAPE = TreeShape.parse("0,1,0,2,2,1,3,4,0")


def _draft_model(engine: ToyEngine, source: Drafter | None, options: GrowthOptions) -> DraftModelDrafter:
    """Another seed's weights of the same vocabulary: a draft model that seldom agrees."""
    small = ToyEngine(seed=1, vocab_size=engine.vocab_size, num_segments=2, context_length=96)
    return DraftModelDrafter(Session(small), toy_costs(small, slope=0.0), "draft", source, options)


def _twin(engine: ToyEngine, source: Drafter | None, options: GrowthOptions) -> DraftModelDrafter:
    """The target's own weights as draft model: one that always agrees."""
    return DraftModelDrafter(Session(engine), toy_costs(engine, slope=0.0), "twin", source, options)


DRAFTERS: dict[str, Make] = {
    "random": lambda e, o: RandomDrafter(e.vocab_size),
    "n-gram": lambda e, o: text_drafter("prompt-lookup", e.vocab_size),
    "katz": lambda e, o: text_drafter("katz", e.vocab_size),
    "recycling": lambda e, o: text_drafter("recycling", e.vocab_size),
    "mixed": lambda e, o: text_drafter("prompt-lookup+katz+recycling", e.vocab_size),
    "gated": lambda e, o: GatedDrafter(text_drafter(_TEXT, e.vocab_size)),
    "exit 2": lambda e, o: EarlyExitDrafter(2, None, o),
    "exit 4": lambda e, o: EarlyExitDrafter(4, None, o),
    "exit 2 in a shape": lambda e, o: EarlyExitDrafter(2, None, replace(o, shape=SHAPE)),
    "exit 2 in a shape → exit 4": lambda e, o: EarlyExitDrafter(
        4, EarlyExitDrafter(2, None, replace(o, shape=SHAPE)), o
    ),
    "text → exit 2": lambda e, o: EarlyExitDrafter(2, text_drafter(_TEXT, e.vocab_size), o),
    "random → exit 4": lambda e, o: EarlyExitDrafter(4, RandomDrafter(e.vocab_size), o),
    "text → exit 2 → exit 4": lambda e, o: EarlyExitDrafter(
        4, EarlyExitDrafter(2, text_drafter(_TEXT, e.vocab_size), o), o
    ),
    "draft model": lambda e, o: _draft_model(e, None, o),
    "text → twin": lambda e, o: _twin(e, text_drafter(_TEXT, e.vocab_size), o),
    "draft model → exit 4": lambda e, o: EarlyExitDrafter(4, _draft_model(e, None, o), o),
    "exit 2 → twin": lambda e, o: _twin(e, EarlyExitDrafter(2, None, o), o),
}


def auto_policy(
    engine: ToyEngine, costs: CostModel, record: Mapping[str, Record] | None = None
) -> AutoPolicy:
    """`auto` as the strategy of that name makes it, without a table."""
    return AutoPolicy(engine, costs, text_drafter(_TEXT, engine.vocab_size), record=record)
