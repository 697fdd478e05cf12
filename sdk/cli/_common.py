"""Checks that several commands share."""

from __future__ import annotations

from skipstone.errors import UsageError


def check_strategy(name: str, flag: str = "--strategy") -> None:
    """Refuse an unknown strategy before weights are loaded.

    Raises:
        UsageError: naming the flag; lists the known ones.
    """
    from skipstone.runtimes.strategies import STRATEGIES

    if name not in STRATEGIES:
        raise UsageError(f"{flag} {name}: not known", hint=f"one of {', '.join(STRATEGIES)}")
