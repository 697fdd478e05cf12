"""Where rows' K and V lie, for engines that keep them in slots of their own.

Committed position p lies in slot p, row r in slot base + r: drafts lie behind the context in any order, and committing a
path moves its rows to their places. Nothing is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

from skipstone.errors import ContextFullError
from skipstone.runtimes.rows import RowTree


def check_room(tree: RowTree, context_length: int) -> None:
    """Refuse rows that the cache has no slots for.

    Raises:
        ContextFullError: more positions, drafts included, than it holds.
    """
    needed = tree.base + len(tree)
    if needed > context_length:
        raise ContextFullError(
            f"{needed} positions: the session holds {context_length}",
            hint="export with a longer --context-length or generate fewer tokens",
        )


def is_chain(tree: RowTree, rows: Sequence[int]) -> bool:
    """Whether the rows follow each other, and the first one everything before it."""
    first, depths, parents = rows[0], tree.depths, tree.parents
    return depths[first] == first and all(
        row == first + index and parents[row] == row - 1 for index, row in enumerate(rows)
    )


def moves_of(tree: RowTree, path: Sequence[int]) -> tuple[list[int], list[int]]:
    """From which slots to which others a commit moves K and V; all are read before one is written.

    Args:
        tree: before it is renumbered.
        path: rows that become context.
    """
    run = [row for row in path if tree.progress[row] > 0]  # the others have nothing to move
    moved = [row for row in run if tree.depths[row] != row]
    return [tree.base + row for row in moved], [tree.position(row) for row in moved]
