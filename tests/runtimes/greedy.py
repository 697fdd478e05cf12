"""Greedy generation whose plan does not depend on the machine: costs are given, not measured."""

from __future__ import annotations

from collections.abc import Sequence

from skipstone.bundle import CostCurve
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.generate import GenerationLimits, generate
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.strategies import Materials, StrategyOptions, make_policy


def generated(
    engine: Engine, strategy: str, prompt: Sequence[int], count: int, cheap_rows: int = 32
) -> tuple[list[int], int]:
    """Tokens, and how many of them were accepted drafts.

    Args:
        engine: the weights.
        strategy: its name.
        prompt: token ids.
        count: tokens to generate.
        cheap_rows: rows of a batch that are nearly free, so that as much is drafted.
    """
    curve = CostCurve(
        widths=(1, cheap_rows, cheap_rows + 1, 64),
        segments=((1e-3, 1.5e-3, 1e-2, 1e-1),) * len(engine.exits),
        draft_head=(1e-4, 1e-4, 1e-4, 1e-4),
        threads=1,
        machine="given",
    )
    costs = CostModel(curve, engine.exits)
    policy = make_policy(strategy, Materials(engine, costs, StrategyOptions()))
    with Session(engine, len(prompt) + count + 40) as session:
        steps = list(
            generate(session, prompt, policy, Sampler(SamplingConfig()), GenerationLimits(count), costs)
        )
    return [token for step in steps for token in step.tokens], sum(step.accepted for step in steps)
