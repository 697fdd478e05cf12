"""The way to decode with the most tokens per second on a device: a trace says what is accepted, a curve what it costs.

    >>> best, *others = search([trace], device, [measure_host(trace)])
    >>> best.plan.label, best.tokens_per_second
    ('exit 2 drafts a tree of 5, 3 deep', 41.3)

Looked at are plain decoding; every strategy as it was recorded, and with shorter drafts; and for every inner exit the
trees that it could draft. Of these, dynamic programming (`skipstone.devices.tree_shapes`) gives the best one for every
size, depth and branching, a formula picks those that promise most on this device, and a replay of the exit's recorded
choices says what they are worth. Where a device has programs for a few widths only, its costs are stairs, and the sizes
that fill a step come out by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from skipstone.devices.replay import WHOLE, Cut, shape_calls
from skipstone.devices.simulator import LAYERSKIP, PLAIN, Device, Host, Plan, Prediction, simulate
from skipstone.devices.traces import DRAFT_MODEL, HEAD, RANKS, TARGET, Run, Trace
from skipstone.devices.tree_shapes import best_trees
from skipstone.errors import UsageError
from skipstone.runtimes.shapes import TreeShape

_LEVELS = 16  # of a tree
_MOST = 63  # nodes
_BRANCHINGS = (1, 2, 4, RANKS)
_REPLAYED = 12  # trees of an exit, the most promising ones
_LENGTHS = (1, 2, 3, 4, 6, 8, 12)
_PRIOR = 8.0  # places: a level that was seldom reached is taken for the first one
_ROUGH = 1.05  # what is replayed roughly must promise more than that to go before what is replayed well
# strategies whose drafts a flag keeps short: chains, and trees, whose shortening is replayed roughly; and those whose
# exits one chooses
_CHAINS, _TREES = ("prompt-lookup", LAYERSKIP), ("staged", "draft-model")
_THROUGH_EXITS = (LAYERSKIP, "staged")


def search(traces: Sequence[Trace], device: Device, hosts: Sequence[Host]) -> list[Prediction]:
    """All plans that were looked at, best first, plain decoding among them.

    Args:
        traces: of one model and the same prompts, recorded with different flags.
        device: where it would run.
        hosts: of each trace, see `skipstone.devices.simulator.measure_host`.

    Raises:
        UsageError: traces of different texts.
    """
    _check_same_texts(traces)
    found: dict[Plan, Prediction] = {}
    for trace, host in zip(traces, hosts, strict=True):
        for plan in chain(_recorded(trace, device), _trees(trace, device, host)):
            if plan not in found:
                found[plan] = simulate(trace, plan, device, host)
    return sorted(found.values(), key=_worth, reverse=True)


def _worth(found: Prediction) -> float:
    plan = found.plan
    rough = plan.cut != WHOLE and (plan.strategy in _TREES or plan.later_exit is not None)
    return found.tokens_per_second / (_ROUGH if rough else 1.0)


def measured_acceptance(texts: Sequence[Sequence[int]], levels: int = _LEVELS) -> NDArray[np.float64]:
    """How often the next token was an exit's k-th choice where d of its first choices had been right, [levels, RANKS].

    Args:
        texts: the places of their tokens among the exit's choices, see `skipstone.devices.traces.Run.ranks`.
        levels: of drafts.
    """
    hits, seen = np.zeros((levels, RANKS)), np.zeros((levels, 1))
    for ranks in map(np.asarray, texts):
        starts = np.arange(len(ranks))
        for level in range(levels):
            starts = starts[starts + level < len(ranks)]
            taken = ranks[starts + level]
            seen[level] += len(starts)
            hits[level] += np.bincount(taken[taken >= 0], minlength=RANKS)
            starts = starts[taken == 0]
    overall = hits[0] / max(1.0, float(seen[0, 0]))
    found: NDArray[np.float64] = (hits + _PRIOR * overall) / (seen + _PRIOR)
    return found


def drafting_exits(trace: Trace, runs: Sequence[Run]) -> tuple[int, ...]:
    """Layers of the exits that drafted in these runs, ascending."""
    rounds = chain.from_iterable(run.rounds for run in runs)
    calls = chain.from_iterable(pairwise(each.drafting) for each in rounds)
    parts = {ran.part for ran, call in calls if call.part == HEAD and call.model == ran.model == TARGET}
    return tuple(trace.header.curve.exits[part] for part in sorted(parts - {HEAD}))


def _recorded(trace: Trace, device: Device) -> Iterator[Plan]:
    """Plain decoding, and what was recorded, whole and with shorter drafts."""
    yield Plan(PLAIN)
    for strategy in trace.strategies:
        runs = trace.of(strategy)
        rounds = [each for run in runs for each in run.rounds]
        asks_model = any(call.model == DRAFT_MODEL for each in rounds for call in each.drafting)
        if strategy == PLAIN or not rounds or (asks_model and device.draft_curve is None):
            continue
        exits = drafting_exits(trace, runs) if strategy in _THROUGH_EXITS else ()
        first, later = (*exits, None, None)[:2]
        deepest = max(TreeShape(each.parents).depth for each in rounds)
        lengths = _LENGTHS if strategy in (*_CHAINS, *_TREES) and trace.header.greedy else ()
        cuts = [WHOLE, *(Cut(length=length) for length in lengths if length < deepest)]
        yield from (Plan(strategy, cut, first, later) for cut in cuts)


def _trees(trace: Trace, device: Device, host: Host) -> Iterator[Plan]:
    """The trees of every exit that promise most."""
    exits = trace.header.curve.exits
    stretch = host.stretches.get(LAYERSKIP, host.stretch)
    for stop, exit_layer in enumerate(exits[:-1], 1):
        texts = trace.ranks(exit_layer)
        if not any(texts):
            continue
        promised: dict[TreeShape, float] = {}
        for shape, accepted in _candidates(measured_acceptance(texts), device.widest - 1):
            calls = shape_calls(shape, stop, len(exits))
            seconds = stretch * sum(device.seconds(*call) for call in calls)
            seconds += host.seconds(LAYERSKIP, f"exit {exit_layer}", len(shape))
            promised[shape] = (1.0 + accepted) / seconds
        best = sorted(promised, key=lambda shape: -promised[shape])[:_REPLAYED]
        yield from (Plan(LAYERSKIP, exit=exit_layer, tree=shape) for shape in best)


def _candidates(acceptance: NDArray[np.float64], most: int) -> Iterator[tuple[TreeShape, float]]:
    """The best tree of every size, depth and branching, each once, and its expected accepted drafts."""
    seen = set()
    for branching in _BRANCHINGS:
        for levels in range(1, len(acceptance) + 1):
            trees = best_trees(acceptance[:levels, :branching], min(most, _MOST))
            for size in range(1, min(most, _MOST) + 1):
                shape = trees.shape(size)
                if len(shape) == size and shape not in seen:
                    seen.add(shape)
                    yield shape, float(trees.accepted[size])


def _check_same_texts(traces: Sequence[Trace]) -> None:
    """Refuse traces that cannot be compared.

    Raises:
        UsageError: naming the first that differs by its number.
    """
    first = traces[0]
    facts = (first.header.model, first.header.curve.exits, _texts(first))
    for number, trace in enumerate(traces[1:], 2):
        if (trace.header.model, trace.header.curve.exits, _texts(trace)) != facts:
            raise UsageError(
                f"trace {number}: another model, or other texts than those of the first trace",
                hint="record them with the same bundle, prompts and --max-new-tokens",
            )


def _texts(trace: Trace) -> dict[int, tuple[int, ...]]:
    """What the first recorded strategy gave, by prompt."""
    return {run.prompt: run.tokens for run in trace.of(trace.strategies[0])}
