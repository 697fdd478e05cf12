"""Numbers of rows that artefacts of fixed shapes are made for."""

from __future__ import annotations

from itertools import pairwise

from skipstone.errors import UsageError


def chosen_widths(asked: tuple[int, ...] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """The widths that the user named, else the default ones.

    Raises:
        UsageError: they do not rise from 1 or more.
    """
    widths = default if asked is None else asked
    if not widths or any(first >= second for first, second in pairwise((0, *widths))):
        named = ",".join(map(str, widths)) or "none"
        raise UsageError(f"--widths {named}: numbers of rows that rise were expected, say 1,4,8")
    return widths
