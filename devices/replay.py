"""What a recorded round would have been with shorter drafts or fewer rows: the engine's calls, and the tokens they give.

Under greedy decoding what follows a text does not depend on the drafts, so a round can be replayed with some of its
drafts left out: those of the accepted path that remain are accepted, and the target adds its own token, which the record
knows too. Where the record went further than the cut, what is left of its tree is drafted again from the token that was
reached: an approximation, for a drafter would know the new token and might say something else or more.

What an exit says after a text does not depend on drafts either. So where the trace tells the place of every token among
an exit's choices, the rounds in which that exit drafts a tree of a given shape are known exactly, whatever the shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from skipstone.devices.traces import HEAD, TARGET, Round
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.shapes import TreeShape


@dataclass(frozen=True)
class Cut:
    """What is left of the drafts.

    Attributes:
        length: longest draft, levels below the root; None: as it was.
        rows: most rows of a verification, the root included; None: as it was.
    """

    length: int | None = None
    rows: int | None = None


WHOLE = Cut()


@dataclass(frozen=True)
class Work:
    """One round's work: calls as (model, part, width), drafts verified, and tokens given."""

    calls: tuple[tuple[int, int, int], ...]
    drafted: int
    tokens: int


def as_it_ran(round: Round) -> Work:
    """The recorded round."""
    calls = (*round.drafting, *round.verifying)
    return Work(
        tuple((call.model, call.part, len(call.depths)) for call in calls), len(round.parents), round.fresh
    )


def plainly(round: Round, segments: int) -> Iterator[Work]:
    """The same tokens one by one."""
    work = Work(tuple((TARGET, segment, 1) for segment in range(segments)), 0, 1)
    yield from (work for _ in range(round.fresh))


def shortened(round: Round, cut: Cut, segments: int) -> Iterator[Work]:
    """The rounds that give the same tokens when drafts are cut.

    Args:
        round: as recorded, greedily.
        cut: how.
        segments: number of the target's segments.
    """
    depths = _depths(round.parents)
    reached, left = 0, round.fresh  # accepted drafts that the text has come to
    while left > 0:
        base = round.accepted[reached - 1] if reached else ROOT
        kept = _kept(round, depths, base, cut)
        ahead = round.accepted[reached:]
        hits = next((n for n, node in enumerate(ahead) if node not in kept), len(ahead))
        tokens = min(left, hits + 1)
        calls = (
            *_drafting(round, reached, cut.length),
            *_verifying(round, depths, reached, kept, cut, segments),
        )
        yield Work(calls, len(kept), tokens)
        left -= tokens
        reached += hits + 1


def in_shape(ranks: Sequence[int], shape: TreeShape, stop: int, segments: int) -> Iterator[Work]:
    """The rounds that give a text when an exit drafts the same tree in each.

    Args:
        ranks: of the text's tokens among the exit's choices (`skipstone.devices.traces.Run.ranks`).
        shape: of the tree; near the text's end its first nodes.
        stop: number of segments up to the exit.
        segments: number of the target's segments.
    """
    known: dict[int, tuple[TreeShape, tuple[tuple[int, int, int], ...]]] = {}
    reached = 0
    while reached < len(ranks):
        size = min(len(shape), len(ranks) - reached - 1)
        if size not in known:
            tree = shape.first(size)
            known[size] = tree, shape_calls(tree, stop, segments)
        tree, calls = known[size]
        tokens = 1 + _followed(tree, ranks[reached:])
        yield Work(calls, size, tokens)
        reached += tokens


def shape_calls(shape: TreeShape, stop: int, segments: int) -> tuple[tuple[int, int, int], ...]:
    """The engine's calls of a round in which an exit drafts a tree of this shape; arguments as `in_shape`'s.

    Every level is one batch of the nodes that have children. Leaves, and without any the root, come to the exit only
    when they are verified.
    """
    drafting = [(TARGET, part, len(wave)) for wave in shape.waves for part in (*range(stop), HEAD)]
    leaves = len(shape) + 1 - len(shape.children)
    before = [(TARGET, part, leaves) for part in range(stop)]
    return (*drafting, *before, *((TARGET, part, len(shape) + 1) for part in range(stop, segments)))


def _followed(shape: TreeShape, ranks: Sequence[int]) -> int:
    """How many drafts of a tree are accepted where the text takes these choices."""
    node, count = ROOT, 0
    for rank in ranks:
        below = shape.children.get(node, ())
        if not 0 <= rank < len(below):
            break
        node, count = below[rank], count + 1
    return count


def _depths(parents: Sequence[int]) -> list[int]:
    """Levels below the root."""
    depths: list[int] = []
    for parent in parents:
        depths.append(1 + (depths[parent] if parent != ROOT else 0))
    return depths


def _kept(round: Round, depths: Sequence[int], base: int, cut: Cut) -> set[int]:
    """The likeliest nodes below `base` that the cut leaves; a parent is at least as likely as its children."""
    below = {base}
    for node, parent in enumerate(round.parents):
        if parent in below:
            below.add(node)
    below.discard(base)
    deepest = None if cut.length is None else cut.length + (depths[base] if base != ROOT else 0)
    nodes = [node for node in below if deepest is None or depths[node] <= deepest]
    nodes.sort(key=lambda node: (-round.scores[node], node))
    return set(nodes if cut.rows is None else nodes[: max(0, cut.rows - 1)])


def _drafting(round: Round, level: int, length: int | None) -> Iterator[tuple[int, int, int]]:
    """The drafting calls of rows from `level` on whose children a draft of this length has."""
    stop = None if length is None else level + length
    seen = False
    for model, part, depths in round.drafting:
        width = sum(
            1
            for depth in depths
            if (depth >= level or (level == 0 and depth < 0)) and (stop is None or depth < stop)
        )
        seen = seen or level in depths
        if width:
            yield model, part, width
    if not seen:  # the row that was reached had not been asked for drafts of its own: it would be now
        yield from dict.fromkeys((model, part, 1) for model, part, _ in round.drafting)


def _verifying(
    round: Round, depths: Sequence[int], level: int, kept: set[int], cut: Cut, segments: int
) -> Iterator[tuple[int, int, int]]:
    """One call per segment, of the rows that drafting has not run through it."""
    leaf = (
        None if cut.length is None else level + cut.length
    )  # never asked for drafts, so never run while drafting
    ran = [round.root_ran]
    ran += [0 if leaf is not None and depths[node] >= leaf else round.ran[node] for node in kept]
    for segment in range(segments):
        width = sum(1 for done in ran if done <= segment)
        if width:
            yield TARGET, segment, width
